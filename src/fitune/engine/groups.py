"""Projections that read the same input, and their LoRA adapters, as one matrix.

For a group of projections with weights W (outs, ins), adapter columns R, LoRA A (R, ins) and B (outs, R),
block-diagonal over the projections and holding the scale alpha / r:

    matrix = [[W, B],      forward:        [x | x Aᵀ] · [W | B]ᵀ        one GEMM over ins + R
              [A, .]]      input gradient: [dy | dy B] · [W ; A]        one GEMM over outs + R

so an adapter costs no second pass over any output. PEFT keeps the parameters (fp32); the matrix holds copies in the
model's dtype, refreshed at the start of every micro-step. Frozen weights become views of the matrix and stay in place
for the plain path; quantized ones are dequantized into one scratch matrix that all groups share.

Shapes: T tokens, K = ins, N = outs, R adapter columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.kernels.refresh import Copy


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair inside a group.

    Attributes:
        A, B: PEFT's parameters, (r, K) and (outputs of its projection, r).
        scale: alpha / r.
        rows: outputs of its projection within the group.
        columns: its place among the group's R adapter columns.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    rows: slice
    columns: slice


def adapter_columns(ranks: list[int]) -> int:
    """Columns R that adapters of these ranks take: their sum rounded up to 16, which keeps rows aligned to 16 bytes."""
    return -(-sum(ranks) // 16) * 16


class Scratch:
    """One matrix into which quantized groups are dequantized, one at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for a (rows, columns) matrix."""
        if rows * columns > self._flat.numel():
            self._flat = torch.empty(rows * columns, dtype=self._flat.dtype, device=self._flat.device)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """The first rows * columns elements as a matrix."""
        return self._flat[: rows * columns].view(rows, columns)


class Group:
    """A group of projections of one block.

    Args:
        modules: the projections, plain or wrapped by PEFT, in the order of their outputs.
        dtype: of activations and of the adapters' copies.
        scratch: where quantized weights are expanded.
    Memory: (N + R)(K + R) elements if not quantized, R(N + K) elements if quantized; 4 bytes per adapter gradient.
    """

    def __init__(self, modules: list[Any], dtype: torch.dtype, scratch: Scratch) -> None:
        self._linears = [getattr(module, "base_layer", module) for module in modules]
        self.ins = self._linears[0].in_features
        self.outs = sum(linear.out_features for linear in self._linears)
        self.adapters = _adapters(modules)
        self.trains = any(adapter.A.requires_grad for adapter in self.adapters)
        self.R = adapter_columns([adapter.A.shape[0] for adapter in self.adapters])
        self._scratch = scratch
        self.quantized = hasattr(self._linears[0], "dequantize_into")
        device = next(iter(self._linears[0].buffers() if self.quantized else self._linears[0].parameters())).device
        self.bias = self._gather_bias(dtype, device)
        self._gradients: list[torch.Tensor] = []
        if self.quantized:
            scratch.reserve(self.outs + self.R, self.ins + self.R)
            self.A_RK = torch.zeros(self.R, self.ins, dtype=dtype, device=device)
            self.B_NR = torch.zeros(self.outs, self.R, dtype=dtype, device=device)
        else:
            self._fused = self._fuse()
            self.A_RK = self._fused[self.outs :, : self.ins]
            self.B_NR = self._fused[: self.outs, self.ins :]

    def copies(self) -> list[Copy]:
        """What a refresh copies: the adapters' parameters into the matrix, B with the scale."""
        pairs = []
        for adapter in self.adapters:
            pairs.append(Copy(adapter.A.detach(), self.A_RK[adapter.columns], 1.0))
            pairs.append(Copy(adapter.B.detach(), self.B_NR[adapter.rows, adapter.columns], adapter.scale))
        return pairs

    def down_project(self, x_TKR: torch.Tensor) -> None:
        """Write x Aᵀ into the last R columns of the input buffer."""
        torch.mm(x_TKR[:, : self.ins], self.A_RK.t(), out=x_TKR[:, self.ins : self.ins + self.R])

    def forward(self, x_TKR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """out = [x | x Aᵀ] · [W | B]ᵀ (+ bias); `x_TKR` may be wider than K + R."""
        weight_NKR = self._matrix()[: self.outs]
        x_TKR = x_TKR[:, : self.ins + self.R]
        if self.bias is None:
            torch.mm(x_TKR, weight_NKR.t(), out=out_TN)
        else:
            torch.addmm(self.bias, x_TKR, weight_NKR.t(), out=out_TN)

    def input_gradient(self, dy_TNR: torch.Tensor, dx_TK: torch.Tensor) -> None:
        """dx = [dy | dy B] · [W ; A]; `dy_TNR` may be wider than N + R."""
        torch.mm(dy_TNR[:, : self.outs + self.R], self._matrix()[:, : self.ins], out=dx_TK)

    def up_project(self, dy_TNR: torch.Tensor) -> None:
        """Write dy B (the scale is in B) into the R columns after the outputs."""
        torch.mm(dy_TNR[:, : self.outs], self.B_NR, out=dy_TNR[:, self.outs : self.outs + self.R])

    def adapter_gradients(self, dy_TNR: torch.Tensor, h_TR: torch.Tensor, x_TK: torch.Tensor) -> None:
        """Accumulate dA += (dy B)ᵀ x and dB += scale dyᵀ h in fp32; `up_project` has been called on `dy_TNR`."""
        if not self._gradients:
            return
        dA_RK, *dBs = self._gradients
        _accumulate(dA_RK, dy_TNR[:, self.outs : self.outs + len(dA_RK)], x_TK, 1.0)
        for adapter, dB_Nr in zip(self.adapters, dBs, strict=True):
            _accumulate(dB_Nr, dy_TNR[:, adapter.rows], h_TR[:, adapter.columns], adapter.scale)

    def parameters(self) -> list[nn.Parameter]:
        """The trained adapters' parameters: all A in the order of their columns, then all B."""
        return [a.A for a in self.adapters] + [a.B for a in self.adapters] if self.trains else []

    def use_gradients(self, flat: torch.Tensor) -> None:
        """Accumulate gradients in this fp32 vector, laid out as `parameters` lists them."""
        if not self.trains:
            return
        rank = sum(adapter.A.shape[0] for adapter in self.adapters)
        self._gradients = [flat[: rank * self.ins].view(rank, self.ins)]  # all A at once: one product makes them
        at = rank * self.ins
        for adapter in self.adapters:
            self._gradients.append(flat[at : at + adapter.B.numel()].view(adapter.B.shape))
            at += adapter.B.numel()

    def _matrix(self) -> torch.Tensor:
        if not self.quantized:
            return self._fused
        matrix = self._scratch.matrix(self.outs + self.R, self.ins + self.R)
        row = 0
        for linear in self._linears:
            linear.dequantize_into(matrix[row : row + linear.out_features, : self.ins])
            row += linear.out_features
        if self.R:
            matrix[self.outs :, : self.ins].copy_(self.A_RK)
            matrix[: self.outs, self.ins :].copy_(self.B_NR)
        return matrix

    def _fuse(self) -> torch.Tensor:
        """Move the weights into one matrix and make the modules' weights views of it."""
        first = self._linears[0].weight
        if len(self._linears) == 1 and not self.R:
            return first.detach()
        fused = torch.zeros(self.outs + self.R, self.ins + self.R, dtype=first.dtype, device=first.device)
        row = 0
        for linear in self._linears:
            view_NK = fused[row : row + linear.out_features, : self.ins]
            view_NK.copy_(linear.weight.detach())
            linear.weight.data = view_NK
            row += linear.out_features
        return fused

    def _gather_bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        if all(linear.bias is None for linear in self._linears):
            return None
        parts = [
            torch.zeros(linear.out_features, dtype=dtype, device=device)
            if linear.bias is None
            else linear.bias.detach()
            for linear in self._linears
        ]
        return torch.cat(parts).to(dtype)


def _adapters(modules: list[Any]) -> list[Adapter]:
    found = []
    row = column = 0
    for module in modules:
        outputs = getattr(module, "base_layer", module).out_features
        if hasattr(module, "lora_A"):
            (name,) = module.lora_A
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
            columns = slice(column, column + A.shape[0])
            found.append(Adapter(A, B, float(module.scaling[name]), slice(row, row + outputs), columns))
            column += A.shape[0]
        row += outputs
    return found


def _accumulate(into: torch.Tensor, a_Tm: torch.Tensor, b_Tn: torch.Tensor, scale: float) -> None:
    """into (m, n) fp32 += scale * aᵀ b."""
    if a_Tm.dtype == torch.float32:
        into.addmm_(a_Tm.t(), b_Tn, alpha=scale)
    elif a_Tm.is_cuda:
        torch.addmm(into, a_Tm.t(), b_Tn, out_dtype=torch.float32, alpha=scale, out=into)
    else:  # no 16-bit product with an fp32 result on CPU
        into.addmm_(a_Tm.t().float(), b_Tn.float(), alpha=scale)
