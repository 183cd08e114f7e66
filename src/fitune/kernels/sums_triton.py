"""The Triton body of `sums.py`: one program sums a few columns over all rows; imported only where it runs.

A program has 64 bytes of each row in 16 bits, two sectors of memory, so that 2,048 columns already make 64 programs.
Rows are added in one order by one owner: no atomics, no second launch, no memory for partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two

COLUMNS, ROWS = 32, 512  # eight 16-byte accesses under way for each thread of eight warps


def add_column_sums(x_TN: torch.Tensor, scale: float, into_N: torch.Tensor, times_TN: torch.Tensor | None) -> None:
    """Triton `add_column_sums`."""
    rows, width = x_TN.shape[0], into_N.shape[0]
    block = min(ROWS, power_of_two(rows))
    times = x_TN if times_TN is None else times_TN
    strides = x_TN.stride(0), times.stride(0)
    _add_column_sums[(triton.cdiv(width, COLUMNS),)](
        x_TN, times, into_N, *strides, rows, width, scale, times_TN is not None, block, COLUMNS, num_warps=8
    )


@triton.jit
def _add_column_sums(
    x, times, into, sx, st, T, N, scale, TIMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, T, ROWS):
        at = (start + row).to(tl.int64)
        keep = (at < T)[:, None] & (col < N)[None, :]
        found = tl.load(x + at[:, None] * sx + col[None, :], mask=keep, other=0.0).to(tl.float32)
        if TIMES:
            found *= tl.load(times + at[:, None] * st + col[None, :], mask=keep, other=0.0).to(tl.float32)
        total += found
    old = tl.load(into + col, mask=col < N, other=0.0)
    tl.store(into + col, old + scale * tl.sum(total, 0), mask=col < N)
