"""A run -> a folder other tools load: merged Hugging Face model, or PEFT adapter; either way one that stops.

The template the run was trained with becomes the folder's chat template, and generation_config.json gets the stop
ids, so that the exported model ends its answers in any server.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fitune.config import load as load_config
from fitune.data.templates import Template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.infer.disk import check_free, new_folder
from fitune.infer.load import RunParts, load, run_parts
from fitune.infer.merge import merge_files
from fitune.methods import METHODS
from fitune.methods.base import CONFIG, write_json
from fitune.model.folder import inspect_folder
from fitune.model.load import pick_dtype

FORMS = ("merged", "adapter")


def export(run: Path, target: Path, *, form: str = "merged", dtype: str | None = None) -> Path:
    """Write a finished run as a model folder.

    Args:
        target: must not exist, or be an empty folder.
        form: "merged" (the adapter folded into the base; not for virtual tokens, which no weights hold) or "adapter"
            (PEFT's files; fitune's own for bitfit and freeze).
        dtype: of the merged weights; None: as trained.

    Raises:
        ConfigError: `run` is no finished run, `target` is taken, or `form` and `dtype` do not go together.
        CheckpointError: the disk does not take it; nothing is left at `target`.
    """
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    if form == "adapter" and dtype is not None:
        raise ConfigError(f"dtype is {dtype!r}, but an adapter is exported as it was trained; leave dtype out")
    check_free(target, "--to")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run folder; `fitune export` needs one, made by `fitune train`")
    _check_form(run, form)
    parts = run_parts(run)

    def fill(folder: Path) -> None:
        if form == "adapter":
            load(run, device="cpu")  # it belongs to its base and is whole
            shutil.copytree(parts.result, folder, dirs_exist_ok=True)
            _name_base(parts, folder / CONFIG)
        else:
            _write_merged(run, parts, folder, dtype)
        write_companions(folder, parts.template, parts.tokenizer)

    new_folder(target, fill)
    return target


def base_note(run: Path, form: str) -> str:
    """What to do before other programs load an exported adapter: a line where its base runs in fitune alone."""
    folder = run_parts(run).folder
    if form != "adapter" or inspect_folder(folder).original is None:
        return ""
    return (
        f"\nnote: other programs cannot load {folder} without its own code: `fitune convert {folder} DST` writes "
        "the same base as an ordinary GLM folder, which the adapter fits"
    )


def _check_form(run: Path, form: str) -> None:
    """Refuse a form that the run's method does not have, before anything loads."""
    method = METHODS[load_config(run / "config.yaml").method.name]
    if form == "merged" and method.merge is None:
        raise ConfigError(
            f"{run} was trained with method.name={method.name}: its virtual tokens stand in front of every row, and no "
            "weights of the model could hold them. Export it with --form adapter (form='adapter')"
        )
    if form == "adapter" and method.folder != "adapter":
        raise ConfigError(f"method {method.name} has no adapter; export it merged")


def _write_merged(run: Path, parts: RunParts, folder: Path, dtype: str | None) -> None:
    """Into the weights as they were before they were quantized: file by file, else in memory."""
    dtype = pick_dtype(dtype or parts.config.model.dtype, torch.device("cpu"))
    settings = stop_settings(parts.tokenizer)
    if merge_files(parts, dtype, folder):
        settings.save_pretrained(folder)
        return
    loaded = load(run, dtype=dtype, device="cpu", quantization="none")
    assert parts.method.merge is not None, "checked"
    model: Any = parts.method.merge(loaded.model)
    model.generation_config = settings
    model.config.use_cache = True
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes it readable by its owner alone


def write_companions(folder: Path, template: Template, tokenizer: Tokenizer) -> None:
    """Put beside weights what makes them answer and stop elsewhere: tokenizer and chat template."""
    tokenizer.save(folder)
    write_chat_template(folder, template, tokenizer)


def stop_settings(tokenizer: Tokenizer) -> Any:
    """A fresh transformers GenerationConfig with the stop ids.

    Settings of the base are left behind: they may contradict each other, which transformers loads but does not save.
    """
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.stop_ids[0]
    return GenerationConfig(eos_token_id=list(tokenizer.stop_ids), pad_token_id=pad_id, bos_token_id=tokenizer.bos_id)


def _name_base(parts: RunParts, file: Path) -> None:
    """Let a local base be found from anywhere: PEFT looks for its path, and knows no `embedded`."""
    path = parts.config.model.path
    if path == "embedded" or Path(path).expanduser().is_dir():
        config = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, {**config, "base_model_name_or_path": str(parts.folder.resolve())})


def write_chat_template(folder: Path, template: Template, tokenizer: Tokenizer) -> None:
    """Make `template` the chat template of a model folder, in the file that transformers reads first."""
    (folder / "chat_template.jinja").write_text(template.chat_template(tokenizer), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:  # one definition: the .jinja file
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
