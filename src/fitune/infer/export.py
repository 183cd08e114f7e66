"""A run -> a folder other tools load: merged Hugging Face model, or PEFT adapter; either way one that stops.

The template the run was trained with becomes the folder's chat template, and generation_config.json gets the stop
ids, so that the exported model ends its answers in any server.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from fitune.data.templates import Template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.load import Loaded, load
from fitune.model.folder import copy_tokenizer


def export(run: Path, target: Path, *, form: str = "merged", dtype: str | None = None) -> Path:
    """Write a finished run as a model folder.

    Args:
        target: must not exist, or be an empty folder.
        form: "merged" (the adapter folded into the base) or "adapter" (PEFT files; LoRA and BitFit only).
        dtype: of the merged weights; None: as trained.

    Raises:
        ConfigError: `run` is no finished run, or `target` is taken.
        CheckpointError: the disk does not take it; nothing is left at `target`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target}: exists and is not an empty folder; give a new one")
    loaded = load(run, dtype=dtype, device="cpu")
    if loaded.method is None:
        raise ConfigError(f"{run} is not a run folder; `fitune export` needs one, made by `fitune train`")
    if form == "adapter" and loaded.method.folder != "adapter":
        raise ConfigError(f"method {loaded.method.name} has no adapter; export it merged")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.tmp-") as temporary:
            folder = Path(temporary) / "out"
            folder.mkdir()
            _write(loaded, run, folder, form)
            if target.exists():
                target.rmdir()
            os.rename(folder, target)
    except OSError as error:
        raise CheckpointError(f"--to {target}: cannot be written ({error.strerror}); nothing was left there") from error
    return target


def _write(loaded: Loaded, run: Path, folder: Path, form: str) -> None:
    assert loaded.method is not None
    if form == "adapter":
        shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
    else:
        model = loaded.method.merge(loaded.model)
        stops = list(loaded.tokenizer.stop_ids)
        model.generation_config.eos_token_id = stops  # type: ignore[union-attr]  # a transformers model
        model.generation_config.pad_token_id = loaded.pad_id  # type: ignore[union-attr]
        model.config.use_cache = True  # type: ignore[union-attr]
        model.save_pretrained(folder)  # type: ignore[operator]
    copy_tokenizer(loaded.tokenizer.folder, folder)
    write_chat_template(folder, loaded.template, loaded.tokenizer)


def write_chat_template(folder: Path, template: Template, tokenizer: Tokenizer) -> None:
    """Make `template` the chat template of a model folder, in the file that transformers reads first."""
    (folder / "chat_template.jinja").write_text(template.chat_template(tokenizer), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:  # one definition: the .jinja file
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
