"""AdamW on master weights, learning-rate schedules, loss scaling.

Three dtypes, kept apart: parameters are stored as the model has them; masters and Adam's states in
train.optimizer_dtype (fp32 unless asked); gradients are accumulated in the masters' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.config import TrainConfig
from fitune.errors import CheckpointError, MissingDependencyError
from fitune.model.libraries import import_bitsandbytes

Vectors = tuple[torch.Tensor, torch.Tensor, list[nn.Parameter]]
MASTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MasterOptimizer:
    """AdamW over master copies of the trainable parameters.

    A parameter that already has the masters' dtype is its own master. For the others every gradient is moved to
    the master as soon as autograd has finished it, so that micro batches accumulate in fp32 and no second set of
    16-bit gradients stays alive.

    Args:
        parameters: trainable parameters by name.
        config: optimizer, its dtype, betas, epsilon, weight decay.
        vectors: where a path keeps all parameters, and all their gradients in fp32, in one vector each: values,
            gradients, and the parameters in their order. Adam then updates one tensor instead of looping over hundreds
            of small ones.
        rates: what the learning rate of a parameter is multiplied with, by name; 1 for those not named. Parameters
            with different rates are always updated apart.
    Memory: 12 bytes per trainable parameter in fp32 (master or parameter, two states), 16 with its gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        vectors: Vectors | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        dtype = MASTER_DTYPES[config.optimizer_dtype]
        rates = rates or {}
        self.parameters = dict(parameters)
        self.masters: dict[str, nn.Parameter] = {}
        self._vector = None if rates else _vector(self.parameters, config, vectors)
        if self._vector is not None:
            self.masters = self._vector.masters(self.parameters)
            self._adam = _build_adam([_group([self._vector.values])], config)
            return
        for name, parameter in self.parameters.items():
            if parameter.dtype == dtype == _gradient_dtype(parameter):
                self.masters[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().to(dtype))  # the same memory if only the gradient differs
            parameter.register_post_accumulate_grad_hook(_moves_gradient_to(master))  # type: ignore[no-untyped-call]
            self.masters[name] = master
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            by_rate.setdefault(rates.get(name, 1.0), []).append(master)
        self._adam = _build_adam([_group(masters, rate) for rate, masters in by_rate.items()], config)

    def gradients(self) -> list[torch.Tensor]:
        """Accumulated gradients of all masters that have one.

        The engine adds to the parameters' own gradients without autograd, so no hook has moved those.
        """
        if self._vector is not None:
            return [self._vector.gradient]
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def step(self, learning_rate: float) -> None:
        """Update masters, then the parameters they stand for."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["rate"]
        if self._vector is not None:
            self._vector.values.grad = self._vector.gradient
        self._adam.step()
        with torch.no_grad():
            if self._vector is not None:
                self._vector.hand_over()
                return
            for name, master in self.masters.items():
                if not self._is_own(name):
                    self.parameters[name].copy_(master)

    def _is_own(self, name: str) -> bool:
        """A parameter's master is its own memory."""
        return self.masters[name].data_ptr() == self.parameters[name].data_ptr()

    def zero(self) -> None:
        """Drop all gradients, or set them to zero where they are one vector of the path's."""
        if self._vector is not None:
            self._vector.gradient.zero_()
            return
        for tensor in (*self.masters.values(), *self.parameters.values()):
            tensor.grad = None  # a path that owns the gradients sees this and starts anew

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs, as tensors: `name/exp_avg`, `name/step`, `name/master`, ..."""
        tensors: dict[str, torch.Tensor] = {}
        states = self._adam.state
        for name, master in self.masters.items():
            if not self._is_own(name):
                tensors[f"{name}/master"] = master.detach()
            own = states.get(master, {}) if self._vector is None else self._vector.state_of(name, states)
            for key, value in own.items():
                tensors[f"{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            CheckpointError: tensors belong to other parameters.
        """
        by_name: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.masters}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            if name not in by_name:
                raise CheckpointError(f"optimizer state for {name!r}, which this run does not train")
            by_name[name][part] = tensor
        with torch.no_grad():
            for name, parts in by_name.items():
                master = self.masters[name]
                stored = parts.pop("master", None)
                if (stored is None) != self._is_own(name):
                    raise CheckpointError(f"optimizer state of {name!r} has another dtype than train.optimizer_dtype")
                if stored is not None:
                    master.copy_(stored)
                    self.parameters[name].copy_(master)
                if self._vector is None:
                    self._adam.state[master] = _restored(parts, master)
        if self._vector is not None:
            self._adam.state[self._vector.values] = self._vector.joined(by_name)


@dataclass(frozen=True)
class _Vector:
    """All masters as one vector: their values, the gradients, the path's own values, and which part is whose."""

    values: nn.Parameter
    gradient: torch.Tensor
    own: torch.Tensor
    parts: dict[str, slice]
    shapes: dict[str, torch.Size]

    def masters(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The parameters themselves, or parts of a vector of another dtype."""
        if self.own.dtype == self.values.dtype:
            return parameters
        whole = self.values.detach()
        return {name: nn.Parameter(whole[self.parts[name]].view(self.shapes[name])) for name in parameters}

    def hand_over(self) -> None:
        """After an update of the masters: the path's parameters follow."""
        if self.own.dtype != self.values.dtype:
            self.own.copy_(self.values)

    def state_of(self, name: str, states: Mapping[Any, dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One parameter's share of Adam's state."""
        state = states.get(self.values, {})
        part, shape = self.parts[name], self.shapes[name]
        return {key: value[part].view(shape) if value.dim() else value for key, value in state.items()}

    def joined(self, by_name: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Adam's state of the vector from that of each parameter."""
        state: dict[str, torch.Tensor] = {}
        for name, parts in by_name.items():
            for key, value in parts.items():
                if value.dim():
                    state.setdefault(key, torch.zeros_like(self.values.detach()))[self.parts[name]] = value.flatten()
                else:
                    state[key] = value.to(self.values.device)
        return state


def _vector(
    parameters: Mapping[str, nn.Parameter],
    config: TrainConfig,
    vectors: Vectors | None,
) -> _Vector | None:
    """The whole of the parameters as one tensor; None where they have to be updated apart."""
    if vectors is None or config.optimizer != "adamw" or config.optimizer_dtype != "fp32":
        return None
    values, gradient, order = vectors
    names = {id(parameter): name for name, parameter in parameters.items()}
    if {id(parameter) for parameter in order} != set(names):
        return None
    parts, at = {}, 0
    for parameter in order:
        part = slice(at, at + parameter.numel())
        parts[names[id(parameter)]] = part
        at = part.stop
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return _Vector(nn.Parameter(values.float()), gradient, values, parts, shapes)  # the same memory if it is fp32


def _gradient_dtype(parameter: Any) -> torch.dtype:
    """What .grad of a parameter is kept in; a path may sum gradients of 16-bit parameters in fp32."""
    return parameter.grad_dtype or parameter.dtype  # type: ignore[no-any-return]


def _restored(parts: Mapping[str, torch.Tensor], master: nn.Parameter) -> dict[str, Any]:
    # Fused Adam keeps its step counter on the parameter's device; bitsandbytes keeps a Python int.
    state: dict[str, Any] = {key: value.to(master.device) for key, value in parts.items()}
    if "state1" in state and "step" in state:
        state["step"] = int(state["step"])
    return state


def _moves_gradient_to(master: nn.Parameter) -> Any:
    def move(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move


def _group(masters: list[nn.Parameter], rate: float = 1.0) -> dict[str, Any]:
    return {"params": masters, "rate": rate}


def _build_adam(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        bitsandbytes = import_bitsandbytes()
    except ImportError as error:
        raise MissingDependencyError(
            "train.optimizer=adamw8bit needs bitsandbytes: pip install 'bitsandbytes>=0.50,<0.51', or use "
            "train.optimizer=adamw"
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)  # type: ignore[no-any-return]


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `total_steps`."""
    peak = config.learning_rate
    assert peak is not None, "resolved"
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return peak * (1 - progress)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 arithmetic (arXiv:1710.03740); stays 1 for other dtypes.

    On overflow the step is computed again with half the scale instead of being lost: its randomness is a function
    of the step, so only the scale differs.
    """

    scale: float
    good_steps: int = 0
    growth_interval: int = 1000

    @classmethod
    def for_dtype(cls, dtype: str) -> LossScale:
        """65,536 for fp16, 1 otherwise."""
        return cls(2.0**16 if dtype == "fp16" else 1.0)

    def can_shrink(self) -> bool:
        """True while a smaller scale could still help."""
        return self.scale > 1

    def shrink(self) -> None:
        """After an overflow."""
        self.scale, self.good_steps = max(1.0, self.scale / 2), 0

    def grew_after_step(self, enabled: bool) -> None:
        """After an applied step; doubles every `growth_interval` of them when `enabled`."""
        self.good_steps += 1
        if enabled and self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = min(self.scale * 2, 2.0**24), 0
