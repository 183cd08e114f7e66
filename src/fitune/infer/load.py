"""Open a finished run, or any model, and talk to it.

import fitune
print(fitune.load("runs/demo").generate("以“春雨”为题，写一首五言绝句"))
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import RunConfig, new_tokens
from fitune.config import load as load_config
from fitune.data.example import Message, system_turn
from fitune.data.templates import Template, resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.infer.generate import generate, stream
from fitune.infer.sampling import Sampling
from fitune.methods import METHODS, Method
from fitune.methods.base import CONFIG
from fitune.model.adapter import check_base
from fitune.model.folder import resolve_folder
from fitune.model.load import DTYPES, Base, load_base, pick_device, pick_dtype
from fitune.model.quantize import QUANTIZATIONS, dequantize_blocks, use_int8

Conversation = str | Sequence[Mapping[str, str]]
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        config: the run's configuration; None for a bare model.
        method: how it was trained; None for a bare model.
        raw: it was trained on raw text, which has no template: a prompt is a text to be continued.
    """

    model: nn.Module
    tokenizer: Tokenizer
    template: Template
    device: torch.device
    base: Base
    config: RunConfig | None
    method: Method | None
    raw: bool = False

    @property
    def pad_id(self) -> int:
        """Any valid id does: padding is masked by length."""
        return self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.stop_ids[0]

    def generate(self, prompt: Conversation, *, raw: bool | None = None, **sampling: Any) -> str:
        """Answer one prompt.

        Args:
            prompt: what the user says, or messages as {"role": ..., "content": ...}; a system turn may have `tools`
                (JSON), an assistant turn of ChatGLM3 `metadata`, the name of the tool it calls.
            raw: continue the prompt as text, without a template; None: as the run was trained.
            sampling: fields of `fitune.infer.sampling.Sampling`; greedy by default.

        Raises:
            ConfigError: an unknown or disallowed argument, or a conversation that is none.
            DataError: the template refuses the conversation, or it is too long for the model.
        """
        return self.generate_many([prompt], raw=raw, **sampling)[0]

    def generate_many(self, prompts: Sequence[Conversation], *, raw: bool | None = None, **sampling: Any) -> list[str]:
        """Answer several prompts in batches; same order."""
        settings = Sampling.of(sampling)
        ids = [self.prompt_ids(prompt, raw=raw) for prompt in prompts]
        answers = generate(self.model, ids, self.tokenizer.stop_ids, settings)
        said = self._reads(raw)
        return [said(answer.ids) for answer in answers]

    def stream(self, prompt: Conversation, *, raw: bool | None = None, **sampling: Any) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is written; closing the iterator ends the generation."""
        settings = Sampling.of(sampling)
        ids = self.prompt_ids(prompt, raw=raw)
        tokens = stream(self.model, ids, self.tokenizer.stop_ids, settings)
        return _pieces(tokens, self._reads(raw), self.tokenizer.unsettled)

    def _reads(self, raw: bool | None) -> Callable[[Sequence[int]], str]:
        """What turns generated ids into text: a raw text has no layout around it."""
        return self.tokenizer.decode if self._is_raw(raw) else self.template.answer_text

    def _is_raw(self, raw: bool | None) -> bool:
        return self.raw if raw is None else raw

    def prompt_ids(self, prompt: Conversation, *, raw: bool | None = None) -> list[int]:
        """Token ids of a conversation, or of a raw text, up to where the answer starts."""
        if self._is_raw(raw):
            return self._text_ids(prompt)
        return self.template.prompt_ids(_messages(prompt))

    def _text_ids(self, text: Conversation) -> list[int]:
        if not isinstance(text, str):
            raise ConfigError(
                "messages need a template, and raw text has none; give the prompt as one string, or raw=False to use "
                f"the template {self.template.name}"
            )
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text)]
        if not ids:
            raise ConfigError("the prompt is empty; give a text to be continued")
        return ids


def _pieces(
    tokens: Generator[int, None, None], said: Callable[[Sequence[int]], str], unsettled: tuple[str, ...]
) -> Generator[str, None, None]:
    """Text as its tokens come in, but not its end while that may change: see `Tokenizer.unsettled`."""
    ids: list[int] = []
    text = shown = ""
    with contextlib.closing(tokens):
        for token in tokens:
            ids.append(token)
            # All of it: what a token means may depend on those before it (a space in front, bytes of a character).
            text = said(ids)
            # A character of several byte tokens decodes to U+FFFD until its last byte is there.
            if len(text) > len(shown) and not text.endswith(unsettled):
                yield text[len(shown) :]
                shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]


def _messages(prompt: Conversation) -> list[Message]:
    if isinstance(prompt, str):
        return [Message(role="user", content=prompt)]
    if not prompt:
        raise ConfigError('the conversation is empty; give at least one {"role": "user", "content": ...}')
    for number, turn in enumerate(prompt, 1):
        if not isinstance(turn, Mapping):
            raise ConfigError(f"message {number} is {turn!r:.80}; a message is {{'role': ..., 'content': ...}}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise ConfigError(f"message {number}: `{key}` is {turn.get(key)!r:.80}; it must be a string")
        for key in ("metadata", "tools"):
            if not isinstance(turn.get(key, ""), str):
                raise ConfigError(f"message {number}: `{key}` is {turn[key]!r:.80}; it must be a string (tools: JSON)")
    return [_message(turn) for turn in prompt]


def _message(turn: Mapping[str, str]) -> Message:
    if turn["role"] == "system" and turn.get("tools"):
        return system_turn(turn["content"], turn["tools"])
    return Message(turn["role"], turn["content"], metadata=turn.get("metadata") or None)


def load(
    path: str | Path, *, device: str = "auto", dtype: str | None = None, quantization: str | None = None
) -> Loaded:
    """Open a run folder made by `fitune train`, or a base model (`embedded`, a folder, a hub id).

    Args:
        device: auto, cpu or cuda.
        dtype: fp32, fp16 or bf16; None: as trained, or the default of the device.
        quantization: none, int8, nf4, fp4 or fp8, see `model.quantization`; None: as trained, or as in the folder.
            Weights are quantized from `dtype`, those that bitsandbytes quantized expanded to it for `none`.

    Raises:
        ConfigError: nothing usable at `path`, a run without a result, or an unknown device, dtype or quantization.
        CheckpointError: the adapter belongs to another base model.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; allowed: {', '.join(DEVICES)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if quantization is not None and quantization not in ("none", *QUANTIZATIONS):
        raise ConfigError(f"quantization is {quantization!r}; allowed: none, {', '.join(QUANTIZATIONS)}")
    run = Path(path)
    if (run / "config.yaml").is_file():
        return _load_run(run, device, dtype, quantization)
    if (run / CONFIG).is_file() and not (run / "config.json").is_file():
        raise _is_adapter(run)
    where = pick_device(device)
    folder = resolve_folder(str(path), name="run or model")
    tokenizer = Tokenizer.load(folder)
    template = resolve_template("auto", tokenizer)
    base = _open(folder, pick_dtype(dtype, where), where, quantization, "none")
    return Loaded(base.model, tokenizer, template, where, base, None, None)


@dataclass(frozen=True)
class RunParts:
    """What a finished run consists of, known before any weight is read.

    Attributes:
        result: the folder of its adapter or model.
        folder: of the base model; after full fine-tuning `result`, which stands alone.
    """

    config: RunConfig
    method: Method
    result: Path
    folder: Path
    tokenizer: Tokenizer
    template: Template


def run_parts(run: Path) -> RunParts:
    """Find the parts of a run.

    Raises:
        ConfigError: it has no result yet, or its base model is gone.
    """
    config = load_config(run / "config.yaml")
    method = METHODS[config.method.name]
    result = run / method.folder
    if not result.is_dir():
        raise ConfigError(f"{run} has no result yet ({method.folder}/ is missing); finish it: fitune resume {run}")
    folder = result if method.folder == "model" else resolve_folder(config.model.path)
    tokenizer = Tokenizer.load(folder, new_tokens(config.method))
    return RunParts(config, method, result, folder, tokenizer, resolve_template(config.data.template, tokenizer))


def _load_run(run: Path, device: str, dtype: str | None, quantization: str | None) -> Loaded:
    parts = run_parts(run)
    config, method, result = parts.config, parts.method, parts.result
    where = pick_device(device)
    base = _open(
        parts.folder, pick_dtype(dtype or config.model.dtype, where), where, quantization, config.model.quantization
    )
    use_int8(base.model, config.model.int8_compute, config.model.int8_threshold)
    model = base.model
    if method.folder != "model":
        check_base(result, base.folder, base.fingerprint, must_say=True)
        model = method.open(base, result)
        model.requires_grad_(False)
        model.eval()
    raw = _learnt_raw_text(run)
    return Loaded(model, parts.tokenizer, parts.template, where, base, config, method, raw)


def _open(folder: Path, dtype: str, where: torch.device, wanted: str | None, usual: str) -> Base:
    base = load_base(folder, dtype, where, wanted or usual)
    if wanted == "none":  # weights that bitsandbytes stored are expanded
        dequantize_blocks(base.model)
    return base


def _learnt_raw_text(run: Path) -> bool:
    """Whether no row of the run had a template; a run that does not say so had one."""
    try:
        return bool(json.loads((run / "result.json").read_text(encoding="utf-8"))["data"]["template"] is None)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_adapter(folder: Path) -> ConfigError:
    run = folder.resolve().parent
    if (run / "config.yaml").is_file():
        advice = f"give the run it belongs to: {run}"
    else:
        advice = "give the run folder it came from, or make a whole model of that run: fitune export RUN --to DIR"
    return ConfigError(
        f"{folder} is an adapter ({CONFIG}, no config.json), which is no model without its base; {advice}. In Python, "
        "peft.AutoPeftModelForCausalLM opens a LoRA adapter"
    )
