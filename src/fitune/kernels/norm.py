"""RMS norm and layer norm over rows, fused with the residual sum before them.

The block calls `add_norm` where a branch joins the residual stream, `norm_backward` where the gradient leaves
the norm for the stream, and `norm_only` to make a normalized row again from what was saved. Statistics are
fp32; they are the only thing a backward needs besides the sum itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fitune.kernels.launch import require, require_vector, use_triton

MAX_WIDTH = 16384  # a row is held in the registers of one program


@dataclass(frozen=True)
class Norm:
    """The frozen parameters of one norm.

    Attributes:
        weight_H: (H,) fp32 or the model's dtype.
        bias_H: (H,) or None; only a layer norm has one.
        eps: added to the variance.
        carried: None: the residual stream passes beside the norm, x + f(norm(x)). A factor: it passes through it,
            carried * norm(x) + f(norm(x)), as in ChatGLM-6B.
    """

    weight_H: torch.Tensor
    bias_H: torch.Tensor | None
    eps: float
    carried: float | None = None


def add_norm(
    x_TH: torch.Tensor,
    branch_TH: torch.Tensor | None,
    norm: Norm,
    sum_TH: torch.Tensor | None,
    y_TH: torch.Tensor,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
) -> None:
    """Add a branch to the residual stream and normalize the sum: RMS norm without mean_T, layer norm with it.

    sum = round(x + branch); RMS: y = weight * round(sum * rstd), rounded twice as LlamaRMSNorm rounds; layer norm:
    y = (sum - mean) * rstd * weight + bias in fp32, rounded once.

    Args:
        x_TH: (T, H) the residual stream in the model's dtype.
        branch_TH: (T, H) or None: nothing to add, the sum is x.
        norm: weight, bias and eps.
        sum_TH: (T, H) written; may be x_TH or branch_TH. None exactly if branch_TH is None.
        y_TH: (T, H) written; may be branch_TH, not x_TH.
        rstd_T: (T,) fp32 written: 1 / sqrt(variance + eps).
        mean_T: (T,) fp32 written, or None for RMS norm.
    Raises:
        ValueError: shapes or strides that do not fit, H above 16,384, a sum without a branch or the reverse.
    Memory: none on CUDA; on CPU fp32 copies of x.
    Source: RMSNorm, arXiv:1910.07467. Differs: no.
    """
    _check(x_TH, norm, rstd_T, mean_T)
    if (branch_TH is None) != (sum_TH is None):
        given = "sum_TH" if branch_TH is None else "branch_TH"
        raise ValueError(f"only {given} was given; pass branch_TH and sum_TH together, or neither")
    for name, buffer in (("branch_TH", branch_TH), ("sum_TH", sum_TH), ("y_TH", y_TH)):
        if buffer is not None:
            require(name, buffer, *x_TH.shape)
    if use_triton(x_TH):
        from fitune.kernels import norm_triton

        norm_triton.add_norm(x_TH, branch_TH, norm, sum_TH, y_TH, rstd_T, mean_T)
    else:
        add_norm_reference(x_TH, branch_TH, norm, sum_TH, y_TH, rstd_T, mean_T)


def add_norm_reference(
    x_TH: torch.Tensor,
    branch_TH: torch.Tensor | None,
    norm: Norm,
    sum_TH: torch.Tensor | None,
    y_TH: torch.Tensor,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
) -> None:
    """Plain PyTorch `add_norm`."""
    total_TH = x_TH
    if branch_TH is not None and sum_TH is not None:
        total_TH = (x_TH.float() + branch_TH.float()).to(x_TH.dtype)
        sum_TH.copy_(total_TH)
    centred_TH = total_TH.float()
    if mean_T is not None:
        mean_T.copy_(centred_TH.mean(1))
        centred_TH = centred_TH - mean_T[:, None]
    rstd_T.copy_(torch.rsqrt(centred_TH.pow(2).mean(1) + norm.eps))
    norm_only_reference(total_TH, norm, rstd_T, mean_T, y_TH)


def norm_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    norm: Norm,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
    d_TH: torch.Tensor,
    y_TH: torch.Tensor | None,
) -> None:
    """Add the gradient with respect to the norm's input to d, and make the norm's output again if asked.

    If the norm carries the stream, its output's gradient is dy + carried * d, and d is replaced by its input's.

    Args:
        dy_TH: (T, H) gradient of the norm's output, without what the stream brings.
        x_TH: (T, H) input of the norm (the sum that `add_norm` wrote).
        norm: weight, bias and eps; they get no gradient.
        rstd_T: (T,) fp32 from `add_norm`.
        mean_T: (T,) fp32 from `add_norm`, or None for RMS norm.
        d_TH: (T, H) gradient of the residual stream; changed in place, in fp32 and rounded once.
        y_TH: (T, H) the normalized rows are written here; may be dy_TH itself. None: not wanted.
    Raises:
        ValueError: shapes or strides that do not fit, or H above 16,384.
    Memory: none on CUDA; on CPU a few fp32 copies of x.
    """
    _check(x_TH, norm, rstd_T, mean_T)
    for name, buffer in (("dy_TH", dy_TH), ("d_TH", d_TH), ("y_TH", y_TH)):
        if buffer is not None:
            require(name, buffer, *x_TH.shape)
    if use_triton(x_TH):
        from fitune.kernels import norm_triton

        norm_triton.norm_backward(dy_TH, x_TH, norm, rstd_T, mean_T, d_TH, y_TH)
    else:
        norm_backward_reference(dy_TH, x_TH, norm, rstd_T, mean_T, d_TH, y_TH)


def norm_backward_reference(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    norm: Norm,
    rstd_T: torch.Tensor,
    mean_T: torch.Tensor | None,
    d_TH: torch.Tensor,
    y_TH: torch.Tensor | None,
) -> None:
    """Plain PyTorch `norm_backward`."""
    beside_TH, dout_TH = d_TH.float(), dy_TH.float()
    if norm.carried is not None:
        beside_TH, dout_TH = torch.zeros_like(beside_TH), dout_TH + norm.carried * beside_TH
    g_TH = dout_TH * norm.weight_H.float()
    hat_TH = x_TH.float()
    if mean_T is not None:
        hat_TH = hat_TH - mean_T[:, None]
    hat_TH = hat_TH * rstd_T[:, None]
    dx_TH = g_TH - hat_TH * (g_TH * hat_TH).mean(1, keepdim=True)
    if mean_T is not None:
        dx_TH -= g_TH.mean(1, keepdim=True)
    d_TH.copy_(beside_TH + dx_TH * rstd_T[:, None])
    if y_TH is not None:
        norm_only_reference(x_TH, norm, rstd_T, mean_T, y_TH)


def norm_only(
    x_TH: torch.Tensor, norm: Norm, rstd_T: torch.Tensor, mean_T: torch.Tensor | None, y_TH: torch.Tensor
) -> None:
    """Make the norm's output again, bit for bit, from its input and the saved statistics.

    Args:
        x_TH: (T, H) input of the norm.
        norm: weight, bias and eps.
        rstd_T: (T,) fp32 from `add_norm`.
        mean_T: (T,) fp32 from `add_norm`, or None for RMS norm.
        y_TH: (T, H) written.
    Raises:
        ValueError: shapes or strides that do not fit, or H above 16,384.
    Memory: none on CUDA; on CPU two fp32 copies of x.
    """
    _check(x_TH, norm, rstd_T, mean_T)
    require("y_TH", y_TH, *x_TH.shape)
    if use_triton(x_TH):
        from fitune.kernels import norm_triton

        norm_triton.norm_only(x_TH, norm, rstd_T, mean_T, y_TH)
    else:
        norm_only_reference(x_TH, norm, rstd_T, mean_T, y_TH)


def norm_only_reference(
    x_TH: torch.Tensor, norm: Norm, rstd_T: torch.Tensor, mean_T: torch.Tensor | None, y_TH: torch.Tensor
) -> None:
    """Plain PyTorch `norm_only`."""
    hat_TH = x_TH.float()
    if mean_T is None:
        y_TH.copy_(norm.weight_H.float() * (hat_TH * rstd_T[:, None]).to(x_TH.dtype).float())
        return
    hat_TH = (hat_TH - mean_T[:, None]) * rstd_T[:, None] * norm.weight_H.float()
    y_TH.copy_(hat_TH if norm.bias_H is None else hat_TH + norm.bias_H.float())


def _check(x_TH: torch.Tensor, norm: Norm, rstd_T: torch.Tensor, mean_T: torch.Tensor | None) -> None:
    rows, width = x_TH.shape
    require("x_TH", x_TH, rows, width)
    if width > MAX_WIDTH:
        raise ValueError(
            f"rows of {width} values; a norm takes at most {MAX_WIDTH}: train this model on the plain path"
        )
    if norm.bias_H is not None and mean_T is None:
        raise ValueError("a bias was given without mean_T; an RMS norm has no bias: pass mean_T for a layer norm")
    for name, vector, length in (
        ("weight_H", norm.weight_H, width),
        ("bias_H", norm.bias_H, width),
        ("rstd_T", rstd_T, rows),
        ("mean_T", mean_T, rows),
    ):
        if vector is not None:
            require_vector(name, vector, length)
