"""The Triton bodies of `rope.py`: one program handles several heads of one token; imported only where they run.

A tile is (heads, pairs): `a` holds the first values of the pairs, `b` the second. R, D and all tile sizes are
compile-time constants, so that masks vanish and accesses are as wide as the shape of a head allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two
from fitune.kernels.rope import Gradients, HeadNorm, Rotary

PAIRS_PER_PROGRAM = 1024  # with four warps two 16-byte accesses of a 2-byte dtype for each thread


def rotate(
    x_Tn: torch.Tensor, rotary: Rotary, positions_T: torch.Tensor, heads: int, out_Tn: torch.Tensor, inverse: bool
) -> None:
    """Triton `rotate`, and with inverse `rotate_backward`."""
    tile = _tile(rotary, heads)
    _rotate[(positions_T.shape[0], triton.cdiv(heads, tile["HB"]))](
        x_Tn,
        out_Tn,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_T,
        x_Tn.stride(0),
        out_Tn.stride(0),
        rotary.cos_PR.stride(0),
        rotary.sin_PR.stride(0),
        heads,
        INVERSE=inverse,
        **tile,
        num_warps=4,
    )


def pack_gradients(
    dq_Tq: torch.Tensor,
    dk_Tk: torch.Tensor,
    dv_Tk: torch.Tensor,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Triton `pack_gradients`."""
    heads, kv_heads = dq_Tq.shape[1] // rotary.head_dim, dk_Tk.shape[1] // rotary.head_dim
    tile = _tile(rotary, heads)
    q_blocks, kv_blocks = triton.cdiv(heads, tile["HB"]), triton.cdiv(kv_heads, tile["HB"])
    _pack[(positions_T.shape[0], q_blocks + 2 * kv_blocks)](
        dq_Tq,
        dk_Tk,
        dv_Tk,
        out_Tn,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_T,
        dq_Tq.stride(0),
        dk_Tk.stride(0),
        dv_Tk.stride(0),
        out_Tn.stride(0),
        rotary.cos_PR.stride(0),
        rotary.sin_PR.stride(0),
        heads,
        kv_heads,
        QB=q_blocks,
        KB=kv_blocks,
        DB=power_of_two(rotary.head_dim),
        **tile,
        num_warps=4,
    )


def qk_norm_rotate(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
    q_Tq: torch.Tensor,
    k_Tk: torch.Tensor,
) -> None:
    """Triton `qk_norm_rotate`."""
    heads, kv_heads = q_Tq.shape[1] // rotary.head_dim, k_Tk.shape[1] // rotary.head_dim
    tile = _tile(rotary, heads)
    q_blocks = triton.cdiv(heads, tile["HB"])
    _qk_norm_rotate[(positions_T.shape[0], q_blocks + triton.cdiv(kv_heads, tile["HB"]))](
        qkv_Tn,
        q_Tq,
        k_Tk,
        norm.q_weight_d,
        norm.k_weight_d,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_T,
        qkv_Tn.stride(0),
        q_Tq.stride(0),
        k_Tk.stride(0),
        rotary.cos_PR.stride(0),
        rotary.sin_PR.stride(0),
        norm.eps,
        heads,
        kv_heads,
        QB=q_blocks,
        **tile,
        num_warps=4,
    )


def qk_norm_rotate_backward(
    grads: Gradients,
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_T: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Triton `qk_norm_rotate_backward`."""
    heads, kv_heads = grads[0].shape[1] // rotary.head_dim, grads[1].shape[1] // rotary.head_dim
    tile = _tile(rotary, heads)
    q_blocks, kv_blocks = triton.cdiv(heads, tile["HB"]), triton.cdiv(kv_heads, tile["HB"])
    _qk_norm_rotate_backward[(positions_T.shape[0], q_blocks + 2 * kv_blocks)](
        *grads,
        qkv_Tn,
        out_Tn,
        norm.q_weight_d,
        norm.k_weight_d,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_T,
        *(x.stride(0) for x in (*grads, qkv_Tn, out_Tn, rotary.cos_PR, rotary.sin_PR)),
        norm.eps,
        heads,
        kv_heads,
        QB=q_blocks,
        KB=kv_blocks,
        DB=power_of_two(rotary.head_dim),
        **tile,
        num_warps=4,
    )


def _tile(rotary: Rotary, heads: int) -> dict[str, int | bool]:
    """Compile-time shape: R pairs in tiles of RB, HB heads of D values, PB for the values past the pairs."""
    pairs = rotary.cos_PR.shape[1]
    wide, rest = power_of_two(pairs), rotary.head_dim - 2 * pairs
    return {
        "R": pairs,
        "D": rotary.head_dim,
        "RB": wide,
        "PB": power_of_two(rest) if rest else 0,
        "HB": max(1, min(PAIRS_PER_PROGRAM // wide, power_of_two(heads))),
        "INTERLEAVED": rotary.interleaved,
    }


@triton.jit
def _table(cos, sin, positions, row, sc, ss, R: tl.constexpr, RB: tl.constexpr):
    """cos and sin of this token, (1, RB) fp32."""
    position = tl.load(positions + row).to(tl.int64)
    r = tl.arange(0, RB)
    c = tl.load(cos + position * sc + r, mask=r < R, other=0.0).to(tl.float32)
    s = tl.load(sin + position * ss + r, mask=r < R, other=0.0).to(tl.float32)
    return c[None, :], s[None, :]


@triton.jit
def _load(p, h, heads, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of heads h, two fp32 tiles; an interleaved row is read whole and split in registers."""
    if INTERLEAVED:
        c = tl.arange(0, 2 * RB)
        keep = (h < heads)[:, None] & (c < 2 * R)[None, :]
        both = tl.load(p + h[:, None] * D + c[None, :], mask=keep, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [h.shape[0], RB, 2]))
    else:
        r = tl.arange(0, RB)
        keep = (h < heads)[:, None] & (r < R)[None, :]
        a = tl.load(p + h[:, None] * D + r[None, :], mask=keep, other=0.0).to(tl.float32)
        b = tl.load(p + h[:, None] * D + (R + r)[None, :], mask=keep, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(p, h, heads, a, b, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        c = tl.arange(0, 2 * RB)
        keep = (h < heads)[:, None] & (c < 2 * R)[None, :]
        both = tl.reshape(tl.join(a, b), [h.shape[0], 2 * RB])
        tl.store(p + h[:, None] * D + c[None, :], both.to(p.dtype.element_ty), mask=keep)
    else:
        r = tl.arange(0, RB)
        keep = (h < heads)[:, None] & (r < R)[None, :]
        tl.store(p + h[:, None] * D + r[None, :], a.to(p.dtype.element_ty), mask=keep)
        tl.store(p + h[:, None] * D + (R + r)[None, :], b.to(p.dtype.element_ty), mask=keep)


@triton.jit
def _load_rest(p, h, heads, START: tl.constexpr, D: tl.constexpr, PB: tl.constexpr):
    """The values START..D of heads h, (HB, PB)."""
    c = START + tl.arange(0, PB)
    return tl.load(p + h[:, None] * D + c[None, :], mask=(h < heads)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _store_rest(p, h, heads, x, START: tl.constexpr, D: tl.constexpr, PB: tl.constexpr):
    c = START + tl.arange(0, PB)
    keep = (h < heads)[:, None] & (c < D)[None, :]
    tl.store(p + h[:, None] * D + c[None, :], x.to(p.dtype.element_ty), mask=keep)


@triton.jit
def _turn(x, out, h, heads, c, s, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
          INTERLEAVED: tl.constexpr):  # fmt: skip
    """Rotate heads h of one row, values past the pairs copied; out may be x."""
    a, b = _load(x, h, heads, R, D, RB, INTERLEAVED)
    tl.debug_barrier()  # every thread has read its part before any writes
    _store(out, h, heads, a * c - b * s, b * c + a * s, R, D, RB, INTERLEAVED)
    if PB > 0:
        _store_rest(out, h, heads, _load_rest(x, h, heads, 2 * R, D, PB), 2 * R, D, PB)


@triton.jit
def _rotate(x, out, cos, sin, positions, sx, so, sc, ss, heads, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
            PB: tl.constexpr, HB: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    c, s = _table(cos, sin, positions, row, sc, ss, R, RB)
    if INVERSE:
        s = -s
    _turn(x + row * sx, out + row * so, h, heads, c, s, R, D, RB, PB, INTERLEAVED)


@triton.jit
def _pack(dq, dk, dv, out, cos, sin, positions, sq, sk, sv, so, sc, ss, heads, kv_heads, QB: tl.constexpr,
          KB: tl.constexpr, DB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
          HB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    h = block * HB + tl.arange(0, HB)
    to = out + row * so
    if block < QB + KB:
        c, s = _table(cos, sin, positions, row, sc, ss, R, RB)
        if block < QB:
            _turn(dq + row * sq, to, h, heads, c, -s, R, D, RB, PB, INTERLEAVED)
        else:
            _turn(dk + row * sk, to + heads * D, h - QB * HB, kv_heads, c, -s, R, D, RB, PB, INTERLEAVED)
    else:
        g = h - (QB + KB) * HB
        v = _load_rest(dv + row * sv, g, kv_heads, 0, D, DB)
        _store_rest(to + (heads + kv_heads) * D, g, kv_heads, v, 0, D, DB)


@triton.jit
def _rstd(a, b, rest, eps, D: tl.constexpr, PB: tl.constexpr):
    """1 / rms of each head, (HB, 1)."""
    square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if PB > 0:
        square += tl.sum(rest * rest, 1)
    return tl.rsqrt(square / D + eps)[:, None]


@triton.jit
def _weighted(x, rstd, w, ROUND: tl.constexpr):
    """Rounds twice, as Qwen3RMSNorm does before the rotation."""
    return ((x * rstd).to(ROUND).to(tl.float32) * w).to(ROUND).to(tl.float32)


@triton.jit
def _norm_turn(x, out, weight, h, heads, c, s, eps, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
               PB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    a, b = _load(x, h, heads, R, D, RB, INTERLEAVED)
    wa, wb = _load(weight, tl.arange(0, 1), 1, R, D, RB, INTERLEAVED)
    rest = a
    if PB > 0:
        rest = _load_rest(x, h, heads, 2 * R, D, PB).to(tl.float32)
    rstd = _rstd(a, b, rest, eps, D, PB)
    a, b = _weighted(a, rstd, wa, dtype), _weighted(b, rstd, wb, dtype)
    _store(out, h, heads, a * c - b * s, b * c + a * s, R, D, RB, INTERLEAVED)
    if PB > 0:
        wrest = _load_rest(weight, tl.arange(0, 1), 1, 2 * R, D, PB).to(tl.float32)
        _store_rest(out, h, heads, _weighted(rest, rstd, wrest, dtype), 2 * R, D, PB)


@triton.jit
def _qk_norm_rotate(qkv, q, k, q_weight, k_weight, cos, sin, positions, sx, sq, sk, sc, ss, eps, heads, kv_heads,
                    QB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
                    HB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    h = block * HB + tl.arange(0, HB)
    x = qkv + row * sx
    c, s = _table(cos, sin, positions, row, sc, ss, R, RB)
    if block < QB:
        _norm_turn(x, q + row * sq, q_weight, h, heads, c, s, eps, R, D, RB, PB, INTERLEAVED)
    else:
        _norm_turn(x + heads * D, k + row * sk, k_weight, h - QB * HB, kv_heads, c, s, eps, R, D, RB, PB, INTERLEAVED)


@triton.jit
def _norm_turn_backward(d, x, out, weight, h, heads, c, s, eps, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
                        PB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    a, b = _load(x, h, heads, R, D, RB, INTERLEAVED)
    da, db = _load(d, h, heads, R, D, RB, INTERLEAVED)
    wa, wb = _load(weight, tl.arange(0, 1), 1, R, D, RB, INTERLEAVED)
    ga, gb = (da * c + db * s) * wa, (db * c - da * s) * wb
    rest = a
    if PB > 0:
        rest = _load_rest(x, h, heads, 2 * R, D, PB).to(tl.float32)
    rstd = _rstd(a, b, rest, eps, D, PB)
    dot = tl.sum(ga * a, 1) + tl.sum(gb * b, 1)
    if PB > 0:
        grest = _load_rest(d, h, heads, 2 * R, D, PB).to(tl.float32)
        grest *= _load_rest(weight, tl.arange(0, 1), 1, 2 * R, D, PB).to(tl.float32)
        dot += tl.sum(grest * rest, 1)
    share = dot[:, None] * rstd * rstd / D
    tl.debug_barrier()  # out may be x: every thread has read its part before any writes
    _store(out, h, heads, rstd * (ga - a * share), rstd * (gb - b * share), R, D, RB, INTERLEAVED)
    if PB > 0:
        _store_rest(out, h, heads, rstd * (grest - rest * share), 2 * R, D, PB)


@triton.jit
def _qk_norm_rotate_backward(
    dq, dk, dv, qkv, out, q_weight, k_weight, cos, sin, positions, sq, sk, sv, sx, so, sc, ss, eps, heads, kv_heads,
    QB: tl.constexpr, KB: tl.constexpr, DB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
    PB: tl.constexpr, HB: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    h = block * HB + tl.arange(0, HB)
    x, to, k_start = qkv + row * sx, out + row * so, heads * D
    if block < QB + KB:
        c, s = _table(cos, sin, positions, row, sc, ss, R, RB)
        if block < QB:
            _norm_turn_backward(
                dq + row * sq, x, to, q_weight, h, heads, c, s, eps, R, D, RB, PB, INTERLEAVED
            )  # fmt: skip
        else:
            _norm_turn_backward(
                dk + row * sk, x + k_start, to + k_start, k_weight, h - QB * HB, kv_heads, c, s, eps, R, D, RB, PB,
                INTERLEAVED,
            )  # fmt: skip
    else:
        g = h - (QB + KB) * HB
        v = _load_rest(dv + row * sv, g, kv_heads, 0, D, DB)
        _store_rest(to + (heads + kv_heads) * D, g, kv_heads, v, 0, D, DB)
