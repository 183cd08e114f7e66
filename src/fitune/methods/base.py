"""The contract of a method, and the one way an adapter folder is written and read."""

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
from fitune.model.load import Base

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FACTS = "fitune.json"  # ours stand apart: PEFT warns about keys it does not know


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: `method.name`.
        folder: where a run keeps the result: `adapter` (needs the base model) or `model` (stands alone).
        apply: (base, config) -> model whose trainable parameters have requires_grad.
        state: model -> tensors that make up the result, by the names of its file format.
        load_state: (model, tensors) copies such tensors into an applied model, strictly.
        write_config: (model, folder, facts) writes what stands beside the weights.
        merge: model -> a plain transformers model with the adapter folded in.
        edits: adapter folder -> what `merge` does to each weight, see `methods.merging`; None: a model is needed.
    """

    name: str
    folder: str
    apply: Callable[[Base, MethodConfig], nn.Module]
    state: Callable[[nn.Module], dict[str, torch.Tensor]]
    load_state: Callable[[nn.Module, dict[str, torch.Tensor]], None]
    write_config: Callable[[nn.Module, Path, dict[str, Any]], None]
    merge: Callable[[nn.Module], nn.Module]
    edits: Callable[[Path], Edits | None] = no_edits

    def save(self, model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        """Write weights and configuration into an existing folder.

        Args:
            facts: `base_model` (as the user named it) and `base_fingerprint`, recorded beside the weights.

        Raises:
            CheckpointError: a tensor is not finite; nothing non-finite is ever stored.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state(model).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name} holds values that are not finite; refusing to save it to {folder}")
        weights = WEIGHTS if self.folder == "adapter" else "model.safetensors"
        save_file(tensors, folder / weights, metadata={"format": "pt"})
        (folder / weights).chmod(0o644)  # safetensors makes it readable by its owner alone
        self.write_config(model, folder, facts)
        write_json(folder / FACTS, {"method": self.name, **facts})

    def load(self, model: nn.Module, folder: Path) -> None:
        """Copy stored weights into a model this method was applied to.

        Raises:
            CheckpointError: the file is damaged, or its tensors are not those of the model.
        """
        file = folder / (WEIGHTS if self.folder == "adapter" else "model.safetensors")
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        expected = {name: tensor.shape for name, tensor in self.state(model).items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if expected != found:
            odd = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise CheckpointError(
                f"{file}: does not fit this model and method: {len(odd)} tensors differ ({odd[0]}: stored "
                f"{_shape(found, odd[0])}, needed {_shape(expected, odd[0])})"
            )
        self.load_state(model, tensors)


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"


def copy_into(named: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
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
