"""The Triton bodies of `norm.py`: one program holds one row; imported only where they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two, warps
from fitune.kernels.norm import Norm


def add_norm(
    x_TH: torch.Tensor,
    branch_TH: torch.Tensor | None,
    norm: Norm,
    sum_TH: torch.Tensor | None,
    y_TH: torch.Tensor,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
) -> None:
    """Triton `add_norm`."""
    rows, width = x_TH.shape
    block = power_of_two(width)
    _add_norm[(rows,)](
        x_TH,
        branch_TH,
        norm.weight_H,
        norm.bias_H,
        sum_TH,
        y_TH,
        rstd_T,
        mean_T,
        x_TH.stride(0),
        0 if branch_TH is None else branch_TH.stride(0),
        0 if sum_TH is None else sum_TH.stride(0),
        y_TH.stride(0),
        norm.eps,
        width,
        BLOCK=block,
        num_warps=warps(block),
    )


def norm_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    norm: Norm,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
    d_TH: torch.Tensor,
    y_TH: torch.Tensor | None,
) -> None:
    """Triton `norm_backward`."""
    rows, width = x_TH.shape
    block = power_of_two(width)
    _norm_backward[(rows,)](
        dy_TH,
        x_TH,
        norm.weight_H,
        norm.bias_H,
        rstd_T,
        mean_T,
        d_TH,
        y_TH,
        dy_TH.stride(0),
        x_TH.stride(0),
        d_TH.stride(0),
        0 if y_TH is None else y_TH.stride(0),
        norm.carried,
        width,
        BLOCK=block,
        num_warps=warps(block),
    )


def norm_only(
    x_TH: torch.Tensor, norm: Norm, rstd_T: torch.Tensor, mean_T: torch.Tensor | None, y_TH: torch.Tensor
) -> None:
    """Triton `norm_only`."""
    rows, width = x_TH.shape
    block = power_of_two(width)
    _norm_only[(rows,)](
        x_TH,
        norm.weight_H,
        norm.bias_H,
        rstd_T,
        mean_T,
        y_TH,
        x_TH.stride(0),
        y_TH.stride(0),
        width,
        BLOCK=block,
        num_warps=warps(block),
    )


@triton.jit
def _normalized(x, m, rstd, weight, bias, col, keep, RMS: tl.constexpr, ROUND: tl.constexpr):
    """The norm's output in fp32; an RMS norm rounds the normalized value to ROUND before the weight."""
    w = tl.load(weight + col, mask=keep, other=0.0).to(tl.float32)
    if RMS:
        y = (x * rstd).to(ROUND).to(tl.float32) * w
    else:
        y = (x - m) * rstd * w
        if bias is not None:
            y += tl.load(bias + col, mask=keep, other=0.0).to(tl.float32)
    return y


@triton.jit
def _add_norm(
    x, branch, weight, bias, total, y, rstd, mean, sx, sb, st, sy, eps, H, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col < H
    dtype: tl.constexpr = x.dtype.element_ty
    s = tl.load(x + row * sx + col, mask=keep, other=0.0).to(tl.float32)
    if branch is not None:
        s += tl.load(branch + row * sb + col, mask=keep, other=0.0).to(tl.float32)
        rounded = s.to(dtype)
        tl.store(total + row * st + col, rounded, mask=keep)
        s = rounded.to(tl.float32)
    m = 0.0
    centred = s
    if mean is not None:
        m = tl.sum(s, 0) / H
        centred = tl.where(keep, s - m, 0.0)
        tl.store(mean + row, m)
    r = tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)
    tl.store(rstd + row, r)
    out = _normalized(s, m, r, weight, bias, col, keep, mean is None, dtype)
    tl.store(y + row * sy + col, out.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _norm_backward(
    dy, x, weight, bias, rstd, mean, d, y, sdy, sx, sd, sy, carried, H, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col < H
    v = tl.load(x + row * sx + col, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(dy + row * sdy + col, mask=keep, other=0.0).to(tl.float32)
    if carried is not None:
        g += tl.load(d + row * sd + col, mask=keep, other=0.0).to(tl.float32) * carried
    g *= tl.load(weight + col, mask=keep, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    m = 0.0
    if mean is not None:
        m = tl.load(mean + row)
    hat = (v - m) * r  # past the row g is 0, so hat may be anything there
    dx = g - hat * (tl.sum(g * hat, 0) / H)
    if mean is not None:
        dx -= tl.sum(g, 0) / H
    dx *= r
    if carried is None:
        dx += tl.load(d + row * sd + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(d + row * sd + col, dx.to(d.dtype.element_ty), mask=keep)
    if y is not None:
        out = _normalized(v, m, r, weight, bias, col, keep, mean is None, x.dtype.element_ty)
        tl.debug_barrier()  # y may be dy: every thread has read its part before any writes
        tl.store(y + row * sy + col, out.to(y.dtype.element_ty), mask=keep)


@triton.jit
def _norm_only(x, weight, bias, rstd, mean, y, sx, sy, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col < H
    v = tl.load(x + row * sx + col, mask=keep, other=0.0).to(tl.float32)
    m = 0.0
    if mean is not None:
        m = tl.load(mean + row)
    out = _normalized(v, m, tl.load(rstd + row), weight, bias, col, keep, mean is None, x.dtype.element_ty)
    tl.store(y + row * sy + col, out.to(y.dtype.element_ty), mask=keep)
