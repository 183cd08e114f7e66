"""The Triton body of `fitune.kernels.rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two, warps


def scatter_rows(x_MH: torch.Tensor, index_M: torch.Tensor, out_TH: torch.Tensor) -> None:
    """See `rows.scatter_rows`; one program per row."""
    rows, width = x_MH.shape
    block = power_of_two(width)
    strides = x_MH.stride(0), out_TH.stride(0)
    _scatter[(rows,)](x_MH, index_M, out_TH, width, *strides, BLOCK=block, num_warps=warps(block))


@triton.jit
def _scatter(x, index, out, width, x_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    to = tl.load(index + row)
    column = tl.arange(0, BLOCK)
    keep = column < width
    tl.store(out + to * out_stride + column, tl.load(x + row * x_stride + column, mask=keep), mask=keep)
