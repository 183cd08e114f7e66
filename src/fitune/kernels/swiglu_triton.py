"""The Triton bodies of `swiglu.py`, imported only where they run.

One program handles BLOCK columns of one row or, where a product is to be added, a tile that has rows enough for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels import swiglu as reference
from fitune.kernels.launch import power_of_two
from fitune.kernels.swiglu import Added

BLOCK = 1024  # 16 bytes of a 2-byte dtype for each thread of four warps
# Rows, columns and warps of a tile by bytes of the dtype. Of 2 bytes: B comes from the L2 cache once for every 64 rows,
# a row of the tile is one cache line, and three or four programs share a processor. Of 4 the product takes no units.
TILES = {2: (64, 64, 8), 4: (32, 32, 4)}
# constants stand right of tensors below: Triton 3.7's interpreter knows no constant times tensor
GELU_TWICE = tl.constexpr(2 * reference.GELU_SCALE)
GELU_CUBE = tl.constexpr(reference.GELU_CUBE)


def swiglu(gate_up_T2I: torch.Tensor, out_TI: torch.Tensor, added: Added | None = None) -> None:
    """Triton `swiglu`."""
    rows, width = out_TI.shape
    strides = gate_up_T2I.stride(0), out_TI.stride(0)
    if added is not None:
        grid, blocks, tile = _tiles(added, rows, width)
        h, B = added
        _swiglu_added[grid](gate_up_T2I, out_TI, h, B, *strides, h.stride(0), B.stride(0), blocks, rows, width, **tile)
        return
    blocks, block = _blocks(width)
    _swiglu[(rows * blocks,)](gate_up_T2I, out_TI, *strides, blocks, width, BLOCK=block, num_warps=4)


def swiglu_backward(
    dact_TI: torch.Tensor,
    gate_up_T2I: torch.Tensor,
    dgate_up_T2I: torch.Tensor,
    act_TI: torch.Tensor | None,
    added: Added | None = None,
) -> None:
    """Triton `swiglu_backward`."""
    rows, width = dact_TI.shape
    buffers = dact_TI, gate_up_T2I, dgate_up_T2I, act_TI
    strides = [0 if buffer is None else buffer.stride(0) for buffer in buffers]
    if added is not None:
        grid, blocks, tile = _tiles(added, rows, width)
        h, B = added
        strides += [h.stride(0), B.stride(0)]
        _swiglu_added_backward[grid](*buffers, h, B, *strides, blocks, rows, width, **tile)
        return
    blocks, block = _blocks(width)
    _swiglu_backward[(rows * blocks,)](*buffers, *strides, blocks, width, BLOCK=block, num_warps=4)


def gelu(x_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """Triton `gelu`."""
    rows, width = x_TI.shape
    blocks, block = _blocks(width)
    _gelu[(rows * blocks,)](x_TI, out_TI, x_TI.stride(0), out_TI.stride(0), blocks, width, BLOCK=block, num_warps=4)


def gelu_backward(dout_TI: torch.Tensor, x_TI: torch.Tensor, dx_TI: torch.Tensor, act_TI: torch.Tensor | None) -> None:
    """Triton `gelu_backward`."""
    rows, width = dout_TI.shape
    blocks, block = _blocks(width)
    _gelu_backward[(rows * blocks,)](
        dout_TI,
        x_TI,
        dx_TI,
        act_TI,
        dout_TI.stride(0),
        x_TI.stride(0),
        dx_TI.stride(0),
        0 if act_TI is None else act_TI.stride(0),
        blocks,
        width,
        BLOCK=block,
        num_warps=4,
    )


def _blocks(width: int) -> tuple[int, int]:
    """How many programs handle a row, and how many columns each."""
    block = min(BLOCK, power_of_two(width))
    return triton.cdiv(width, block), block


def _tiles(added: Added, rows: int, width: int) -> tuple[tuple[int], int, dict[str, int]]:
    """The grid, how many programs share rows, and the constants of a kernel with a product."""
    tile_T, tile_I, warps = TILES[added.h_TR.element_size()]
    blocks, rank = triton.cdiv(width, tile_I), added.h_TR.shape[1]
    constants = {"RANK": rank, "TILE_R": max(16, power_of_two(rank)), "TILE_T": tile_T, "TILE_I": tile_I}
    return (triton.cdiv(rows, tile_T) * blocks,), blocks, constants | {"num_warps": warps}


@triton.jit
def _place(blocks, width, BLOCK: tl.constexpr):
    """Row (int64: row offsets pass 2^31), columns and mask of this program; neighbours share a row."""
    program = tl.program_id(0)
    row = program // blocks
    col = (program - row * blocks) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), col, col < width


@triton.jit
def _swiglu(gate_up, out, sg, so, blocks, width, BLOCK: tl.constexpr):
    row, col, keep = _place(blocks, width, BLOCK)
    gate = tl.load(gate_up + row * sg + col, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * sg + width + col, mask=keep, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * so + col, (silu * up).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _swiglu_backward(
    dact, gate_up, dgate_up, act, sd, sg, so, sa, blocks, width, BLOCK: tl.constexpr
):  # fmt: skip
    row, col, keep = _place(blocks, width, BLOCK)
    d = tl.load(dact + row * sd + col, mask=keep, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * sg + col, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * sg + width + col, mask=keep, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(gate_up.dtype.element_ty).to(tl.float32)
    dgate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.debug_barrier()  # outputs may be inputs: every thread has read its part before any writes
    tl.store(dgate_up + row * so + col, dgate.to(dgate_up.dtype.element_ty), mask=keep)
    tl.store(dgate_up + row * so + width + col, (d * silu).to(dgate_up.dtype.element_ty), mask=keep)
    if act is not None:
        tl.store(act + row * sa + col, (silu * up).to(act.dtype.element_ty), mask=keep)


@triton.jit
def _gelu(x, out, sx, so, blocks, width, BLOCK: tl.constexpr):
    row, col, keep = _place(blocks, width, BLOCK)
    v = tl.load(x + row * sx + col, mask=keep, other=0.0).to(tl.float32)
    s = tl.sigmoid(v * GELU_TWICE * (1.0 + v * v * GELU_CUBE))
    tl.debug_barrier()  # out may be x
    tl.store(out + row * so + col, (v * s).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _gelu_backward(dout, x, dx, act, sd, sx, so, sa, blocks, width, BLOCK: tl.constexpr):
    row, col, keep = _place(blocks, width, BLOCK)
    d = tl.load(dout + row * sd + col, mask=keep, other=0.0).to(tl.float32)
    v = tl.load(x + row * sx + col, mask=keep, other=0.0).to(tl.float32)
    s = tl.sigmoid(v * GELU_TWICE * (1.0 + v * v * GELU_CUBE))
    slope = s + v * s * (1.0 - s) * GELU_TWICE * (1.0 + v * v * (3.0 * GELU_CUBE))
    tl.debug_barrier()  # outputs may be inputs
    tl.store(dx + row * so + col, (d * slope).to(dx.dtype.element_ty), mask=keep)
    if act is not None:
        tl.store(act + row * sa + col, (v * s).to(act.dtype.element_ty), mask=keep)


@triton.jit
def _tile(blocks, rows, width, TILE_T: tl.constexpr, TILE_I: tl.constexpr):
    """First row (int64), rows from there on, columns and mask of this program; neighbours share their rows."""
    program = tl.program_id(0)
    block = program // blocks
    row = tl.arange(0, TILE_T)
    col = (program - block * blocks) * TILE_I + tl.arange(0, TILE_I)
    keep = (block * TILE_T + row < rows)[:, None] & (col < width)[None, :]
    return block.to(tl.int64) * TILE_T, row, col, keep


@triton.jit
def _read(source, start, stride, row, col, keep):
    return tl.load(source + start * stride + row[:, None] * stride + col[None, :], mask=keep, other=0.0)


@triton.jit
def _read_adapters(h, B, start, row, col, rows, width, sh, sb, RANK: tl.constexpr, TILE_R: tl.constexpr):
    """h (rows, R) and the columns of Bᵀ (R, columns) for gate and for up; zeros from RANK on."""
    r = tl.arange(0, TILE_R)
    h_TR = _read(h, start, sh, row, r, (start + row < rows)[:, None] & (r < RANK)[None, :])
    inside = (r < RANK)[:, None] & (col < width)[None, :]
    at = col[None, :] * sb + r[:, None]
    return h_TR, tl.load(B + at, mask=inside, other=0.0), tl.load(B + width * sb + at, mask=inside, other=0.0)


@triton.jit
def _add(x, h_TR, B_RI):
    """x + h Bᵀ, summed in fp32 and rounded to the dtype of x; in fp32."""
    total = tl.dot(h_TR, B_RI, input_precision="ieee") + x.to(tl.float32)
    return total.to(x.dtype).to(tl.float32)


@triton.jit
def _swiglu_added(
    gate_up, out, h, B, sg, so, sh, sb, blocks, rows, width,
    RANK: tl.constexpr, TILE_R: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    start, row, col, keep = _tile(blocks, rows, width, TILE_T, TILE_I)
    # all reads come first: the products wait for shared memory, and no read passes that point
    h_TR, gate_B, up_B = _read_adapters(h, B, start, row, col, rows, width, sh, sb, RANK, TILE_R)
    gate = _read(gate_up, start, sg, row, col, keep)
    up = _read(gate_up + width, start, sg, row, col, keep)
    gate = _add(gate, h_TR, gate_B)
    up = _add(up, h_TR, up_B)
    silu = (gate * tl.sigmoid(gate)).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + start * so + row[:, None] * so + col[None, :], (silu * up).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _swiglu_added_backward(
    dact, gate_up, dgate_up, act, h, B, sd, sg, so, sa, sh, sb, blocks, rows, width,
    RANK: tl.constexpr, TILE_R: tl.constexpr, TILE_T: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    start, row, col, keep = _tile(blocks, rows, width, TILE_T, TILE_I)
    h_TR, gate_B, up_B = _read_adapters(h, B, start, row, col, rows, width, sh, sb, RANK, TILE_R)
    gate = _read(gate_up, start, sg, row, col, keep)
    up = _read(gate_up + width, start, sg, row, col, keep)
    d = _read(dact, start, sd, row, col, keep).to(tl.float32)
    gate = _add(gate, h_TR, gate_B)
    up = _add(up, h_TR, up_B)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(gate_up.dtype.element_ty).to(tl.float32)
    dgate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.debug_barrier()  # outputs may be inputs: every thread has read its part before any writes
    dgate_up += start * so
    at = row[:, None] * so + col[None, :]
    tl.store(dgate_up + at, dgate.to(dgate_up.dtype.element_ty), mask=keep)
    tl.store(dgate_up + width + at, (d * silu).to(dgate_up.dtype.element_ty), mask=keep)
    if act is not None:
        at = row[:, None] * sa + col[None, :]
        tl.store(act + start * sa + at, (silu * up).to(act.dtype.element_ty), mask=keep)
