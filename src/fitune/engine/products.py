"""The three ways a group of frozen projections multiplies, adapters included.

`Fused`: for weights W (N, K), adapters A (R, K) and B (N, R),

    matrix = [[W, B],      forward:        [x | x Aᵀ] · [W | B]ᵀ        one GEMM over K + R
              [A, .]]      input gradient: [dy | dy B] · [W ; A]        one GEMM over N + R

so an adapter costs no second pass over any output. The frozen weights become views of the matrix and stay in place for
the plain path. `Expanded`: the same matrix, made from 8- or 4-bit weights in one scratch that all groups share, for
each product. `RowsFp8`: rows of x (or dy) and of W as fp8 codes with a scale each; the adapter is a second, thin
product, since in fp8 it would lose what it learns.

Shapes: T tokens, K inputs, N outputs, R adapter columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fitune.kernels.fp8 import E4M3, multiply_rows_into, quantize_rows, transpose_codes


class Product(Protocol):
    """Products of one group. A_RK and B_NR (B with the scale) are the adapters' copies in the model's dtype."""

    A_RK: torch.Tensor
    B_NR: torch.Tensor

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all it holds by copies, of which the layers' own weights become views."""

    def forward(self, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """out = x Wᵀ + h Bᵀ + bias. `RowsFp8` leaves h Bᵀ out if h has no columns."""

    def input_gradient(self, dy_TN: torch.Tensor, t_TR: torch.Tensor, dx_TK: torch.Tensor, expanded: bool) -> None:
        """dx = dy W + t A, or dx = dy W if t has no columns.

        Args:
            expanded: the last product of all groups was this one's forward, whose expanded weights still stand.
        """


class Scratch:
    """Memory that all groups share, one product at a time: an expanded matrix, transposed codes, codes of rows."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)
        self.rows: tuple[torch.Tensor, torch.Tensor] | None = None  # where codes of rows and their scales go
        self.holder: Expanded | None = None  # whose weights are expanded

    def reserve(self, size: int, dtype: torch.dtype) -> None:
        """Make room for `size` elements of `dtype`."""
        if size * dtype.itemsize > self._flat.numel() * self._flat.element_size():
            self._flat = torch.empty(size, dtype=dtype, device=self._flat.device)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A (rows, columns) matrix in it."""
        return self._flat.view(torch.uint8)[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    @property
    def bytes(self) -> int:
        """Size of the shared matrix."""
        return self._flat.numel() * self._flat.element_size()


class Fused:
    """One matrix of (N + R)(K + R) elements; h stands beside x, t beside dy."""

    def __init__(self, linears: list[Any], R: int, bias_N: torch.Tensor | None) -> None:
        self._linears, self._bias_N = linears, bias_N
        self._N, self._K = sum(linear.out_features for linear in linears), linears[0].in_features
        self._matrix = self._fuse(R)
        self._share()

    def _fuse(self, R: int) -> torch.Tensor:
        first = self._linears[0].weight
        if len(self._linears) == 1 and not R:
            return first.detach()  # type: ignore[no-any-return]
        matrix = torch.zeros(self._N + R, self._K + R, dtype=first.dtype, device=first.device)
        row = 0
        for linear in self._linears:
            matrix[row : row + linear.out_features, : self._K].copy_(linear.weight.detach())
            row += linear.out_features
        return matrix

    def _share(self) -> None:
        """Make A, B and the layers' weights views of the matrix."""
        self.A_RK, self.B_NR = self._matrix[self._N :, : self._K], self._matrix[: self._N, self._K :]
        row = 0
        for linear in self._linears:
            linear.weight.data = self._matrix[row : row + linear.out_features, : self._K]
            row += linear.out_features

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Product`."""
        self._matrix = copy(self._matrix)
        self._share()

    def forward(self, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """See `Product`."""
        forward_beside(self._matrix[: self._N], x_TK, h_TR, out_TN, self._bias_N)

    def input_gradient(self, dy_TN: torch.Tensor, t_TR: torch.Tensor, dx_TK: torch.Tensor, expanded: bool) -> None:
        """See `Product`."""
        torch.mm(beside(dy_TN, t_TR), self._matrix[: self._N + t_TR.shape[1], : self._K], out=dx_TK)


class Expanded:
    """Weights of 8 or 4 bits, expanded into the scratch for each product; h stands beside x, t beside dy."""

    def __init__(self, linears: list[Any], R: int, bias_N: torch.Tensor | None, scratch: Scratch) -> None:
        self._linears, self._bias_N, self._scratch = linears, bias_N, scratch
        self._N, self._K, self._R = sum(linear.out_features for linear in linears), linears[0].in_features, R
        self._dtype, device = linears[0].dtype, linears[0].codes.device
        scratch.reserve((self._N + R) * (self._K + R), self._dtype)
        self.A_RK = torch.zeros(R, self._K, dtype=self._dtype, device=device)
        self.B_NR = torch.zeros(self._N, R, dtype=self._dtype, device=device)

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Product`. Weights in 4 bits stay as loaded: of a block of 30 MB the end of a segment could be 2."""
        if self._linears[0].quantization == "int8":
            self.A_RK, self.B_NR = copy(self.A_RK), copy(self.B_NR)
            for linear in self._linears:
                linear.codes, linear.scale = copy(linear.codes), copy(linear.scale)

    def _matrix(self, expanded: bool) -> torch.Tensor:
        matrix = self._scratch.matrix(self._N + self._R, self._K + self._R, self._dtype)
        if expanded:
            assert self._scratch.holder is self, "another group was expanded since"
            return matrix
        self._scratch.holder = self
        row = 0
        for linear in self._linears:
            linear.dequantize_into(matrix[row : row + linear.out_features, : self._K])
            row += linear.out_features
        if self._R:
            matrix[self._N :, : self._K].copy_(self.A_RK)
            matrix[: self._N, self._K :].copy_(self.B_NR)
        return matrix

    def forward(self, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """See `Product`."""
        forward_beside(self._matrix(False)[: self._N], x_TK, h_TR, out_TN, self._bias_N)

    def input_gradient(self, dy_TN: torch.Tensor, t_TR: torch.Tensor, dx_TK: torch.Tensor, expanded: bool) -> None:
        """See `Product`."""
        torch.mm(beside(dy_TN, t_TR), self._matrix(expanded)[: self._N + t_TR.shape[1], : self._K], out=dx_TK)


class RowsFp8:
    """Rows of fp8 codes on both sides; outputs must be contiguous. The layers' codes become views of one matrix."""

    def __init__(self, linears: list[Any], R: int, bias_N: torch.Tensor | None, scratch: Scratch) -> None:
        self._linears, self._bias_N, self._scratch = linears, bias_N, scratch
        self._N, self._K = sum(linear.out_features for linear in linears), linears[0].in_features
        dtype, device = linears[0].dtype, linears[0].codes.device
        self._codes_NK = linears[0].codes
        self._scale_N = linears[0].scale
        if len(linears) > 1:
            self._codes_NK = torch.cat([linear.codes.view(torch.uint8) for linear in linears]).view(E4M3)
            self._scale_N = torch.cat([linear.scale for linear in linears])
            self._share()
        self._ones_K = torch.ones(self._K, device=device)
        scratch.reserve(self._N * self._K, torch.uint8)
        self.A_RK = torch.zeros(R, self._K, dtype=dtype, device=device)
        self.B_NR = torch.zeros(self._N, R, dtype=dtype, device=device)

    def _share(self) -> None:
        """Make the layers' codes and scales views of the matrix."""
        row = 0
        for linear in self._linears:
            rows = slice(row, row + linear.out_features)
            linear.codes, linear.scale = self._codes_NK[rows], self._scale_N[rows]
            row += linear.out_features

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Product`."""
        self._codes_NK, self._scale_N, self._ones_K = map(copy, (self._codes_NK, self._scale_N, self._ones_K))
        self.A_RK, self.B_NR = copy(self.A_RK), copy(self.B_NR)
        self._share()

    def forward(self, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor) -> None:
        """See `Product`."""
        rows = self._rows(x_TK, None)
        multiply_rows_into(out_TN, rows, (self._codes_NK, self._scale_N), self._bias_N, fast_accumulation=True)
        if h_TR.shape[1]:
            out_TN.addmm_(h_TR, self.B_NR.t())

    def input_gradient(self, dy_TN: torch.Tensor, t_TR: torch.Tensor, dx_TK: torch.Tensor, expanded: bool) -> None:
        """See `Product`. The weights' scales are folded into dy before it is quantized, so one stored copy serves."""
        codes_KN = self._scratch.matrix(self._K, self._N, E4M3)
        transpose_codes(self._codes_NK, codes_KN)
        rows = self._rows(dy_TN, self._scale_N)
        multiply_rows_into(dx_TK, rows, (codes_KN, self._ones_K), fast_accumulation=True)
        if t_TR.shape[1]:
            dx_TK.addmm_(t_TR, self.A_RK)

    def _rows(self, x: torch.Tensor, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, width = x.shape
        assert self._scratch.rows is not None, "products in fp8 without buffers"
        codes, scales = self._scratch.rows
        codes, scales = codes[: tokens * width].view(E4M3).view(tokens, width), scales[:tokens]
        quantize_rows(x, codes, scales, column_scale)
        return codes, scales


def beside(x_TK: torch.Tensor, h_TR: torch.Tensor) -> torch.Tensor:
    """x and h, which stand side by side in one buffer, as one (T, K + R) matrix."""
    width, extra = x_TK.shape[1], h_TR.shape[1]
    assert not extra or h_TR.data_ptr() == x_TK.data_ptr() + width * x_TK.element_size(), "not side by side"
    return x_TK.as_strided((x_TK.shape[0], width + extra), x_TK.stride())


def forward_beside(
    weight_NKR: torch.Tensor, x_TK: torch.Tensor, h_TR: torch.Tensor, out_TN: torch.Tensor, bias_N: torch.Tensor | None
) -> None:
    """out = [x | h] · weightᵀ (+ bias)."""
    if bias_N is None:
        torch.mm(beside(x_TK, h_TR), weight_NKR.t(), out=out_TN)
    else:
        torch.addmm(bias_N, beside(x_TK, h_TR), weight_NKR.t(), out=out_TN)
