"""Final norm, output head and cross-entropy on supervised positions, in chunks, with the input gradient made at once.

Logits exist for one chunk of M rows in the model's dtype; the loss kernel turns them into their own gradient in place,
so no probability and no fp32 copy is ever stored (the head is frozen: nothing else needs them).
"""

from __future__ import annotations

from typing import Any

import torch

from fitune.kernels.cross_entropy import cross_entropy_, loss_only
from fitune.kernels.norm import Norm, add_norm, norm_backward
from fitune.kernels.rows import scatter_rows
from fitune.kernels.sums import add_column_sums
from fitune.plan.saves import head_rows, padded_vocabulary


class Head:
    """The end of a causal model.

    Args:
        norm: the final norm.
        linear: the output head (frozen, not quantized).
        dbias_H: where the gradient of the norm's bias is added up; None: it is not trained.
    Memory: `plan.saves.head_bytes`.
    """

    def __init__(self, norm: Norm, linear: Any, dbias_H: torch.Tensor | None) -> None:
        self._norm, self._dbias_H = norm, dbias_H
        self._weight_VH = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()
        vocabulary, hidden = self._weight_VH.shape
        dtype, device = self._weight_VH.dtype, self._weight_VH.device
        self.rows = head_rows(vocabulary, dtype.itemsize)
        # Products are fast if rows start on 16 bytes and all sizes are multiples of 8. What an odd vocabulary (46,145
        # of bloom-1b4-zh) has beyond that is a product of its own, of a few columns.
        width, even = padded_vocabulary(vocabulary), vocabulary - vocabulary % 8
        self._parts = [slice(0, even), slice(even, vocabulary)] if 0 < even < vocabulary else [slice(0, vocabulary)]
        # Zeros: a product of three columns in bf16 reads a fourth on CPUs, and NaN times nothing is NaN.
        self._logits_MV = torch.zeros(self.rows, width, dtype=dtype, device=device)[:, :vocabulary]
        self._x_MH, self._y_MH, self._d_MH = (torch.empty(self.rows, hidden, dtype=dtype, device=device) for _ in "xyd")
        self._rstd_M, self._loss_M = (torch.empty(self.rows, device=device) for _ in "rl")
        self._mean_M = None if norm.bias_H is None else torch.empty(self.rows, device=device)

    def chunk(
        self,
        final_TH: torch.Tensor,
        index_M: torch.Tensor,
        targets_M: torch.Tensor,
        loss_sum: torch.Tensor,
        gradient: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Loss of up to `rows` positions, added to `loss_sum`; their gradient into rows of `d`.

        Args:
            final_TH: output of the last block.
            index_M: which rows; may repeat a spare row where targets_M is -100.
            gradient: (scale, d_TH): fp32 scalar that multiplies all gradients, and where they go. None: loss only.
        """
        m = index_M.shape[0]
        x, y, d, logits = self._x_MH[:m], self._y_MH[:m], self._d_MH[:m], self._logits_MV[:m]
        rstd, loss = self._rstd_M[:m], self._loss_M[:m]
        mean = None if self._mean_M is None else self._mean_M[:m]
        torch.index_select(final_TH, 0, index_M, out=x)
        add_norm(x, None, self._norm, None, y, rstd, mean)
        for part in self._parts:
            if self._bias is None:
                torch.mm(y, self._weight_VH[part].t(), out=logits[:, part])
            else:
                torch.addmm(self._bias[part], y, self._weight_VH[part].t(), out=logits[:, part])
        if gradient is None:
            loss_only(logits, targets_M, loss)
            loss_sum.add_(loss.sum())
            return
        scale, d_TH = gradient
        cross_entropy_(logits, targets_M, scale, loss)
        loss_sum.add_(loss.sum())
        for number, part in enumerate(self._parts):  # the first of them writes, a second one adds
            torch.addmm(y, logits[:, part], self._weight_VH[part], beta=min(number, 1), out=y)
        if self._dbias_H is not None:
            add_column_sums(y, 1.0, self._dbias_H)
        d.zero_()
        norm_backward(y, x, self._norm, rstd, mean, d, None)
        scatter_rows(d, index_M, d_TH)
