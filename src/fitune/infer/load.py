"""Open a finished run, or any model, and talk to it.

import fitune
print(fitune.load("runs/demo").generate("以“春雨”为题，写一首五言绝句"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import RunConfig
from fitune.config import load as load_config
from fitune.data.sources import Message
from fitune.data.templates import Template, resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.generate import Sampling, generate, stream
from fitune.methods import METHODS, Method
from fitune.methods.base import FACTS
from fitune.model.folder import resolve_folder
from fitune.model.load import Base, load_base, pick_device, pick_dtype

Conversation = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        config: the run's configuration; None for a bare model.
        method: how it was trained; None for a bare model.
    """

    model: nn.Module
    tokenizer: Tokenizer
    template: Template
    device: torch.device
    base: Base
    config: RunConfig | None
    method: Method | None

    @property
    def pad_id(self) -> int:
        """Any valid id does: padding is masked by length."""
        return self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.stop_ids[0]

    def generate(self, prompt: Conversation, **sampling: Any) -> str:
        """Answer one prompt.

        Args:
            prompt: what the user says, or messages as {"role": ..., "content": ...}.
            sampling: fields of `fitune.infer.generate.Sampling`; greedy by default.
        """
        return self.generate_many([prompt], **sampling)[0]

    def generate_many(self, prompts: Sequence[Conversation], **sampling: Any) -> list[str]:
        """Answer several prompts in batches; same order."""
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        answers = generate(self.model, ids, self.tokenizer.stop_ids, Sampling(**sampling))
        return [self.tokenizer.decode(answer.ids) for answer in answers]

    def stream(self, prompt: Conversation, **sampling: Any) -> Iterator[str]:
        """Yield the answer in pieces as it is written."""
        ids = self.prompt_ids(prompt)
        pending: list[int] = []
        for token in stream(self.model, ids, self.tokenizer.stop_ids, Sampling(**sampling)):
            pending.append(token)
            text = self.tokenizer.decode(pending)
            # A character of several byte tokens decodes to U+FFFD until its last byte is there.
            if text and not text.endswith("\ufffd"):
                yield text
                pending = []
        if pending:
            yield self.tokenizer.decode(pending)

    def prompt_ids(self, prompt: Conversation) -> list[int]:
        """Token ids of a conversation up to where the answer starts."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.template.prompt_ids([Message(role=turn["role"], content=turn["content"]) for turn in turns])


def load(path: str | Path, *, device: str = "auto", dtype: str | None = None) -> Loaded:
    """Open a run folder made by `fitune train`, or a base model (`embedded`, a folder, a hub id).

    Args:
        device: auto, cpu or cuda.
        dtype: fp32, fp16 or bf16; None: as trained, or the default of the device.

    Raises:
        ConfigError: nothing usable at `path`, or a run without a result.
        CheckpointError: the adapter belongs to another base model.
    """
    run = Path(path)
    if (run / "config.yaml").is_file():
        return _load_run(run, device, dtype)
    where = pick_device(device)
    folder = resolve_folder(str(path))
    base = load_base(folder, pick_dtype(dtype, where), where)
    tokenizer = Tokenizer.load(folder)
    return Loaded(base.model, tokenizer, resolve_template("auto", tokenizer), where, base, None, None)


def _load_run(run: Path, device: str, dtype: str | None) -> Loaded:
    config = load_config(run / "config.yaml")
    method = METHODS[config.method.name]
    result = run / method.folder
    if not result.is_dir():
        raise ConfigError(f"{run} has no result yet ({method.folder}/ is missing); finish it: fitune resume {run}")
    where = pick_device(device)
    wanted = pick_dtype(dtype or config.model.dtype, where)
    folder = resolve_folder(config.model.path)
    tokenizer = Tokenizer.load(folder)
    template = resolve_template(config.data.template, tokenizer)
    if method.folder == "model":
        base = load_base(result, wanted, where)
        return Loaded(base.model, tokenizer, template, where, base, config, method)
    base = load_base(folder, wanted, where)
    check_base(result, base)
    model = method.apply(base, config.method)
    method.load(model, result)
    model.requires_grad_(False)
    model.eval()
    return Loaded(model, tokenizer, template, where, base, config, method)


def check_base(adapter: Path, base: Base) -> None:
    """Refuse an adapter that was trained on other base weights."""
    file = adapter / FACTS
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); is this an adapter made by fitune?") from error
    if recorded != base.fingerprint:
        raise CheckpointError(
            f"{adapter} was trained on other weights than those in {base.folder} (fingerprints differ). Use the base "
            "model it was trained on"
        )
