"""The Triton bodies of `rope.py`: one program handles several heads of one token; imported only where they run.

A tile is (heads, pairs): `a` holds the first values of the pairs of all axes, `b` the second. R, D and all tile sizes
are compile-time constants, so that masks vanish and accesses are as wide as the shape of a head allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels.launch import power_of_two
from fitune.kernels.rope import Gradients, HeadNorm, Rotary

PAIRS_PER_PROGRAM = 1024  # with four warps two 16-byte accesses of a 2-byte dtype for each thread


def rotate(
    x_Tn: torch.Tensor, rotary: Rotary, positions_AT: torch.Tensor, heads: int, out_Tn: torch.Tensor, inverse: bool
) -> None:
    """Triton `rotate`, and with inverse `rotate_backward`; in place nothing past the pairs is touched."""
    tile = _tile(rotary, heads)
    if x_Tn.data_ptr() == out_Tn.data_ptr() and x_Tn.stride(0) == out_Tn.stride(0):
        tile["PB"] = 0
    _rotate[(positions_AT.shape[1], triton.cdiv(heads, tile["HB"]))](
        x_Tn,
        out_Tn,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_AT,
        x_Tn.stride(0),
        out_Tn.stride(0),
        rotary.cos_PR.stride(0),
        rotary.sin_PR.stride(0),
        positions_AT.stride(0),
        heads,
        AXES=rotary.axes,
        FUSED=rotary.fused,
        INVERSE=inverse,
        **tile,
        num_warps=4,
    )


def qk_norm_rotate(
    qkv_Tn: torch.Tensor,
    norm: HeadNorm,
    rotary: Rotary,
    positions_AT: torch.Tensor,
    q_Tq: torch.Tensor,
    k_Tk: torch.Tensor,
) -> None:
    """Triton `qk_norm_rotate`."""
    heads, kv_heads = q_Tq.shape[1] // rotary.head_dim, k_Tk.shape[1] // rotary.head_dim
    tile = _tile(rotary, heads)
    q_blocks = triton.cdiv(heads, tile["HB"])
    _qk_norm_rotate[(positions_AT.shape[1], q_blocks + triton.cdiv(kv_heads, tile["HB"]))](
        qkv_Tn,
        q_Tq,
        k_Tk,
        norm.q_weight_d,
        norm.k_weight_d,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_AT,
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
    positions_AT: torch.Tensor,
    out_Tn: torch.Tensor,
) -> None:
    """Triton `qk_norm_rotate_backward`."""
    heads, kv_heads = grads[0].shape[1] // rotary.head_dim, grads[1].shape[1] // rotary.head_dim
    tile = _tile(rotary, heads)
    q_blocks, kv_blocks = triton.cdiv(heads, tile["HB"]), triton.cdiv(kv_heads, tile["HB"])
    _qk_norm_rotate_backward[(positions_AT.shape[1], q_blocks + 2 * kv_blocks)](
        *grads,
        qkv_Tn,
        out_Tn,
        norm.q_weight_d,
        norm.k_weight_d,
        rotary.cos_PR,
        rotary.sin_PR,
        positions_AT,
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
    """Compile-time shape: R pairs (of each axis) in tiles of RB, HB heads of D values, PB for those past the pairs."""
    pairs = rotary.cos_PR.shape[1]
    wide, rest = power_of_two(pairs * rotary.axes), rotary.head_dim - 2 * pairs * rotary.axes
    return {
        "R": pairs,
        "D": rotary.head_dim,
        "RB": wide,
        "PB": power_of_two(rest) if rest else 0,
        "HB": max(1, min(PAIRS_PER_PROGRAM // wide, power_of_two(heads))),
        "INTERLEAVED": rotary.interleaved,
    }


@triton.jit
def _table(cos, sin, positions, row, sc, ss, sp, R: tl.constexpr, RB: tl.constexpr, AXES: tl.constexpr):
    """cos and sin of this token, (1, RB) fp32; with several axes those of one position after another."""
    r = tl.arange(0, RB)
    if AXES == 1:
        position = tl.load(positions + row).to(tl.int64)
        pair = r
    else:
        position = tl.load(positions + r // R * sp + row, mask=r < AXES * R, other=0).to(tl.int64)
        pair = r % R
    c = tl.load(cos + position * sc + pair, mask=r < AXES * R, other=0.0).to(tl.float32)
    s = tl.load(sin + position * ss + pair, mask=r < AXES * R, other=0.0).to(tl.float32)
    return c[None, :], s[None, :]


@triton.jit
def _first(R: tl.constexpr, RB: tl.constexpr, AXES: tl.constexpr):
    """Where in a head the first value of each pair stands, if the second is R further: axes take 2 R values each."""
    r = tl.arange(0, RB)
    if AXES > 1:
        r += r // R * R
    return r


@triton.jit
def _load(p, at, keep_h, R: tl.constexpr, RB: tl.constexpr, AXES: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of the heads at `at`, two fp32 tiles; an interleaved row is read whole and split in registers."""
    if INTERLEAVED:
        c = tl.arange(0, 2 * RB)
        keep = keep_h[:, None] & (c < 2 * R * AXES)[None, :]
        both = tl.load(p + at[:, None] + c[None, :], mask=keep, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [at.shape[0], RB, 2]))
    else:
        c = _first(R, RB, AXES)
        keep = keep_h[:, None] & (tl.arange(0, RB) < R * AXES)[None, :]
        a = tl.load(p + at[:, None] + c[None, :], mask=keep, other=0.0).to(tl.float32)
        b = tl.load(p + at[:, None] + (R + c)[None, :], mask=keep, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(p, at, keep_h, a, b, R: tl.constexpr, RB: tl.constexpr, AXES: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        c = tl.arange(0, 2 * RB)
        keep = keep_h[:, None] & (c < 2 * R * AXES)[None, :]
        both = tl.reshape(tl.join(a, b), [at.shape[0], 2 * RB])
        tl.store(p + at[:, None] + c[None, :], both.to(p.dtype.element_ty), mask=keep)
    else:
        c = _first(R, RB, AXES)
        keep = keep_h[:, None] & (tl.arange(0, RB) < R * AXES)[None, :]
        tl.store(p + at[:, None] + c[None, :], a.to(p.dtype.element_ty), mask=keep)
        tl.store(p + at[:, None] + (R + c)[None, :], b.to(p.dtype.element_ty), mask=keep)


@triton.jit
def _load_rest(p, at, keep_h, START: tl.constexpr, D: tl.constexpr, PB: tl.constexpr):
    """The values START..D of the heads at `at`, (HB, PB)."""
    c = START + tl.arange(0, PB)
    return tl.load(p + at[:, None] + c[None, :], mask=keep_h[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def _store_rest(p, at, keep_h, x, START: tl.constexpr, D: tl.constexpr, PB: tl.constexpr):
    c = START + tl.arange(0, PB)
    keep = keep_h[:, None] & (c < D)[None, :]
    tl.store(p + at[:, None] + c[None, :], x.to(p.dtype.element_ty), mask=keep)


@triton.jit
def _rotate(x, out, cos, sin, positions, sx, so, sc, ss, sp, heads, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
            PB: tl.constexpr, HB: tl.constexpr, INTERLEAVED: tl.constexpr, AXES: tl.constexpr, FUSED: tl.constexpr,
            INVERSE: tl.constexpr):  # fmt: skip
    """HB heads of one row, values past the pairs copied; out may be x."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    keep = h < heads
    at = h * D
    if FUSED:  # q0 k0 v0 q1 k1 v1 ...: every third head is passed over
        at = (h + h // 2) * D
    c, s = _table(cos, sin, positions, row, sc, ss, sp, R, RB, AXES)
    if INVERSE:
        s = -s
    a, b = _load(x + row * sx, at, keep, R, RB, AXES, INTERLEAVED)
    if PB > 0:
        rest = _load_rest(x + row * sx, at, keep, 2 * R * AXES, D, PB)
    tl.debug_barrier()  # every thread has read its part before any writes
    _store(out + row * so, at, keep, a * c - b * s, b * c + a * s, R, RB, AXES, INTERLEAVED)
    if PB > 0:
        _store_rest(out + row * so, at, keep, rest, 2 * R * AXES, D, PB)


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
    at, keep, one = h * D, h < heads, tl.arange(0, 1)
    a, b = _load(x, at, keep, R, RB, 1, INTERLEAVED)
    wa, wb = _load(weight, one, one < 1, R, RB, 1, INTERLEAVED)
    rest = a
    if PB > 0:
        rest = _load_rest(x, at, keep, 2 * R, D, PB).to(tl.float32)
    rstd = _rstd(a, b, rest, eps, D, PB)
    a, b = _weighted(a, rstd, wa, dtype), _weighted(b, rstd, wb, dtype)
    _store(out, at, keep, a * c - b * s, b * c + a * s, R, RB, 1, INTERLEAVED)
    if PB > 0:
        wrest = _load_rest(weight, one, one < 1, 2 * R, D, PB).to(tl.float32)
        _store_rest(out, at, keep, _weighted(rest, rstd, wrest, dtype), 2 * R, D, PB)


@triton.jit
def _qk_norm_rotate(qkv, q, k, q_weight, k_weight, cos, sin, positions, sx, sq, sk, sc, ss, eps, heads, kv_heads,
                    QB: tl.constexpr, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr, PB: tl.constexpr,
                    HB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    h = block * HB + tl.arange(0, HB)
    x = qkv + row * sx
    c, s = _table(cos, sin, positions, row, sc, ss, 0, R, RB, 1)
    if block < QB:
        _norm_turn(x, q + row * sq, q_weight, h, heads, c, s, eps, R, D, RB, PB, INTERLEAVED)
    else:
        _norm_turn(x + heads * D, k + row * sk, k_weight, h - QB * HB, kv_heads, c, s, eps, R, D, RB, PB, INTERLEAVED)


@triton.jit
def _norm_turn_backward(d, x, out, weight, h, heads, c, s, eps, R: tl.constexpr, D: tl.constexpr, RB: tl.constexpr,
                        PB: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    at, keep, one = h * D, h < heads, tl.arange(0, 1)
    a, b = _load(x, at, keep, R, RB, 1, INTERLEAVED)
    da, db = _load(d, at, keep, R, RB, 1, INTERLEAVED)
    wa, wb = _load(weight, one, one < 1, R, RB, 1, INTERLEAVED)
    ga, gb = (da * c + db * s) * wa, (db * c - da * s) * wb
    rest = a
    if PB > 0:
        rest = _load_rest(x, at, keep, 2 * R, D, PB).to(tl.float32)
    rstd = _rstd(a, b, rest, eps, D, PB)
    dot = tl.sum(ga * a, 1) + tl.sum(gb * b, 1)
    if PB > 0:
        grest = _load_rest(d, at, keep, 2 * R, D, PB).to(tl.float32)
        grest *= _load_rest(weight, one, one < 1, 2 * R, D, PB).to(tl.float32)
        dot += tl.sum(grest * rest, 1)
    share = dot[:, None] * rstd * rstd / D
    tl.debug_barrier()  # out may be x or d: every thread has read its part before any writes
    _store(out, at, keep, rstd * (ga - a * share), rstd * (gb - b * share), R, RB, 1, INTERLEAVED)
    if PB > 0:
        _store_rest(out, at, keep, rstd * (grest - rest * share), 2 * R, D, PB)


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
        c, s = _table(cos, sin, positions, row, sc, ss, 0, R, RB, 1)
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
        v = _load_rest(dv + row * sv, g * D, g < kv_heads, 0, D, DB)
        _store_rest(to + (heads + kv_heads) * D, g * D, g < kv_heads, v, 0, D, DB)
