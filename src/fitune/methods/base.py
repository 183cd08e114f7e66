"""The contract of a method, and the one way an adapter folder is written and read.

adapter/adapter_model.safetensors   the result, by the names of its file format
        adapter_config.json         what PEFT reads beside it
        fitune.json                 method, base model and its fingerprint
        trained.safetensors         in checkpoints only, where the result is made from what is trained
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fitune.config import MethodConfig
from fitune.errors import CheckpointError
from fitune.methods.merging import Edits, no_edits
from fitune.model.adapter import CONFIG, FACTS, WEIGHTS
from fitune.model.load import Base

TRAINED = "trained.safetensors"

Tensors = dict[str, torch.Tensor]

__all__ = ["CONFIG", "WEIGHTS"]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: `method.name`.
        folder: where a run keeps the result: `adapter` (needs the base model) or `model` (stands alone).
        apply: (base, config) -> model whose trainable parameters have requires_grad.
        state: model -> what a resumed run needs, exactly.
        load_state: (model, tensors) copies such tensors into an applied model, strictly.
        write_config: (model, folder, facts) writes what stands beside the weights.
        open: (base, folder) -> a frozen model with the result that stands in a folder.
        merge: model -> a plain transformers model with the adapter folded in; None: there is no such model.
        result: model -> tensors that make up the result, or None if they are those of `state`.
        edits: adapter folder -> what `merge` does to each weight, see `methods.merging`; None: a model is needed.
    """

    name: str
    folder: str
    apply: Callable[[Base, MethodConfig], nn.Module]
    state: Callable[[nn.Module], Tensors]
    load_state: Callable[[nn.Module, Tensors], None]
    write_config: Callable[[nn.Module, Path, dict[str, Any]], None]
    open: Callable[[Base, Path], nn.Module]
    merge: Callable[[nn.Module], nn.Module] | None
    result: Callable[[nn.Module], Tensors | None] = lambda model: None
    edits: Callable[[Path], Edits | None] = no_edits

    @property
    def weights(self) -> str:
        """Name of the file that holds the result."""
        return WEIGHTS if self.folder == "adapter" else "model.safetensors"

    def save(self, model: nn.Module, folder: Path, facts: dict[str, Any], *, to_resume: bool = False) -> None:
        """Write the result into an existing folder.

        Args:
            facts: `base_model` (as the user named it) and `base_fingerprint`, recorded beside the weights.
            to_resume: besides what a resumed run needs, where the result is not enough.

        Raises:
            CheckpointError: a tensor is not finite; nothing non-finite is ever stored.
        """
        result = self.result(model)
        files = {self.weights: self.state(model) if result is None else result}
        if to_resume and result is not None:
            files[TRAINED] = self.state(model)
        ready = {name: _finite(tensors, folder) for name, tensors in files.items()}
        for name, tensors in ready.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone
        self.write_config(model, folder, facts)
        write_json(folder / FACTS, {"method": self.name, **facts})

    def load(self, model: nn.Module, folder: Path) -> None:
        """Copy stored weights into a model this method was applied to.

        Raises:
            CheckpointError: the file is missing or damaged, or its tensors are not those of the model.
        """
        file = folder / (self.weights if self.result(model) is None else TRAINED)
        tensors = read_tensors(file)
        check_tensors(file, tensors, self.state(model))
        self.load_state(model, tensors)


def _finite(tensors: Tensors, folder: Path) -> Tensors:
    ready: Tensors = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds values that are not finite; refusing to save it to {folder}")
        # safetensors stores no tensor twice; PEFT wants a tied one under both names.
        ready[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return ready


def read_tensors(file: Path) -> Tensors:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def check_tensors(file: Path, found: Tensors, needed: Tensors) -> None:
    """Refuse tensors of other names or shapes than the model's, and two that the model has as one."""
    expected = {name: tensor.shape for name, tensor in needed.items()}
    stored = {name: tensor.shape for name, tensor in found.items()}
    if expected == stored:
        names: dict[int, str] = {}
        for name, tensor in needed.items():
            first = names.setdefault(tensor.data_ptr(), name)
            if first != name and not torch.equal(found[first], found[name]):
                raise CheckpointError(f"{file}: {first} and {name} differ, but in this model they are one (tied)")
        return
    odd = sorted(name for name in expected | stored if expected.get(name) != stored.get(name))
    raise CheckpointError(
        f"{file}: does not fit this model and method: {len(odd)} tensors differ ({odd[0]}: stored "
        f"{_shape(stored, odd[0])}, needed {_shape(expected, odd[0])})"
    )


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"


def copy_into(named: Tensors, tensors: Tensors) -> None:
    """Copy tensors over parameters of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
