"""Triton bodies of `fp8`: quantizing rows in one read, and the transpose of a matrix of bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.fp8 import LARGEST, SMALLEST_SCALE
from fitune.kernels.launch import power_of_two, warps

_HELD = 32768  # widest row that stays in the registers of one program; wider ones are read a second time
_SQUARE = 128  # bytes: a tile of 16 kB passes through shared memory


@triton.jit
def _column_values(x_ptr, column_scale_ptr, column, columns, SCALED: tl.constexpr):
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(column_scale_ptr + column, mask=column < columns, other=0.0)
    return x


@triton.jit
def _magnitude(x):
    # A maximum may ignore NaN; inf it cannot.
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, column_scale_ptr, columns, x_stride, out_stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    column = tl.arange(0, TILE)
    x = _column_values(x_ptr, column_scale_ptr, column, columns, SCALED)
    largest = _magnitude(x)
    for tile in range(1, TILES):
        x = _column_values(x_ptr, column_scale_ptr, tile * TILE + column, columns, SCALED)
        largest = tl.maximum(largest, _magnitude(x))
    # Exact division, so that the codes are the reference's.
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), LARGEST), SMALLEST)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    if TILES == 1:
        y = tl.clamp(x * inverse, -LARGEST, LARGEST)
        tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=column < columns)
    else:
        for tile in range(TILES):
            at = tile * TILE + column
            x = _column_values(x_ptr, column_scale_ptr, at, columns, SCALED)
            y = tl.clamp(x * inverse, -LARGEST, LARGEST)
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < columns)


@triton.jit
def _transpose_kernel(in_ptr, out_ptr, rows, columns, in_stride, out_stride, SQUARE: tl.constexpr):
    row = tl.program_id(0) * SQUARE + tl.arange(0, SQUARE)
    column = tl.program_id(1) * SQUARE + tl.arange(0, SQUARE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(in_ptr + row[:, None].to(tl.int64) * in_stride + column[None, :], mask=inside, other=0)
    out = out_ptr + column[:, None].to(tl.int64) * out_stride + row[None, :]
    tl.store(out, tl.trans(tile), mask=(column[:, None] < columns) & (row[None, :] < rows))


def quantize_rows(
    x_TK: torch.Tensor, out8_TK: torch.Tensor, scale_T: torch.Tensor, column_scale_K: torch.Tensor | None
) -> None:
    """See `fp8.quantize_rows`."""
    rows, columns = x_TK.shape
    tile = min(power_of_two(columns), _HELD)
    constants = {"LARGEST": LARGEST, "SMALLEST": SMALLEST_SCALE, "SCALED": column_scale_K is not None}
    tiles = {"TILES": triton.cdiv(columns, tile), "TILE": tile, "num_warps": warps(tile)}
    strides = x_TK.stride(0), out8_TK.stride(0)
    _quantize_kernel[(rows,)](x_TK, out8_TK, scale_T, column_scale_K, columns, *strides, **constants, **tiles)


def transpose_codes(codes_NK: torch.Tensor, out_KN: torch.Tensor) -> None:
    """See `fp8.transpose_codes`."""
    rows, columns = codes_NK.shape
    _transpose_kernel[(triton.cdiv(rows, _SQUARE), triton.cdiv(columns, _SQUARE))](
        codes_NK, out_KN, rows, columns, codes_NK.stride(0), out_KN.stride(0), SQUARE=_SQUARE, num_warps=8
    )
