"""An original ChatGLM2 or ChatGLM3 folder -> an ordinary GLM folder, which other tools load without its code.

    convert(Path("chatglm3-6b"), Path("glm3-6b"))

Files are read and written one after another, so memory holds one of them, not the model. fitune itself needs no
conversion: it trains on either folder, and adapters of one fit the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fitune.data.tokenizer import Tokenizer
from fitune.data.tokenizer_files import TokenizerFiles
from fitune.errors import ConfigError
from fitune.infer.disk import check_free, new_folder
from fitune.model.chatglm import glm_weights
from fitune.model.folder import ModelFolder, inspect_folder
from fitune.model.load import CONVERTED, fingerprint, identity, read_tensors
from fitune.plan.arch import ArchSpec, read_arch

SHARD_BYTES = 2_000_000_000
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class _Source:
    """What is converted: the folder, what it holds, its sizes, and its tensors by source file."""

    folder: Path
    raw: ModelFolder
    arch: ArchSpec

    def files(self) -> Iterator[dict[str, torch.Tensor]]:
        """GLM's tensors of each file in turn, read when touched; a file is let go before the next one."""
        for name in self.raw.weight_files:
            yield glm_weights(read_tensors(self.folder / name), self.arch, self.folder / name)


def convert(source: Path, target: Path) -> Path:
    """Write the GLM folder of an original ChatGLM2 or ChatGLM3 folder.

    Args:
        target: must not exist, or be an empty folder; it appears by one rename.

    Raises:
        ConfigError: `source` is no such folder, is incomplete, or `target` is taken.
        CheckpointError: the disk does not take it; nothing is left at `target`.
    Memory: one source file and one shard of 2 GB.
    """
    check_free(target, "DST")
    raw = inspect_folder(source)
    if raw.original is None:
        reason = "which needs no conversion" if raw.model_type != "chatglm" else "which transformers has no model for"
        raise ConfigError(f"{source}: is a {raw.model_type} folder, {reason}; ChatGLM2 and 3 are what is converted")
    tokenizer_files = TokenizerFiles.read(source)
    Tokenizer(tokenizer_files).check_rows(raw.config["vocab_size"])
    files = tokenizer_files.contents
    found = _Source(source, raw, read_arch(raw.original))
    shards, dtype, num_bytes = _plan(found)
    need_bytes = num_bytes + sum(map(len, files.values())) + 1_000_000

    def fill(folder: Path) -> None:
        config = json.loads(files["config.json"]) | {"architectures": ["GlmForCausalLM"], "dtype": _NAMES[dtype]}
        _write_json(folder / "config.json", config)
        for name in files.keys() - {"config.json"}:
            (folder / name).write_bytes(files[name])
        _write_weights(found, shards, folder)
        names = tuple(sorted(set(shards.values())))
        if len(names) > 1:
            _write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": num_bytes}, "weight_map": shards}
            )
        facts = {"fingerprint": fingerprint(folder, names), "source_fingerprint": identity(source, raw.weight_files)}
        _write_json(folder / CONVERTED, facts)

    new_folder(target, fill, need_bytes)
    return target


def _plan(source: _Source) -> tuple[dict[str, str], torch.dtype, int]:
    """Which tensor goes into which file, from the headers of the source alone; their dtype; bytes of all.

    Raises:
        ConfigError: weights are missing, of another shape, or of different dtypes.
    """
    groups: list[list[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[torch.dtype] = set()
    num_bytes = 0
    for tensors in source.files():
        room = 0
        for name, tensor in tensors.items():
            if not groups or tensor.nbytes > room:
                groups.append([])
                room = SHARD_BYTES
            room -= tensor.nbytes
            num_bytes += tensor.nbytes
            groups[-1].append(name)
            shapes[name] = tuple(tensor.shape)
            dtypes.add(tensor.dtype)
    _check_complete(source, shapes)
    if len(dtypes) > 1 or not dtypes <= _NAMES.keys():
        raise ConfigError(f"{source.folder}: weights are {', '.join(sorted(map(str, dtypes)))}; one kind is needed")
    total = len(groups)
    file = "model-{:05d}-of-{:05d}.safetensors" if total > 1 else "model.safetensors"
    return {name: file.format(i, total) for i, group in enumerate(groups, 1) for name in group}, dtypes.pop(), num_bytes


def _check_complete(source: _Source, shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = {p.name.format(i): p.shape for p in source.arch.parameters for i in range(p.copies)}
    odd = sorted(name for name in wanted.keys() | shapes.keys() if shapes.get(name) != wanted.get(name))
    if odd:
        kind = f"of shape {list(shapes.get(odd[0], ()))}, not {list(wanted.get(odd[0], ()))}"
        kind = "missing" if odd[0] not in shapes else "surplus" if odd[0] not in wanted else kind
        raise ConfigError(
            f"{source.folder}: {len(odd)} weights are missing, surplus or of another shape than config.json says "
            f"({odd[0]} is {kind}); the folder is incomplete or belongs to another model"
        )


def _write_weights(source: _Source, shards: dict[str, str], folder: Path) -> None:
    for tensors in source.files():
        for file in dict.fromkeys(shards[name] for name in tensors):
            part = {name: tensor.contiguous() for name, tensor in tensors.items() if shards[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors makes it readable by its owner alone


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
