"""Weights as files: read tensor by tensor, written shard by shard, so that no whole model need be in memory.

weights = WeightFiles(folder, inspect_folder(folder).weight_files)
with new_folder(target) as out:
    writer = ShardWriter(out)
    for name in weights.shapes:
        writer.add(name, weights.read(name))
    writer.finish()
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fitune.errors import CheckpointError, ConfigError

SHARD_BYTES = 2**31


class WeightFiles:
    """The tensors of a folder's safetensors files by name; a tensor is read when it is asked for.

    Args:
        files: their names in the folder.
    Attributes:
        shapes: shape of every tensor by name, file after file.
    Raises:
        ConfigError: a file is damaged.
    Memory: pages of the file that was read last, which the system may drop; what `read` returns.
    """

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self._folder = folder
        self._file: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        self._open: tuple[str, Any] | None = None
        for file in files:
            reader = self._reader(file)
            for name in reader.keys():  # noqa: SIM118  # no mapping
                self._file[name] = file
                self.shapes[name] = torch.Size(reader.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor on CPU, as stored; it may be a view of the file: do not write to it."""
        file = self._file[name]
        try:
            tensor: torch.Tensor = self._reader(file).get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(file, error) from error
        return tensor

    def _reader(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = file, safe_open(self._folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, error) from error
        return self._open[1]

    def _damaged(self, file: str, error: Exception) -> ConfigError:
        return ConfigError(f"{self._folder / file}: is damaged or cut short ({error}); download it again")


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
        weight_map = {}
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


def check_target(target: Path, option: str) -> None:
    """Refuse a place that already holds something.

    Raises:
        ConfigError: `target` is a file or a folder with something in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{option} {target}: exists and is not an empty folder; give a new one")


@contextmanager
def new_folder(target: Path, option: str = "--to") -> Iterator[Path]:
    """A folder to fill, which gets its name when all is written; after an error nothing is left.

    Args:
        target: must not exist, or be an empty folder.
        option: how the user named it, for messages.
    Raises:
        ConfigError: `target` is taken.
        CheckpointError: the disk does not take it.
    """
    check_target(target, option)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.tmp-") as temporary:
            folder = Path(temporary) / "out"
            folder.mkdir()
            yield folder
            if target.exists():
                target.rmdir()
            os.rename(folder, target)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise CheckpointError(f"{option} {target}: {reason}; nothing was left there") from error
    except SafetensorError as error:  # its own name for a full disk
        raise CheckpointError(
            f"{option} {target}: the weights cannot be written ({error}); is the disk full? Nothing was left there"
        ) from error
