"""Rotary positions on rows of heads, alone or behind the q and k norms of Qwen3, and their gradients.

A row holds heads one after another. The first 2 R values of a head are rotated in R pairs, (i, i + R) or, for
interleaved models, (2 i, 2 i + 1); the rest of the head is left alone. The angle tables have one row for each
position and are indexed by position here, so tokens of many sequences can stand in any order. The gradient of
a rotation is the rotation with sin negated (with scaled tables too, for which it is not the inverse).
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
        head_dim: values of a head, at least 2 R.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + R).
    """

    cos_PR: torch.Tensor
    sin_PR: torch.Tensor
    head_dim: int
    interleaved: bool


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


def rotate(x_Tn: torch.Tensor, rotary: Rotary, positions_T: torch.Tensor, heads: int, out_Tn: torch.Tensor) -> None:
    """Rotate the first heads of each row by the position of its token; fp32 inside, rounded once.

    Args:
        x_Tn: (T, heads * head_dim or more) read.
        rotary: tables and layout.
        positions_T: (T,) int32 or int64, below P (not checked).
        heads: how many heads from the start of the row.
        out_Tn: (T, heads * head_dim or more) written in its first heads * head_dim columns; may be x itself.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about four fp32 copies of the heads.
    Source: RoFormer, arXiv:2104.09864. Differs: pairs (i, i + R) unless interleaved, as transformers.
    """
    _rotate_either(x_Tn, rotary, positions_T, heads, out_Tn, False)


def rotate_backward(
    g_Tn: torch.Tensor, rotary: Rotary, positions_T: torch.Tensor, heads: int, out_Tn: torch.Tensor
) -> None:
    """Write the gradient of `rotate`'s input: the same with sin negated. out may be g itself."""
    _rotate_either(g_Tn, rotary, positions_T, heads, out_Tn, True)


def _rotate_either(
    x_Tn: torch.Tensor, rotary: Rotary, positions_T: torch.Tensor, heads: int, out_Tn: torch.Tensor, inverse: bool
) -> None:
    _check(rotary, positions_T)
    for name, buffer in (("x_Tn", x_Tn), ("out_Tn", out_Tn)):
        require(name, buffer, positions_T.shape[0], heads * rotary.head_dim)
    if use_triton(x_Tn):
        from fitune.kernels import rope_triton

        rope_triton.rotate(x_Tn, rotary, positions_T, heads, out_Tn, inverse)
    else:
        rotate_reference(x_Tn, rotary, positions_T, heads, out_Tn, inverse)


def rotate_reference(
    x_Tn: torch.Tensor,
    rotary: Rotary,
    positions_T: torch.Tensor,
    heads: int,
    out_Tn: torch.Tensor,
    inverse: bool = False,
) -> None:
    """Plain PyTorch `rotate`, and with inverse `rotate_backward`."""
    turned_Thd = _turned(_heads(x_Tn, heads, rotary), rotary, positions_T, inverse)
    _heads(out_Tn, heads, rotary).copy_(turned_Thd)


def pack_gradients(
    dq_Tq: torch.Tensor,
    dk_Tk: torch.Tensor,
    dv_Tk: torch.Tensor,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Write one row of gradients of q, k and v: dq and dk rotated back, dv as it is.

    Args:
        dq_Tq: (T, heads * head_dim); its width says how many heads.
        dk_Tk: (T, kv_heads * head_dim); its width says how many key heads.
        dv_Tk: (T, kv_heads * head_dim).
        rotary: tables and layout.
        positions_T: (T,) int32 or int64, below P (not checked).
        out_Tn: (T, (heads + 2 kv_heads) * head_dim or more) written; must not overlap the others.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about four fp32 copies of dq.
    """
    _check(rotary, positions_T)
    heads, kv_heads = _check_gradients((dq_Tq, dk_Tk, dv_Tk), rotary, positions_T)
    require("out_Tn", out_Tn, positions_T.shape[0], (heads + 2 * kv_heads) * rotary.head_dim)
    if use_triton(dq_Tq):
        from fitune.kernels import rope_triton

        rope_triton.pack_gradients(dq_Tq, dk_Tk, dv_Tk, rotary, positions_T, out_Tn)
    else:
        pack_gradients_reference(dq_Tq, dk_Tk, dv_Tk, rotary, positions_T, out_Tn)


def pack_gradients_reference(
    dq_Tq: torch.Tensor,
    dk_Tk: torch.Tensor,
    dv_Tk: torch.Tensor,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Plain PyTorch `pack_gradients`."""
    q, k = dq_Tq.shape[1], dk_Tk.shape[1]
    rotate_reference(dq_Tq, rotary, positions_T, q // rotary.head_dim, out_Tn, True)
    rotate_reference(dk_Tk, rotary, positions_T, k // rotary.head_dim, out_Tn[:, q:], True)
    out_Tn[:, q + k : q + 2 * k] = dv_Tk


def qk_norm_rotate(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
    q_Tq: torch.Tensor,
    k_Tk: torch.Tensor,
) -> None:
    """RMS-normalize each head of q and k, then rotate them; qkv is left as it is.

    Args:
        qkv_Tn: (T, (heads + 2 kv_heads) * head_dim or more), q then k then v.
        norm: weights of the two norms; rounds as Qwen3RMSNorm.
        rotary: tables and layout.
        positions_T: (T,) int32 or int64, below P (not checked).
        q_Tq: (T, heads * head_dim) written; its width says how many heads. Must not overlap qkv.
        k_Tk: (T, kv_heads * head_dim) written; its width says how many key heads.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about six fp32 copies of q.
    Source: query-key normalization, arXiv:2010.04245. Differs: RMS norm with a weight for each value of a head.
    """
    _check(rotary, positions_T, norm)
    heads, kv_heads = _check_gradients((q_Tq, k_Tk, k_Tk), rotary, positions_T)
    require("qkv_Tn", qkv_Tn, positions_T.shape[0], (heads + 2 * kv_heads) * rotary.head_dim)
    if use_triton(qkv_Tn):
        from fitune.kernels import rope_triton

        rope_triton.qk_norm_rotate(qkv_Tn, norm, rotary, positions_T, q_Tq, k_Tk)
    else:
        qk_norm_rotate_reference(qkv_Tn, norm, rotary, positions_T, q_Tq, k_Tk)


def qk_norm_rotate_reference(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
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
        _heads(out_Tn, heads, rotary).copy_(_turned(y_Thd.to(qkv_Tn.dtype), rotary, positions_T, False))
        start += out_Tn.shape[1]


def qk_norm_rotate_backward(
    grads: Gradients,
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Write one row of gradients of q, k and v as they were before norm and rotation; weights get none.

    Args:
        grads: dq (T, heads * head_dim), dk and dv (T, kv_heads * head_dim); the widths say how many heads.
        qkv_Tn: (T, (heads + 2 kv_heads) * head_dim or more) what `qk_norm_rotate` read.
        norm: weights of the two norms.
        rotary: tables and layout.
        positions_T: (T,) int32 or int64, below P (not checked).
        out_Tn: (T, as many columns) written; may be qkv itself.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA, the statistics are computed again; on CPU about eight fp32 copies of dq.
    """
    _check(rotary, positions_T, norm)
    heads, kv_heads = _check_gradients(grads, rotary, positions_T)
    for name, buffer in (("qkv_Tn", qkv_Tn), ("out_Tn", out_Tn)):
        require(name, buffer, positions_T.shape[0], (heads + 2 * kv_heads) * rotary.head_dim)
    if use_triton(qkv_Tn):
        from fitune.kernels import rope_triton

        rope_triton.qk_norm_rotate_backward(grads, qkv_Tn, norm, rotary, positions_T, out_Tn)
    else:
        qk_norm_rotate_backward_reference(grads, qkv_Tn, norm, rotary, positions_T, out_Tn)


def qk_norm_rotate_backward_reference(
    grads: Gradients,
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Plain PyTorch `qk_norm_rotate_backward`."""
    start = 0
    for weight_d, d_Tn in ((norm.q_weight_d, grads[0]), (norm.k_weight_d, grads[1])):
        heads = d_Tn.shape[1] // rotary.head_dim
        x_Thd = _heads(qkv_Tn[:, start:], heads, rotary).float()
        rstd_Th1 = torch.rsqrt(x_Thd.pow(2).mean(-1, keepdim=True) + norm.eps)
        hat_Thd = x_Thd * rstd_Th1
        g_Thd = _turned(_heads(d_Tn, heads, rotary), rotary, positions_T, True) * weight_d.float()
        dx_Thd = rstd_Th1 * (g_Thd - hat_Thd * (g_Thd * hat_Thd).mean(-1, keepdim=True))
        _heads(out_Tn[:, start:], heads, rotary).copy_(dx_Thd)
        start += d_Tn.shape[1]
    out_Tn[:, start : start + grads[2].shape[1]] = grads[2]


def _heads(x_Tn: torch.Tensor, heads: int, rotary: Rotary) -> torch.Tensor:
    """(T, heads, head_dim) view of the first heads of each row."""
    return x_Tn[:, : heads * rotary.head_dim].view(x_Tn.shape[0], heads, rotary.head_dim)


def _turned(x_Thd: torch.Tensor, rotary: Rotary, positions_T: torch.Tensor, inverse: bool) -> torch.Tensor:
    """A new fp32 (T, heads, head_dim): x rotated, the values past 2 R copied."""
    pairs = rotary.cos_PR.shape[1]
    cos_T1R = rotary.cos_PR[positions_T].float()[:, None]
    sin_T1R = rotary.sin_PR[positions_T].float()[:, None]
    if inverse:
        sin_T1R = -sin_T1R
    first = slice(0, 2 * pairs, 2) if rotary.interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if rotary.interleaved else slice(pairs, 2 * pairs)
    x_Thd = x_Thd.float()
    out_Thd = x_Thd.clone()
    out_Thd[..., first] = x_Thd[..., first] * cos_T1R - x_Thd[..., second] * sin_T1R
    out_Thd[..., second] = x_Thd[..., second] * cos_T1R + x_Thd[..., first] * sin_T1R
    return out_Thd


def _check(rotary: Rotary, positions_T: torch.Tensor, norm: HeadNorm | None = None) -> None:
    positions, pairs = rotary.cos_PR.shape
    require("cos_PR", rotary.cos_PR, positions, pairs)
    require("sin_PR", rotary.sin_PR, positions, pairs)
    require_vector("positions_T", positions_T, positions_T.shape[0])
    if rotary.sin_PR.shape != rotary.cos_PR.shape or not 0 < 2 * pairs <= rotary.head_dim:
        raise ValueError(
            f"tables of {pairs} (cos) and {rotary.sin_PR.shape[1]} (sin) columns for heads of {rotary.head_dim}; "
            "pass two of the same shape with at most head_dim / 2 columns"
        )
    if norm is not None:
        require_vector("q_weight_d", norm.q_weight_d, rotary.head_dim)
        require_vector("k_weight_d", norm.k_weight_d, rotary.head_dim)


def _check_gradients(buffers: Gradients, rotary: Rotary, positions_T: torch.Tensor) -> tuple[int, int]:
    """Refuse buffers of q, k and v that do not fit together; how many heads and key heads they have."""
    q, k, v = (buffer.shape[1] for buffer in buffers)
    if q % rotary.head_dim or k % rotary.head_dim or k != v:
        raise ValueError(
            f"rows of {q} (q), {k} (k) and {v} (v) values for heads of {rotary.head_dim}; pass whole heads, "
            "as many of v as of k"
        )
    for name, buffer in zip(("q", "k", "v"), buffers, strict=True):
        require(name, buffer, positions_T.shape[0], buffer.shape[1])
    return q // rotary.head_dim, k // rotary.head_dim
