"""Rotary positions on rows of heads, alone or behind the q and k norms of Qwen3, and their gradients.

A row holds heads one after another. The first 2 R values of a head are rotated in R pairs, (i, i + R) or, for
interleaved models, (2 i, 2 i + 1); the rest of the head is left alone. With two axes (ChatGLM-6B) the next 2 R values
are rotated likewise, by the second position of the token. The angle tables have one row for each position and are
indexed by position here, so tokens of many sequences can stand in any order. The gradient of a rotation is the rotation
with sin negated (with scaled tables too, for which it is not the inverse).

Shapes: A axes, P positions, R pairs of one axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fitune.kernels.launch import require, require_vector, use_triton


@dataclass(frozen=True)
class Rotary:
    """How the heads of a model are rotated.

    Attributes:
        cos_PR: (P, R) fp32 or the model's dtype, any scaling of the model included.
        sin_PR: (P, R), likewise.
        head_dim: values of a head, at least 2 R axes.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + R).
        axes: positions of a token, 1 or 2.
        fused: rows are [q | k | v] of one head after another; every third head, a value, is passed over.
    """

    cos_PR: torch.Tensor
    sin_PR: torch.Tensor
    head_dim: int
    interleaved: bool
    axes: int = 1
    fused: bool = False


@dataclass(frozen=True)
class HeadNorm:
    """The frozen RMS norms over each head of q and k.

    Attributes:
        q_weight_d: (head_dim,) fp32 or the model's dtype.
        k_weight_d: (head_dim,), likewise.
        eps: added to the mean square.
    """

    q_weight_d: torch.Tensor
    k_weight_d: torch.Tensor
    eps: float


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotate(x_Tn: torch.Tensor, rotary: Rotary, positions_AT: torch.Tensor, heads: int, out_Tn: torch.Tensor) -> None:
    """Rotate the first heads of each row by the position of its token; fp32 inside, rounded once.

    Args:
        x_Tn: (T, heads * head_dim or more) read.
        rotary: tables and layout.
        positions_AT: (A, T) int32 or int64, below P (not checked), unit stride in T.
        heads: how many heads from the start of the row; if they are fused, queries and keys, values not counted.
        out_Tn: (T, heads * head_dim or more) written where x was rotated; may be x itself.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about four fp32 copies of the heads.
    Source: RoFormer, arXiv:2104.09864. Differs: pairs (i, i + R) unless interleaved, as transformers.
    """
    _rotate_either(x_Tn, rotary, positions_AT, heads, out_Tn, False)


def rotate_backward(
    g_Tn: torch.Tensor, rotary: Rotary, positions_AT: torch.Tensor, heads: int, out_Tn: torch.Tensor
) -> None:
    """Write the gradient of `rotate`'s input: the same with sin negated. out may be g itself."""
    _rotate_either(g_Tn, rotary, positions_AT, heads, out_Tn, True)


def _rotate_either(
    x_Tn: torch.Tensor, rotary: Rotary, positions_AT: torch.Tensor, heads: int, out_Tn: torch.Tensor, inverse: bool
) -> None:
    _check(rotary, positions_AT)
    every = heads // 2 * 3 if rotary.fused else heads
    for name, buffer in (("x_Tn", x_Tn), ("out_Tn", out_Tn)):
        require(name, buffer, positions_AT.shape[1], every * rotary.head_dim)
    if use_triton(x_Tn):
        from fitune.kernels import rope_triton

        rope_triton.rotate(x_Tn, rotary, positions_AT, heads, out_Tn, inverse)
    else:
        rotate_reference(x_Tn, rotary, positions_AT, heads, out_Tn, inverse)


def rotate_reference(
    x_Tn: torch.Tensor,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    heads: int,
    out_Tn: torch.Tensor,
    inverse: bool = False,
) -> None:
    """Plain PyTorch `rotate`, and with inverse `rotate_backward`."""
    for part in range(2 if rotary.fused else 1):  # all queries, then all keys, or both at once
        turned_Thd = _turned(_heads(x_Tn, heads, rotary, part), rotary, positions_AT, inverse)
        _heads(out_Tn, heads, rotary, part).copy_(turned_Thd)


def qk_norm_rotate(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    q_Tq: torch.Tensor,
    k_Tk: torch.Tensor,
) -> None:
    """RMS-normalize each head of q and k, then rotate them; qkv is left as it is.

    Args:
        qkv_Tn: (T, (heads + 2 kv_heads) * head_dim or more), q then k then v.
        norm: weights of the two norms; rounds as Qwen3RMSNorm.
        rotary: tables and layout.
        positions_AT: (1, T) int32 or int64, below P (not checked).
        q_Tq: (T, heads * head_dim) written; its width says how many heads. Must not overlap qkv.
        k_Tk: (T, kv_heads * head_dim) written; its width says how many key heads.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about six fp32 copies of q.
    Source: query-key normalization, arXiv:2010.04245. Differs: RMS norm with a weight for each value of a head.
    """
    _check(rotary, positions_AT, norm)
    heads, kv_heads = _check_gradients((q_Tq, k_Tk, k_Tk), rotary, positions_AT)
    require("qkv_Tn", qkv_Tn, positions_AT.shape[1], (heads + 2 * kv_heads) * rotary.head_dim)
    if use_triton(qkv_Tn):
        from fitune.kernels import rope_triton

        rope_triton.qk_norm_rotate(qkv_Tn, norm, rotary, positions_AT, q_Tq, k_Tk)
    else:
        qk_norm_rotate_reference(qkv_Tn, norm, rotary, positions_AT, q_Tq, k_Tk)


def qk_norm_rotate_reference(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    q_Tq: torch.Tensor,
    k_Tk: torch.Tensor,
) -> None:
    """Plain PyTorch `qk_norm_rotate`."""
    start = 0
    for weight_d, out_Tn in ((norm.q_weight_d, q_Tq), (norm.k_weight_d, k_Tk)):
        heads = out_Tn.shape[1] // rotary.head_dim
        x_Thd = _heads(qkv_Tn[:, start:], heads, rotary).float()
        rstd_Th1 = torch.rsqrt(x_Thd.pow(2).mean(-1, keepdim=True) + norm.eps)
        y_Thd = weight_d.float() * (x_Thd * rstd_Th1).to(qkv_Tn.dtype).float()
        _heads(out_Tn, heads, rotary).copy_(_turned(y_Thd.to(qkv_Tn.dtype), rotary, positions_AT, False))
        start += out_Tn.shape[1]


def qk_norm_rotate_backward(
    grads: Gradients,
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Write one row of gradients of q, k and v as they were before norm and rotation; weights get none.

    Args:
        grads: dq (T, heads * head_dim), dk and dv (T, kv_heads * head_dim); the widths say how many heads.
        qkv_Tn: (T, (heads + 2 kv_heads) * head_dim or more) what `qk_norm_rotate` read.
        norm: weights of the two norms.
        rotary: tables and layout.
        positions_AT: (1, T) int32 or int64, below P (not checked).
        out_Tn: (T, as many columns) written; may be qkv itself, or what the three gradients are views of.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA, the statistics are computed again; on CPU about eight fp32 copies of dq.
    """
    _check(rotary, positions_AT, norm)
    heads, kv_heads = _check_gradients(grads, rotary, positions_AT)
    for name, buffer in (("qkv_Tn", qkv_Tn), ("out_Tn", out_Tn)):
        require(name, buffer, positions_AT.shape[1], (heads + 2 * kv_heads) * rotary.head_dim)
    if use_triton(qkv_Tn):
        from fitune.kernels import rope_triton

        rope_triton.qk_norm_rotate_backward(grads, qkv_Tn, norm, rotary, positions_AT, out_Tn)
    else:
        qk_norm_rotate_backward_reference(grads, qkv_Tn, norm, rotary, positions_AT, out_Tn)


def qk_norm_rotate_backward_reference(
    grads: Gradients,
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Plain PyTorch `qk_norm_rotate_backward`."""
    start = 0
    for weight_d, d_Tn in ((norm.q_weight_d, grads[0]), (norm.k_weight_d, grads[1])):
        heads = d_Tn.shape[1] // rotary.head_dim
        x_Thd = _heads(qkv_Tn[:, start:], heads, rotary).float()
        rstd_Th1 = torch.rsqrt(x_Thd.pow(2).mean(-1, keepdim=True) + norm.eps)
        hat_Thd = x_Thd * rstd_Th1
        g_Thd = _turned(_heads(d_Tn, heads, rotary), rotary, positions_AT, True) * weight_d.float()
        dx_Thd = rstd_Th1 * (g_Thd - hat_Thd * (g_Thd * hat_Thd).mean(-1, keepdim=True))
        _heads(out_Tn[:, start:], heads, rotary).copy_(dx_Thd)
        start += d_Tn.shape[1]
    out_Tn[:, start : start + grads[2].shape[1]] = grads[2]


def _heads(x_Tn: torch.Tensor, heads: int, rotary: Rotary, part: int = 0) -> torch.Tensor:
    """(T, heads, head_dim) view of the first heads of each row; if they are fused, half as many of one part."""
    if not rotary.fused:
        return x_Tn[:, : heads * rotary.head_dim].view(x_Tn.shape[0], heads, rotary.head_dim)
    every = heads // 2 * 3 * rotary.head_dim
    return x_Tn[:, :every].view(x_Tn.shape[0], heads // 2, 3, rotary.head_dim)[:, :, part]


def _turned(x_Thd: torch.Tensor, rotary: Rotary, positions_AT: torch.Tensor, inverse: bool) -> torch.Tensor:
    """A new fp32 (T, heads, head_dim): x rotated, the values past 2 R axes copied."""
    pairs = rotary.cos_PR.shape[1]
    x_Thd = x_Thd.float()
    out_Thd = x_Thd.clone()
    for axis in range(rotary.axes):
        cos_T1R, sin_T1R = (table[positions_AT[axis]].float()[:, None] for table in (rotary.cos_PR, rotary.sin_PR))
        if inverse:
            sin_T1R = -sin_T1R
        start, stop = 2 * pairs * axis, 2 * pairs * (axis + 1)
        first = slice(start, stop, 2) if rotary.interleaved else slice(start, start + pairs)
        second = slice(start + 1, stop, 2) if rotary.interleaved else slice(start + pairs, stop)
        out_Thd[..., first] = x_Thd[..., first] * cos_T1R - x_Thd[..., second] * sin_T1R
        out_Thd[..., second] = x_Thd[..., second] * cos_T1R + x_Thd[..., first] * sin_T1R
    return out_Thd


def _check(rotary: Rotary, positions_AT: torch.Tensor, norm: HeadNorm | None = None) -> None:
    positions, pairs = rotary.cos_PR.shape
    require("cos_PR", rotary.cos_PR, positions, pairs)
    require("sin_PR", rotary.sin_PR, positions, pairs)
    require("positions_AT", positions_AT, rotary.axes, positions_AT.shape[1])
    if rotary.sin_PR.shape != rotary.cos_PR.shape or not 0 < 2 * pairs * rotary.axes <= rotary.head_dim:
        raise ValueError(
            f"tables of {pairs} (cos) and {rotary.sin_PR.shape[1]} (sin) columns for heads of {rotary.head_dim} and "
            f"{rotary.axes} axes; pass two of the same shape with at most head_dim / 2 columns for all axes"
        )
    if norm is not None:
        if rotary.fused or rotary.axes > 1:
            raise ValueError("heads that are fused or have two axes cannot be normed; pass rows of q, then k, then v")
        require_vector("q_weight_d", norm.q_weight_d, rotary.head_dim)
        require_vector("k_weight_d", norm.k_weight_d, rotary.head_dim)


def _check_gradients(buffers: Gradients, rotary: Rotary, positions_AT: torch.Tensor) -> tuple[int, int]:
    """Refuse buffers of q, k and v that do not fit together; how many heads and key heads they have."""
    q, k, v = (buffer.shape[1] for buffer in buffers)
    if q % rotary.head_dim or k % rotary.head_dim or k != v:
        raise ValueError(
            f"rows of {q} (q), {k} (k) and {v} (v) values for heads of {rotary.head_dim}; pass whole heads, "
            "as many of v as of k"
        )
    for name, buffer in zip(("q", "k", "v"), buffers, strict=True):
        require(name, buffer, positions_AT.shape[1], buffer.shape[1])
    return q // rotary.head_dim, k // rotary.head_dim
