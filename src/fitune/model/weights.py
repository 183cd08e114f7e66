"""Weights as files: read tensor by tensor, written shard by shard, so that no whole model need be in memory.

weights = open_weights(folder, inspect_folder(folder))
writer = ShardWriter(out)
for name in weights.shapes:
    writer.add(name, weights.read(name))
writer.finish()
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 2**31


class WeightFiles:
    """Tensors of a folder's weight files by name; a tensor is read when it is asked for.

    Args:
        files: their names.
        read_file: a file's tensors by name, mapped into memory: only what is touched is read.
    Attributes:
        shapes: shape of every tensor by name, file after file.
        dtypes: of every tensor by name.
    Memory: touched pages of the file that was read last, and what `read` returns.
    """

    def __init__(self, files: tuple[str, ...], read_file: Callable[[str], dict[str, torch.Tensor]]) -> None:
        self._read_file = read_file
        self._open: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._file: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in files:
            for name, tensor in self._tensors(file).items():
                self._file[name] = file
                self.shapes[name] = tensor.shape
                self.dtypes[name] = tensor.dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor on CPU, as stored; it may be a view of the file: do not write to it."""
        return self._tensors(self._file[name])[name]

    def _tensors(self, file: str) -> dict[str, torch.Tensor]:
        if self._open[0] != file:
            self._open = ("", {})  # its pages, before those of the next one
            self._open = file, self._read_file(file)
        return self._open[1]


class ShardWriter:
    """Writes tensors into safetensors files of limited size, with transformers' names and index.

    Args:
        folder: existing; without weights.
        shard_bytes: a file ends before it would grow past this.
    Memory: the tensors of one file.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor behind those before it; it must not share memory with another."""
        if self._pending and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the index if there is more than one file."""
        self._flush()
        if len(self._shards) == 1:
            os.rename(self._part(1), self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.rename(self._part(number), self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        file = self._part(len(self._shards))
        save_file(self._pending, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable by its owner alone
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"


def names_in_model(model: Any, shapes: Mapping[str, torch.Size]) -> dict[str, str] | None:
    """Name in the files -> name in the model, in the files' order; tied weights count once.

    Args:
        model: a transformers model, on the meta device if need be.
        shapes: of the weights in the files.
    Returns:
        None if they do not cover the model one to one: names that transformers converts while it loads.
    """
    tied: dict[int, str] = {}
    model.tie_weights()
    wanted = {n: t.shape for n, t in model.state_dict(keep_vars=True).items() if tied.setdefault(id(t), n) == n}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for source, shape in shapes.items():
        for name in (source, prefix + source, source.removeprefix(prefix)):
            if wanted.get(name) == shape:
                found[source] = name
                break
    return found if len(found) == len(wanted) == len(set(found.values())) else None
