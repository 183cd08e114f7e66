"""What a run trains, as one vector, and its gradient as another.

Adam, clipping and the norm are then one kernel each, and gradients have static places that captured graphs add to.
The parameters become views of the vector: PEFT's adapters (fp32), or the biases of the model in its own dtype, whose
masters are the optimizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fitune.engine.spec import BlockSpec, Unsupported, base_of


class Trained:
    """All trained parameters.

    Args:
        parameters: of one dtype, in the order in which gradients shall stand; none if autograd adds up all gradients.
        device: of the parameters.
    Memory: 4 bytes per parameter for the gradients; the values move.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.parameters = list(parameters)
        values = [parameter.detach().flatten() for parameter in self.parameters]
        self.values = torch.cat(values) if values else torch.empty(0, device=device)
        self.gradients = torch.zeros(self.values.numel(), device=device)
        self._parts: dict[int, slice] = {}
        at = 0
        for parameter in self.parameters:
            part = slice(at, at + parameter.numel())
            parameter.data = self.values[part].view(parameter.shape)
            parameter.grad = None
            _set_gradient_dtype(parameter)
            self._parts[id(parameter)] = part
            at = part.stop
        self._views = [self.gradients[self._parts[id(p)]].view(p.shape) for p in self.parameters]
        self._places = [parameter.data_ptr() for parameter in self.parameters]

    def gradient(self, *parameters: Any) -> torch.Tensor | None:
        """Where the gradients of parameters that stand one after another are added up, fp32; None: not trained."""
        parts = [self._parts[id(p)] for p in parameters if id(p) in self._parts]
        if not parts:
            return None
        assert len(parts) == len(parameters), "some are trained and some not"
        assert all(a.stop == b.start for a, b in pairwise(parts)), "not one after another"
        return self.gradients[parts[0].start : parts[-1].stop]

    def claim(self) -> None:
        """The optimizer drops gradients between steps; ours are static, so they are zeroed and given back."""
        if [parameter.data_ptr() for parameter in self.parameters] != self._places:
            raise RuntimeError("trained parameters were moved after the engine was made; make a new EnginePath")
        fresh = [number for number, parameter in enumerate(self.parameters) if parameter.grad is None]
        if len(fresh) == len(self.parameters):
            self.gradients.zero_()
        for number in fresh:
            if len(fresh) < len(self.parameters):
                self._views[number].zero_()
            self.parameters[number].grad = self._views[number]


def _set_gradient_dtype(parameter: Any) -> None:
    """Sums over tokens are fp32 whatever the parameter's dtype."""
    parameter.grad_dtype = torch.float32


def trained_parameters(model: nn.Module, spec: BlockSpec) -> list[nn.Parameter]:
    """The parameters a model trains, group by group: all A of a group, then all B; or its biases.

    Raises:
        Unsupported: something is trained that is neither an adapter nor a bias of a block, the embedding norm or the
            final norm; a group in part; adapters and biases at once; parameters of several dtypes, or biases in
            another dtype than the model's.
    """
    base = base_of(model)
    sets = [[_bias(base, name)] for name in (spec.embedding_norm, spec.final_norm) if name]
    for layer in base.get_submodule(spec.layers):
        sets += [[_bias(layer, name)] for name in (spec.norm1, spec.norm2)]
        for paths in spec.names().values():
            wrapped = [module for path in paths if hasattr(module := layer.get_submodule(path), "lora_A")]
            for adapters in ("lora_A", "lora_B"):
                sets.append([linear.weight for module in wrapped for linear in getattr(module, adapters).values()])
            sets.append([_bias(layer, path) for path in paths])
            modules = [layer.get_submodule(path) for path in paths]
            sets += [[p] for module in modules for p in getattr(module, "ia3_l", {}).values()]
    found = []
    for parameters in sets:
        trained = [p for p in parameters if p is not None and p.requires_grad]
        if trained and len(trained) < len(parameters):
            raise Unsupported("trains some projections of one input and not all")
        found += trained
    _check(model, found)
    return found


def _bias(parent: Any, path: str) -> nn.Parameter | None:
    module = parent.get_submodule(path)
    bias: nn.Parameter | None = getattr(getattr(module, "base_layer", module), "bias", None)
    return bias


def _check(model: nn.Module, found: list[nn.Parameter]) -> None:
    known = {id(parameter) for parameter in found}
    adapters = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_adapter = any(kind in name for kind in (".lora_A.", ".lora_B.", ".ia3_l."))
        adapters.append(is_adapter)
        if id(parameter) not in known:
            where = (
                ", which is in no block" if is_adapter else "; the engine trains adapters, biases and virtual tokens"
            )
            raise Unsupported(f"trains {name}{where}")
    if len(set(adapters)) > 1:
        raise Unsupported("trains adapters and biases at once")
    if not adapters:
        raise Unsupported("trains nothing")
    dtypes = {parameter.dtype for parameter in found}
    if len(dtypes) > 1 or not (adapters[0] or dtypes == {base_of(model).get_input_embeddings().weight.dtype}):
        raise Unsupported(f"trains parameters in {', '.join(sorted(map(str, dtypes)))}")


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One vector that parts of one dtype are views of: of itself if they stand one after another, else a new one."""
    first = parts[0].detach()
    one_storage = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    ends = [part.storage_offset() + part.numel() for part in parts]
    if one_storage and [part.storage_offset() for part in parts[1:]] == ends[:-1]:
        return first.as_strided((sum(part.numel() for part in parts),), (1,))
    vector = torch.cat([part.detach() for part in parts])
    at = 0
    for part in parts:
        part.data = vector[at : at + part.numel()]
        at += part.numel()
    return vector
