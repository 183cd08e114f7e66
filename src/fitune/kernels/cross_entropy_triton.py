"""The Triton bodies of `cross_entropy.py`: one program makes two passes over one row; imported only where they run.

Each thread keeps its own running maximum and sum over groups of WIDE adjacent logits (16 bytes of a 2-byte dtype),
so a logit costs one exponential and a pass has a single reduction across threads, at its end. V is a compile-time
constant: a model has one, and masks and trip counts fold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels import cross_entropy as reference
from fitune.kernels.launch import MAX_WARPS, power_of_two

MAX_BLOCK = 16384  # logits in flight: 32 for each thread of 16 warps
IGNORED = tl.constexpr(reference.IGNORED)
WIDE = tl.constexpr(8)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: exp(-inf - -inf) is NaN, and every row starts there


def cross_entropy_(logits_NV: torch.Tensor, targets_N: torch.Tensor, scale: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Triton `cross_entropy_`."""
    rows, vocabulary = logits_NV.shape
    groups, num_warps = _shape(vocabulary)
    _cross_entropy[(rows,)](
        logits_NV, targets_N, scale, loss_N, logits_NV.stride(0), V=vocabulary, GROUPS=groups, num_warps=num_warps
    )


def loss_only(logits_NV: torch.Tensor, targets_N: torch.Tensor, loss_N: torch.Tensor) -> None:
    """Triton `loss_only`."""
    rows, vocabulary = logits_NV.shape
    groups, num_warps = _shape(vocabulary)
    _loss_only[(rows,)](
        logits_NV, targets_N, loss_N, logits_NV.stride(0), V=vocabulary, GROUPS=groups, num_warps=num_warps
    )


def _shape(vocabulary: int) -> tuple[int, int]:
    """Groups of WIDE logits that a program reads at a time, and its warps."""
    block = max(2 * WIDE.value, min(MAX_BLOCK, power_of_two(vocabulary)))
    return block // WIDE.value, max(1, min(MAX_WARPS, block // 1024))


@triton.jit
def _columns(GROUPS: tl.constexpr):
    return tl.arange(0, GROUPS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def _logsumexp(row, V: tl.constexpr, GROUPS: tl.constexpr):
    """logsumexp of V logits; tl.max passes NaN over, but the sum of exponentials does not."""
    lane = _columns(GROUPS)
    top = tl.full([GROUPS], LOWEST, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    for start in range(0, V, GROUPS * WIDE):
        col = start + lane
        x = tl.load(row + col, mask=col < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _loss(row, target, lse, V: tl.constexpr):
    """lse - row[target]; a target outside the vocabulary gives NaN instead of a read outside the row."""
    inside = (target >= 0) & (target < V)
    return lse - tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _cross_entropy(logits, targets, scale, losses, stride, V: tl.constexpr, GROUPS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    dtype: tl.constexpr = logits.dtype.element_ty
    target = tl.load(targets + n)
    lane = _columns(GROUPS)
    if target == IGNORED:
        tl.store(losses + n, 0.0)
        for start in range(0, V, GROUPS * WIDE):
            col = start + lane
            tl.store(row + col, tl.zeros([GROUPS, WIDE], dtype), mask=col < V)
    else:
        lse = _logsumexp(row, V, GROUPS)
        tl.store(losses + n, _loss(row, target, lse, V))
        factor = tl.load(scale)
        tl.debug_barrier()  # the target's logit is read before any thread overwrites it
        for start in range(0, V, GROUPS * WIDE):
            col = start + lane
            p = tl.exp(tl.load(row + col, mask=col < V, other=0.0).to(tl.float32) - lse)
            p = tl.where(col == target, p - 1.0, p)
            tl.store(row + col, (p * factor).to(dtype), mask=col < V)


@triton.jit
def _loss_only(logits, targets, losses, stride, V: tl.constexpr, GROUPS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(targets + n)
    if target == IGNORED:
        tl.store(losses + n, 0.0)
    else:
        tl.store(losses + n, _loss(row, target, _logsumexp(row, V, GROUPS), V))
