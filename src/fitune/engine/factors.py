"""IA3's factors (arXiv:2205.05638): y = l (W x + b) for queries, keys and values, y = W (l x) + b for the MLP's last.

Products go on with a scaled copy, in a buffer that all blocks share; what the factors multiplied stays as it was, so
their gradient, the sum of dy y over tokens, needs no division and no factor may not be zero. The copy is made again in
the backward pass: one elementwise pass instead of kept memory.

Shapes: T tokens, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fitune.engine.spec import Unsupported
from fitune.engine.trained import Trained
from fitune.kernels.sums import add_column_sums


@dataclass(frozen=True)
class Factor:
    """Factors of some columns: PEFT's own values (fp32), where their gradient is added up if they are trained."""

    columns: slice
    l_n: torch.Tensor
    dl_n: torch.Tensor | None


@dataclass(frozen=True)
class Factors:
    """The factors of a group's outputs, or of its input."""

    parts: tuple[Factor, ...]

    @property
    def trains(self) -> bool:
        """Some are trained."""
        return any(part.dl_n is not None for part in self.parts)

    def scale(self, y_TN: torch.Tensor, out_TN: torch.Tensor) -> torch.Tensor:
        """out = l y, rounded once; columns without factors are copied. Returns out."""
        if sum(part.l_n.numel() for part in self.parts) < y_TN.shape[1]:
            out_TN.copy_(y_TN)
        for part in self.parts:
            torch.mul(y_TN[:, part.columns], part.l_n, out=out_TN[:, part.columns])
        return out_TN

    def backward(self, dy_TN: torch.Tensor, y_TN: torch.Tensor) -> None:
        """Gradient of l y in, of y out, in place; that of l is added up.

        Args:
            y_TN: before it was scaled.
        """
        for part in self.parts:
            dy_Tn = dy_TN[:, part.columns]
            if part.dl_n is not None:
                add_column_sums(dy_Tn, 1.0, part.dl_n, times_TN=y_TN[:, part.columns])
            dy_Tn.mul_(part.l_n)


def output_factors(modules: Sequence[Any], trained: Trained) -> Factors | None:
    """Factors of the outputs of a group of projections; None if there are none.

    Raises:
        Unsupported: some scale the input.
    """
    parts, row = [], 0
    for module in modules:
        outputs: int = getattr(module, "base_layer", module).out_features
        if hasattr(module, "ia3_l"):
            if module.is_feedforward:
                raise Unsupported("IA3's factors on the input of queries, keys or values")
            parts.append(_factor(module, slice(row, row + outputs), trained))
        row += outputs
    return Factors(tuple(parts)) if parts else None


def input_factors(module: Any, trained: Trained) -> Factors | None:
    """Factors of the input of the MLP's last projection; None if there are none.

    Raises:
        Unsupported: they scale its output.
    """
    if not hasattr(module, "ia3_l"):
        return None
    if not module.is_feedforward:
        raise Unsupported("IA3's factors on the output of the MLP's last projection")
    return Factors((_factor(module, slice(0, module.in_features), trained),))


def refuse_factors(modules: Sequence[Any]) -> None:
    """Where the engine has no factors.

    Raises:
        Unsupported: there are some.
    """
    if any(hasattr(module, "ia3_l") for module in modules):
        raise Unsupported("IA3's factors on other layers than queries, keys, values and the MLP's last")


def _factor(module: Any, columns: slice, trained: Trained) -> Factor:
    if len(module.ia3_l) != 1:
        raise Unsupported(f"{len(module.ia3_l)} adapters on one layer")
    (parameter,) = module.ia3_l.values()
    return Factor(columns, parameter.detach().view(-1), trained.gradient(parameter))
