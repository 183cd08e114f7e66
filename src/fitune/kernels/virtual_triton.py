"""The Triton bodies of `fitune.kernels.virtual`; imported only where they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two, warps

COLUMNS, DOCUMENTS = 64, 32  # of one program of `take_rows`


def place_rows(table_Pgd: torch.Tensor, first_D: torch.Tensor, out_Tgd: torch.Tensor) -> None:
    """See `virtual.place_rows`; one program per document and virtual token."""
    count, heads, width = table_Pgd.shape
    block = power_of_two(heads * width)
    strides = out_Tgd.stride(0), out_Tgd.stride(1)
    grid = (len(first_D), count)
    _place[grid](table_Pgd, first_D, out_Tgd, heads * width, width, *strides, BLOCK=block, num_warps=warps(block))


def take_rows(x_Tgd: torch.Tensor, first_D: torch.Tensor, into_Pgd: torch.Tensor) -> None:
    """See `virtual.take_rows`; one program per virtual token and a few columns."""
    count, heads, width = into_Pgd.shape
    strides = x_Tgd.stride(0), x_Tgd.stride(1)
    grid = (count, triton.cdiv(heads * width, COLUMNS))
    _take[grid](
        x_Tgd, first_D, into_Pgd, len(first_D), heads * width, width, *strides, DOCUMENTS=DOCUMENTS, COLUMNS=COLUMNS
    )


@triton.jit
def _place(table, first, out, N, width, row_stride, head_stride, BLOCK: tl.constexpr):
    start = tl.load(first + tl.program_id(0)).to(tl.int64)
    token = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    keep = (column < N) & (start >= 0)
    to = (start + token) * row_stride + (column // width) * head_stride + column % width
    tl.store(out + to, tl.load(table + token * N + column, mask=keep), mask=keep)


@triton.jit
def _take(x, first, into, D, N, width, row_stride, head_stride, DOCUMENTS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = (column // width) * head_stride + column % width
    total = tl.zeros([DOCUMENTS, COLUMNS], tl.float32)
    for begin in tl.range(0, D, DOCUMENTS):
        document = begin + tl.arange(0, DOCUMENTS)
        start = tl.load(first + document, mask=document < D, other=-1).to(tl.int64)
        keep = (start >= 0)[:, None] & (column < N)[None, :]
        place = x + (start + token)[:, None] * row_stride + at[None, :]
        found = tl.load(place, mask=keep, other=0.0)
        total += found.to(tl.float32)
        tl.store(place, tl.zeros_like(found), mask=keep)
    tl.store(into + token * N + column, tl.sum(total, 0), mask=column < N)
