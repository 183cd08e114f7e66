"""The three Triton kernels of attention: forward, gradient of the queries, gradients of keys and values.

A program owns one block of rows of one head and walks over blocks of the other side. Which blocks those are follows
from the documents of its first and last row, read on the device: some need a mask (they cross the diagonal, the end of
a prefix, or the start or end of a document), all between them need none and run in a loop without one. Scores are kept
in units of log2, so that exp2 replaces exp. Every sum has one owner and one order: the same bits in every run.

Shapes: M rows of queries, N rows of keys, D head width; `stride` is the distance of two rows, HEAD that of two heads of
queries, of keys or of values, in elements. Heads of the output are D apart.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # a running maximum that no score is below, finite: -inf - -inf would be NaN


@triton.jit
def _tile(source, stride, row, left, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED, TMA):
    """(ROWS, WIDTH) of the head at column `left` from `row` on: zeros right of D, and from `limit` on if MASKED."""
    if TMA:
        return source.load([row, left])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, WIDTH)
        pointers = source + tl.cast(row, tl.int64) * stride + left + rows[:, None] * stride + columns[None, :]
        if MASKED:
            return tl.load(pointers, (row + rows < limit)[:, None] & (columns < D)[None, :], other=0.0)
        elif WIDTH != D:
            return tl.load(pointers, (columns < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _store(target, stride, row, left, limit, value, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    pointers = target + tl.cast(row, tl.int64) * stride + left + rows[:, None] * stride + columns[None, :]
    keep = (row + rows < limit)[:, None] & (columns < D)[None, :]
    tl.store(pointers, value.to(target.dtype.element_ty), keep)


@triton.jit
def _block(paired):
    """Which block this program takes: 0, 1, 2 ... or, if paired, the even ones upwards and then the odd ones downwards.

    Work grows or falls along a document, so neighbouring blocks do about the same. Where all programs start at once, a
    processor gets the i-th of each half: paired, that is one with much work and one with little.
    """
    block = tl.program_id(1)
    count = tl.num_programs(1)
    turned = tl.where(block < (count + 1) // 2, 2 * block, 2 * (count - 1 - block) + 1)
    return tl.where(paired != 0, turned, block)


@triton.jit
def _key_blocks(start, until, m0, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PREFIX: tl.constexpr):
    """Blocks of keys that rows m0 .. m0 + M see: first key, masked blocks before, unmasked blocks, all masked blocks.

    Keys before the start of the last row's document may be foreign to some row; keys from m0 on may be in the future,
    but for those of a prefix that all rows are in or behind.
    """
    stop = tl.minimum(m0 + BLOCK_M, T)
    first = tl.load(start + m0)
    start_last = tl.load(start + stop - 1)
    before = tl.cdiv(tl.maximum(start_last - first, 0), BLOCK_N)
    whole = m0
    if PREFIX:
        until_last = tl.load(until + stop - 1)
        whole = tl.where(start_last <= m0, tl.maximum(m0, until_last), m0)
        stop = tl.maximum(stop, until_last)
    inner = tl.maximum(whole - first - before * BLOCK_N, 0) // BLOCK_N
    after = tl.cdiv(tl.maximum(stop - first - (before + inner) * BLOCK_N, 0), BLOCK_N)
    return first, before, inner, before + after


@triton.jit
def _last_seen(until, row_M, T, PREFIX: tl.constexpr):
    """The last key that each row sees: itself, or the end of its document's prefix."""
    if PREFIX:
        return tl.maximum(row_M, tl.load(until + row_M, row_M < T, other=0) - 1)
    else:
        return row_M


@triton.jit
def _query_blocks(start, end, until, n0, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PREFIX: tl.constexpr):
    """Blocks of queries that see keys n0 .. n0 + N: first row, masked blocks before, unmasked blocks, all masked ones.

    Rows before the one that sees the last key need a mask, and rows behind the end of the first key's document.
    """
    last = tl.minimum(n0 + BLOCK_N, T) - 1
    stop = tl.load(end + last)
    if PREFIX:
        first = tl.where(n0 < tl.load(until + n0), tl.load(start + n0), n0)
        whole = tl.where(last < tl.load(until + last), tl.load(start + last), last)
        before = tl.cdiv(whole - first, BLOCK_M)
    else:
        first = n0
        before = tl.minimum((BLOCK_N + BLOCK_M - 1) // BLOCK_M, tl.cdiv(stop - n0, BLOCK_M))
    inner = tl.maximum(tl.load(end + n0) - first - before * BLOCK_M, 0) // BLOCK_M
    after = tl.cdiv(tl.maximum(stop - first - (before + inner) * BLOCK_M, 0), BLOCK_M)
    return first, before, inner, before + after


@triton.jit
def _softmax_step(
    q, k, v, accumulator, total, highest, scale2, bias_N, keep, MASKED: tl.constexpr, ALIBI: tl.constexpr
):
    """Add one block of keys to the running sums of the rows."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if ALIBI:
        scores = scores * scale2 + bias_N[None, :]
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    if ALIBI:
        now_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - now_highest[:, None])
    else:
        now_highest = tl.maximum(highest, tl.max(scores, 1) * scale2)
        weights = tl.exp2(scores * scale2 - now_highest[:, None])
    shrink = tl.exp2(highest - now_highest)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = accumulator * shrink[:, None]
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee")
    return accumulator, total, now_highest


@triton.jit(do_not_specialize=["paired"])
def forward_kernel(
    q, k, v, out, lse, start, until, slopes, q_stride, k_stride, v_stride, out_stride, T, scale, paired,
    GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, PREFIX: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of M rows of one head."""
    head = tl.program_id(0)
    # Late rows see most keys: they go first, so that no long program is left at the end.
    m0 = (tl.num_programs(1) - 1 - _block(paired)) * BLOCK_M
    row_M = m0 + tl.arange(0, BLOCK_M)
    column_N = tl.arange(0, BLOCK_N)
    start_M = tl.load(start + row_M, row_M < T, other=T)
    last_M = _last_seen(until, row_M, T, PREFIX)
    first, before, inner, masked = _key_blocks(start, until, m0, T, BLOCK_M, BLOCK_N, PREFIX)
    scale2 = scale * LOG2_E
    slope2 = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
    q_MD = _tile(q, q_stride, m0, head * HEAD, T, D, BLOCK_M, WIDTH, True, False)
    accumulator = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    for i in tl.range(0, masked):
        n0 = first + (i + tl.where(i >= before, inner, 0)) * BLOCK_N
        k_ND = _tile(k, k_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, True, TMA)
        v_ND = _tile(v, v_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, True, TMA)
        key_N = n0 + column_N
        keep = (key_N[None, :] <= last_M[:, None]) & (key_N[None, :] >= start_M[:, None])
        bias_N = slope2 * (key_N - m0).to(tl.float32)
        accumulator, total, highest = _softmax_step(
            q_MD, k_ND, v_ND, accumulator, total, highest, scale2, bias_N, keep, True, ALIBI
        )
    first += before * BLOCK_N
    for n0 in tl.range(first, first + inner * BLOCK_N, BLOCK_N):
        k_ND = _tile(k, k_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, False, TMA)
        v_ND = _tile(v, v_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, False, TMA)
        bias_N = slope2 * (n0 + column_N - m0).to(tl.float32)
        accumulator, total, highest = _softmax_step(
            q_MD, k_ND, v_ND, accumulator, total, highest, scale2, bias_N, None, False, ALIBI
        )
    total = tl.where(row_M < T, total, 1.0)
    _store(out, out_stride, m0, head * D, T, accumulator / total[:, None], D, BLOCK_M, WIDTH)
    lse_M = (highest + tl.log2(total) - slope2 * (row_M - m0).to(tl.float32)) * LN_2
    tl.store(lse + head * T + row_M, lse_M, row_M < T)


@triton.jit
def _dq_step(q, k, v, dout, dq, lse2_M, delta_M, scale2, bias_N, keep, MASKED: tl.constexpr, ALIBI: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse2_M[:, None]
    if ALIBI:
        scores += bias_N[None, :]
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    weights = tl.exp2(scores)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - delta_M[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["paired"])
def dq_kernel(
    q, k, v, out, dout, dq, lse, delta, start, until, slopes,
    q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride, T, scale, paired,
    GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, PREFIX: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of M rows of one query head, and delta = sum of dout * out of those rows for `dkv_kernel`."""
    head = tl.program_id(0)
    m0 = (tl.num_programs(1) - 1 - _block(paired)) * BLOCK_M
    row_M = m0 + tl.arange(0, BLOCK_M)
    column_N = tl.arange(0, BLOCK_N)
    start_M = tl.load(start + row_M, row_M < T, other=T)
    last_M = _last_seen(until, row_M, T, PREFIX)
    first, before, inner, masked = _key_blocks(start, until, m0, T, BLOCK_M, BLOCK_N, PREFIX)
    scale2 = scale * LOG2_E
    slope2 = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
    dout_MD = _tile(dout, dout_stride, m0, head * D, T, D, BLOCK_M, WIDTH, True, False)
    out_MD = _tile(out, out_stride, m0, head * D, T, D, BLOCK_M, WIDTH, True, False)
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_MD.to(tl.float32), 1)
    tl.store(delta + head * T + row_M, delta_M, row_M < T)
    q_MD = _tile(q, q_stride, m0, head * HEAD, T, D, BLOCK_M, WIDTH, True, False)
    lse2_M = tl.load(lse + head * T + row_M, row_M < T, other=0.0) * LOG2_E + slope2 * (row_M - m0).to(tl.float32)
    dq_MD = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for i in tl.range(0, masked):
        n0 = first + (i + tl.where(i >= before, inner, 0)) * BLOCK_N
        k_ND = _tile(k, k_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, True, TMA)
        v_ND = _tile(v, v_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, True, TMA)
        key_N = n0 + column_N
        keep = (key_N[None, :] <= last_M[:, None]) & (key_N[None, :] >= start_M[:, None])
        bias_N = slope2 * (key_N - m0).to(tl.float32)
        dq_MD = _dq_step(q_MD, k_ND, v_ND, dout_MD, dq_MD, lse2_M, delta_M, scale2, bias_N, keep, True, ALIBI)
    first += before * BLOCK_N
    for n0 in tl.range(first, first + inner * BLOCK_N, BLOCK_N):
        k_ND = _tile(k, k_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, False, TMA)
        v_ND = _tile(v, v_stride, n0, head // GROUP * HEAD, T, D, BLOCK_N, WIDTH, False, TMA)
        bias_N = slope2 * (n0 + column_N - m0).to(tl.float32)
        dq_MD = _dq_step(q_MD, k_ND, v_ND, dout_MD, dq_MD, lse2_M, delta_M, scale2, bias_N, None, False, ALIBI)
    _store(dq, dq_stride, m0, head * HEAD, T, dq_MD * scale, D, BLOCK_M, WIDTH)


@triton.jit
def _dkv_step(q, k, v, dout, dk, dv, lse2_M, delta_M, scale2, bias_N, keep, MASKED: tl.constexpr, ALIBI: tl.constexpr):
    """Scores stand transposed, (N, M): both products that sum over queries then take them from registers."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse2_M[None, :]
    if ALIBI:
        scores += bias_N[:, None]
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    weights = tl.exp2(scores)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
    dscores = weights * (dweights - delta_M[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _turn(i, blocks, part, GROUP: tl.constexpr):
    """Query head and block of round i of a loop over `blocks` blocks of each head of a group.

    No blocks must not mean a division by zero: it is undefined even where the loop does not run. The pipeliner puts
    the divisions of its first rounds in front of the loop, from which LLVM concluded that it does run, and fetched the
    first block unasked: past the end of lse, and by the copy unit into memory that the end of the kernel uses.
    """
    if GROUP > 1:
        each = tl.maximum(blocks, 1)
        return part * GROUP + i // each, i % each
    else:
        return part, i


@triton.jit(do_not_specialize=["paired"])
def dkv_kernel(
    q, k, v, dout, dk, dv, lse, delta, start, end, until, slopes,
    q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride, T, scale, paired,
    GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIBI: tl.constexpr, PREFIX: tl.constexpr, TMA: tl.constexpr,
    PARTS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Gradients of N rows of one key/value head: one loop over GROUP query heads and their blocks.

    The query heads of a key/value head go to PARTS programs; what each of them sums up stands OUT elements apart.
    """
    part = tl.program_id(0)
    kv_head = part // PARTS
    n0 = _block(paired) * BLOCK_N  # early keys are seen by most rows: first
    key_N = n0 + tl.arange(0, BLOCK_N)
    column_M = tl.arange(0, BLOCK_M)
    end_N = tl.load(end + key_N, key_N < T, other=0)
    k_ND = _tile(k, k_stride, n0, kv_head * HEAD, T, D, BLOCK_N, WIDTH, True, False)
    v_ND = _tile(v, v_stride, n0, kv_head * HEAD, T, D, BLOCK_N, WIDTH, True, False)
    from_N = key_N  # the first row that sees each key
    if PREFIX:
        until_N = tl.load(until + key_N, key_N < T, other=0)
        from_N = tl.where(key_N < until_N, tl.load(start + key_N, key_N < T, other=0), key_N)
    first, before, inner, masked = _query_blocks(start, end, until, n0, T, BLOCK_M, BLOCK_N, PREFIX)
    dk_ND = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    slope2 = tl.load(slopes + part) * LOG2_E if ALIBI else 0.0
    for i in tl.range(0, masked * GROUP):
        head, block = _turn(i, masked, part, GROUP)
        if GROUP > 1:
            slope2 = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
        m0 = first + (block + tl.where(block >= before, inner, 0)) * BLOCK_M
        row_M = m0 + column_M
        q_MD = _tile(q, q_stride, m0, head * HEAD, T, D, BLOCK_M, WIDTH, True, TMA)
        dout_MD = _tile(dout, dout_stride, m0, head * D, T, D, BLOCK_M, WIDTH, True, TMA)
        lse2_M = tl.load(lse + head * T + row_M, row_M < T, other=0.0) * LOG2_E + slope2 * (row_M - n0).to(tl.float32)
        delta_M = tl.load(delta + head * T + row_M, row_M < T, other=0.0)
        keep = (row_M[None, :] >= from_N[:, None]) & (row_M[None, :] < end_N[:, None])
        bias_N = slope2 * (key_N - n0).to(tl.float32)
        dk_ND, dv_ND = _dkv_step(
            q_MD, k_ND, v_ND, dout_MD, dk_ND, dv_ND, lse2_M, delta_M, scale * LOG2_E, bias_N, keep, True, ALIBI
        )
    for i in tl.range(0, inner * GROUP):
        head, block = _turn(i, inner, part, GROUP)
        if GROUP > 1:
            slope2 = tl.load(slopes + head) * LOG2_E if ALIBI else 0.0
        m0 = first + (before + block) * BLOCK_M
        row_M = m0 + column_M
        q_MD = _tile(q, q_stride, m0, head * HEAD, T, D, BLOCK_M, WIDTH, False, TMA)
        dout_MD = _tile(dout, dout_stride, m0, head * D, T, D, BLOCK_M, WIDTH, False, TMA)
        lse2_M = tl.load(lse + head * T + row_M) * LOG2_E + slope2 * (row_M - n0).to(tl.float32)
        delta_M = tl.load(delta + head * T + row_M)
        bias_N = slope2 * (key_N - n0).to(tl.float32)
        dk_ND, dv_ND = _dkv_step(
            q_MD, k_ND, v_ND, dout_MD, dk_ND, dv_ND, lse2_M, delta_M, scale * LOG2_E, bias_N, None, False, ALIBI
        )
    _store(dk, dk_stride, n0, part * OUT, T, dk_ND * scale, D, BLOCK_N, WIDTH)
    _store(dv, dv_stride, n0, part * OUT, T, dv_ND, D, BLOCK_N, WIDTH)


@triton.jit
def sum_parts_kernel(
    parts, dk, dv, dk_stride, dv_stride, T,
    PARTS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS rows of one key/value head from what `dkv_kernel` left: (2, T, kv heads, PARTS, D) fp32."""
    kv_head, row = tl.program_id(0), tl.program_id(1) * ROWS
    stride = tl.num_programs(0) * PARTS * D
    dk_RD = tl.zeros([ROWS, WIDTH], tl.float32)
    dv_RD = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.range(0, PARTS):  # unrolled, 16 parts can take 3 KB of stack a thread
        left = (kv_head * PARTS + part) * D
        dk_RD += _tile(parts, stride, row, left, T, D, ROWS, WIDTH, True, False)
        dv_RD += _tile(parts + tl.cast(T, tl.int64) * stride, stride, row, left, T, D, ROWS, WIDTH, True, False)
    _store(dk, dk_stride, row, kv_head * HEAD, T, dk_RD, D, ROWS, WIDTH)
    _store(dv, dv_stride, row, kv_head * HEAD, T, dv_RD, D, ROWS, WIDTH)
