"""The Triton bodies of `dropout.py`: one program handles BLOCK columns of one row; imported only where they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels import dropout as reference
from fitune.kernels.dropout import Mask
from fitune.kernels.launch import power_of_two

BLOCK = 1024  # eight elements for each thread of four warps: two Philox calls
ROUNDS = tl.constexpr(reference.ROUNDS)


def drop(x_TK: torch.Tensor, mask: Mask, out_TK: torch.Tensor) -> None:
    """Triton `drop`."""
    _launch(x_TK, mask, out_TK, False)


def drop_add(x_TK: torch.Tensor, mask: Mask, into_TK: torch.Tensor) -> None:
    """Triton `drop_add`."""
    _launch(x_TK, mask, into_TK, True)


def _launch(x_TK: torch.Tensor, mask: Mask, out_TK: torch.Tensor, add: bool) -> None:
    rows, width = out_TK.shape
    block = max(4, min(BLOCK, power_of_two(width)))
    blocks = triton.cdiv(width, block)
    _drop[(rows * blocks,)](
        x_TK,
        out_TK,
        mask.dropout.state_2,
        mask.dropout.scale_1,
        mask.stream,
        x_TK.stride(0),
        out_TK.stride(0),
        blocks,
        width,
        ADD=add,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _drop(x, out, state, scale, stream, x_stride, out_stride, blocks, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Four adjacent columns share one Philox call."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    quad = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quad * 0
    token = zero + row.to(tl.uint32)
    seed = tl.load(state).to(tl.uint64, bitcast=True)
    a, b, c, d = tl.philox(seed, token, quad, zero + tl.full([], stream, tl.uint32), zero, ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d)).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32) * tl.load(scale)
    value = tl.where(words >= tl.load(state + 1), value, 0.0)
    if ADD:
        value += tl.load(out + row * out_stride + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), inside)
