"""Triton bodies of `dequantize` and of the fp8 weights: memory bound, one pass, 16-byte stores.

A program writes one tile of one row, so the only division per weight is by a power of two. Rows are the first grid axis
because the others end at 65,535. Products and sums are not fused: the values are those of the references, bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fitune.kernels.dequantize import BLOCK_SIZE, NESTED_BLOCK_SIZE

# Largest first: it wins where several leave the same rest of a row.
_TILES = (4096, 2048, 1024)
_PER_WARP = 1024  # 32 weights per thread: what a program computes once is spread over many
_SELECT = False  # how a 4-bit code becomes a value: four levels of selects, or a 64-byte table in the L1 cache


@triton.jit
def _rows_kernel(
    codes_ptr, scale_ptr, out_ptr, step, columns, codes_stride, out_strides, ALIGN: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    codes = tl.load(codes_ptr + row * codes_stride + column, mask=inside)  # no default: fp8 cannot be made of 0
    values = codes.to(tl.float32) * tl.load(scale_ptr + row) * step
    out_row = out_ptr + row * (out_strides * ALIGN)
    tl.store(out_row + column, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _code_value(index, code_ptr, SELECT: tl.constexpr):
    if SELECT:
        b0, b1, b2, b3 = (index & 1) != 0, (index & 2) != 0, (index & 4) != 0, (index & 8) != 0
        v0 = tl.where(b0, tl.load(code_ptr + 1), tl.load(code_ptr))
        v1 = tl.where(b0, tl.load(code_ptr + 3), tl.load(code_ptr + 2))
        v2 = tl.where(b0, tl.load(code_ptr + 5), tl.load(code_ptr + 4))
        v3 = tl.where(b0, tl.load(code_ptr + 7), tl.load(code_ptr + 6))
        v4 = tl.where(b0, tl.load(code_ptr + 9), tl.load(code_ptr + 8))
        v5 = tl.where(b0, tl.load(code_ptr + 11), tl.load(code_ptr + 10))
        v6 = tl.where(b0, tl.load(code_ptr + 13), tl.load(code_ptr + 12))
        v7 = tl.where(b0, tl.load(code_ptr + 15), tl.load(code_ptr + 14))
        low = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
        high = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
        return tl.where(b3, high, low)
    else:
        return tl.load(code_ptr + index)


@triton.jit
def _scale_of(block, inside, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED: tl.constexpr):
    if offset_ptr is None:  # without double quantization
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)
    else:
        code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // NESTED, mask=inside, other=0.0)
        return tl.load(nested_code_ptr + code) * nested + tl.load(offset_ptr)


@triton.jit
def _aligned_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    columns, out_strides,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Rows are whole blocks: a tile is a table of blocks, and one absmax is read per block and thread."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    blocks_per_row = columns // BLOCK
    line = tl.arange(0, TILE // BLOCK)
    block = start // BLOCK + line
    scale = _scale_of(
        row * blocks_per_row + block, block < blocks_per_row,
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED,
    )  # fmt: skip
    half = start // 2 + line[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    codes = tl.load(packed_ptr + row * (columns // 2) + half, mask=half < columns // 2, other=0).to(tl.int32)
    even = _code_value(codes >> 4, code_ptr, SELECT) * scale[:, None]
    odd = _code_value(codes & 15, code_ptr, SELECT) * scale[:, None]
    column = start + line[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(even, odd).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * (out_strides * ALIGN) + column, values, mask=column < columns)


@triton.jit
def _any_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    columns, out_strides,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Blocks run on from row to row: every weight looks for its own byte and block."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    index = row * columns + column
    byte = tl.load(packed_ptr + index // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(index % 2 == 0, byte >> 4, byte & 15)
    scale = _scale_of(index // BLOCK, inside, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED)
    values = _code_value(code, code_ptr, SELECT) * scale
    out_row = out_ptr + row * (out_strides * ALIGN)
    tl.store(out_row + column, values.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_rows(codes_NK: torch.Tensor, scale_N: torch.Tensor, step: float, out_NK: torch.Tensor) -> None:
    """Write codes * scale * step; codes int8 or fp8, see `dequantize.dequantize_int8`."""
    rows, columns = out_NK.shape
    align = _align(out_NK)
    strides = codes_NK.stride(0), out_NK.stride(0) // align
    grid, options = _tiles(rows, columns)
    _rows_kernel[grid](codes_NK, scale_N, out_NK, step, columns, *strides, ALIGN=align, **options)


def dequantize_4bit(
    packed: torch.Tensor,
    absmax_G: torch.Tensor,
    code_16: torch.Tensor,
    nested_absmax_S: torch.Tensor | None,
    nested_code_256: torch.Tensor | None,
    offset: torch.Tensor | None,
    out_NK: torch.Tensor,
) -> None:
    """See `dequantize.dequantize_4bit`."""
    rows, columns = out_NK.shape
    align = _align(out_NK)
    grid, options = _tiles(rows, columns)
    options |= {"BLOCK": BLOCK_SIZE, "NESTED": NESTED_BLOCK_SIZE, "SELECT": _SELECT}
    tables = absmax_G, code_16, nested_absmax_S, nested_code_256, offset
    kernel = _aligned_kernel if columns % BLOCK_SIZE == 0 else _any_kernel
    kernel[grid](packed, *tables, out_NK, columns, out_NK.stride(0) // align, ALIGN=align, **options)


def _tiles(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the launch options of the tile that covers a row with the least left over."""
    tile = min(_TILES, key=lambda tile: -(-columns // tile) * tile)
    return (rows, -(-columns // tile)), {"TILE": tile, "num_warps": tile // _PER_WARP, "enable_fp_fusion": False}


def _align(out_NK: torch.Tensor) -> int:
    """Power of two that divides the row stride: Triton itself sees 16 or nothing, and a group of rank 8 has 8 more."""
    return math.gcd(out_NK.stride(0), 16)
