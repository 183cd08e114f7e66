"""Projections that read the same input, with their LoRA adapters and biases.

A group has R adapter columns: the ranks of its adapters one after another, rounded up. B is block-diagonal over the
group's outputs and holds the scale alpha / r, so everywhere else an adapter is two products without a factor. PEFT
keeps the parameters (fp32); the products use copies in the model's dtype, refreshed at the start of every micro-step.
The biases of a group are one vector that the layers' own are views of.

Shapes: T tokens, K = ins, N = outs, R adapter columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.engine.buffers import carve
from fitune.engine.products import Expanded, Fused, Product, RowsFp8, Scratch
from fitune.engine.segments import Segment
from fitune.engine.spec import Unsupported
from fitune.engine.trained import Trained, joined
from fitune.kernels.dropout import Mask, drop, drop_add
from fitune.kernels.refresh import Copy
from fitune.kernels.sums import add_column_sums
from fitune.kernels.swiglu import MOST_ADDED, Added


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


class Group:
    """A group of projections of one block.

    Args:
        modules: the projections, plain or wrapped by PEFT, in the order of their outputs.
        dtype: of activations and of the adapters' copies.
        scratch: memory that products of quantized groups share.
        trained: where gradients are added up.
        added_later: what reads the outputs takes `left_out`, so fp8 products, whose adapters cost a pass over all
            outputs, may leave them out.
    Raises:
        Unsupported: the projections are stored in different ways.
    Memory: see `engine.products` for the weights.
    """

    def __init__(
        self, modules: list[Any], dtype: torch.dtype, scratch: Scratch, trained: Trained, added_later: bool = False
    ) -> None:
        linears = [getattr(module, "base_layer", module) for module in modules]
        self.ins: int = linears[0].in_features
        self.outs = sum(linear.out_features for linear in linears)
        self.adapters = _adapters(modules)
        self.R = adapter_columns([adapter.A.shape[0] for adapter in self.adapters])
        stored = {getattr(linear, "quantization", "none") for linear in linears}
        if len(stored) > 1:  # a bitsandbytes folder may leave some layers of a block in 16 bits
            raise Unsupported(f"projections of one input stored as {' and '.join(sorted(stored))}")
        self.quantization: str = stored.pop()
        self.mask: Mask | None = None  # of the adapters' common input
        self._dA = trained.gradient(*(adapter.A for adapter in self.adapters))  # of all A at once
        self._dBs = [trained.gradient(adapter.B) for adapter in self.adapters]
        self._dbias_N = trained.gradient(*(linear.bias for linear in linears))
        self.trains = self._dA is not None or self._dbias_N is not None
        self._leaves_out = added_later and self.quantization == "fp8" and 0 < self.R <= MOST_ADDED
        self._product = _product(self.quantization, linears, self.R, dtype, scratch)

    @property
    def needs_gradient(self) -> bool:
        """The gradient of this group's output is wanted for itself; adapters that are frozen count as well."""
        return bool(self.R) or self.trains

    def copies(self) -> list[Copy]:
        """What a refresh copies: the adapters' parameters, B with the scale."""
        pairs = []
        for adapter in self.adapters:
            pairs.append(Copy(adapter.A.detach(), self._product.A_RK[adapter.columns], 1.0))
            to_Nr = self._product.B_NR[adapter.rows, adapter.columns]
            pairs.append(Copy(adapter.B.detach(), to_Nr, adapter.scale))
        return pairs

    def down_project(self, x_TK: torch.Tensor, h_TR: torch.Tensor, spare: torch.Tensor | None) -> None:
        """h = dropout(x) Aᵀ; dropout(x) is written into `spare` (T, K or more; None without dropout)."""
        torch.mm(self._drop(x_TK, spare), self._product.A_RK.t(), out=h_TR)

    def forward(self, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """out = x Wᵀ + h Bᵀ + bias, without what is `left_out`."""
        self._product.forward(x_TK, h_TR[:, :0] if self._leaves_out else h_TR, out_TN)

    def left_out(self, h_TR: torch.Tensor | None) -> Added | None:
        """What `forward` did not add: h Bᵀ, to be added by whatever reads its output; None: nothing.

        Args:
            h_TR: (T, R or more) what `forward` got, or a copy of it; None: the group has no adapters.
        """
        if not self._leaves_out:
            return None
        assert h_TR is not None, "adapters without their columns"
        return Added(h_TR[:, : self.R], self._product.B_NR)

    def up_project(self, dy_TN: torch.Tensor, t_TR: torch.Tensor) -> None:
        """t = dy B."""
        torch.mm(dy_TN, self._product.B_NR, out=t_TR)

    def input_gradient(
        self,
        dy_TN: torch.Tensor,
        t_TR: torch.Tensor,
        dx_TK: torch.Tensor,
        spare: torch.Tensor | None,
        expanded: bool = False,
    ) -> None:
        """dx = dy W + dropout(t A); t A is written into `spare` if there is dropout, which keeps it out of the GEMM.

        Args:
            expanded: no other group has multiplied since this one did.
        """
        if self.mask is None:
            self._product.input_gradient(dy_TN, t_TR, dx_TK, expanded)
            return
        assert spare is not None, "dropout without a buffer"
        tA_TK = carve(spare, 0, self.ins)
        self._product.input_gradient(dy_TN, t_TR[:, :0], dx_TK, expanded)
        torch.mm(t_TR, self._product.A_RK, out=tA_TK)
        drop_add(tA_TK, self.mask, dx_TK)

    def adapter_gradients(
        self,
        dy_TN: torch.Tensor,
        t_TR: torch.Tensor,
        h_TR: torch.Tensor,
        x_TK: torch.Tensor,
        spare: torch.Tensor | None,
    ) -> None:
        """Accumulate dA += tᵀ dropout(x) and dB += scale dyᵀ h in fp32."""
        if self._dA is None:
            return
        x_TK = self._drop(x_TK, spare)
        dA_rK = self._dA.view(-1, self.ins)
        _accumulate(dA_rK, t_TR[:, : len(dA_rK)], x_TK, 1.0)
        for adapter, dB in zip(self.adapters, self._dBs, strict=True):
            assert dB is not None, "an adapter is trained in part"
            dB_Nr = dB.view(adapter.B.shape)
            _accumulate(dB_Nr, dy_TN[:, adapter.rows], h_TR[:, adapter.columns], adapter.scale)

    def bias_gradient(self, dy_TN: torch.Tensor) -> None:
        """Accumulate the biases' gradient, the sum of dy over tokens, if they are trained."""
        if self._dbias_N is not None:
            add_column_sums(dy_TN, 1.0, self._dbias_N)

    def _drop(self, x_TK: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
        if self.mask is None:
            return x_TK
        assert spare is not None, "dropout without a buffer"
        out_TK = carve(spare, 0, self.ins)
        drop(x_TK, self.mask, out_TK)
        return out_TK


def settle(groups: list[Group]) -> None:
    """Lay the weights of a block's groups side by side into one segment, but for those in 4 bits.

    Memory: these weights twice meanwhile; afterwards their former places are free.
    """
    held: list[torch.Tensor] = []

    def found(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    for group in groups:
        group._product.move(found)  # to where it is
    if held:
        segment = Segment([tensor.nbytes for tensor in held], held[0].device)
        for group in groups:
            group._product.move(segment.copy)


def _product(quantization: str, linears: list[Any], R: int, dtype: torch.dtype, scratch: Scratch) -> Product:
    bias_N = _bias(linears, dtype)
    if quantization == "none":
        return Fused(linears, R, bias_N)
    if quantization == "fp8":
        return RowsFp8(linears, R, bias_N, scratch)
    return Expanded(linears, R, bias_N, scratch)


def _bias(linears: list[Any], dtype: torch.dtype) -> torch.Tensor | None:
    """The biases of a group as one vector, zeros where a layer has none; the layers' own become views of it."""
    biases = [linear.bias for linear in linears]
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return None
    parts = [
        torch.zeros(linear.out_features, dtype=known.dtype, device=known.device) if bias is None else bias
        for linear, bias in zip(linears, biases, strict=True)
    ]
    return joined(parts).to(dtype)


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


def _accumulate(into_mn: torch.Tensor, a_Tm: torch.Tensor, b_Tn: torch.Tensor, scale: float) -> None:
    """into (fp32) += scale * aᵀ b."""
    if a_Tm.dtype == torch.float32:
        into_mn.addmm_(a_Tm.t(), b_Tn, alpha=scale)
    elif a_Tm.is_cuda:
        torch.addmm(into_mn, a_Tm.t(), b_Tn, out_dtype=torch.float32, alpha=scale, out=into_mn)
    else:  # no 16-bit product with an fp32 result on CPU
        into_mn.addmm_(a_Tm.t().float(), b_Tn.float(), alpha=scale)
