"""The Triton body of `fitune.kernels.refresh`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


def refresh(
    table_C5: torch.Tensor, scales_C: torch.Tensor, source: torch.Tensor, to: torch.Tensor, largest: int
) -> None:
    """One launch over all copies; `source` and `to` only tell the dtypes."""
    grid = (table_C5.shape[0], triton.cdiv(largest, BLOCK))
    _refresh[grid](table_C5, scales_C, source, to, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _refresh(table, scales, source_like, to_like, BLOCK: tl.constexpr):
    """A block of one matrix per program."""
    copy = tl.program_id(0)
    source = tl.load(table + copy * 5).to(tl.pointer_type(source_like.dtype.element_ty))
    to = tl.load(table + copy * 5 + 1).to(tl.pointer_type(to_like.dtype.element_ty))
    rows = tl.load(table + copy * 5 + 2)
    columns = tl.load(table + copy * 5 + 3)
    stride = tl.load(table + copy * 5 + 4)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    keep = at < rows * columns
    value = tl.load(source + at, keep) * tl.load(scales + copy)
    tl.store(to + (at // columns) * stride + at % columns, value.to(to_like.dtype.element_ty), keep)
