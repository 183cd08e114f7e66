"""The Triton bodies of `swiglu.py`: one program handles BLOCK columns of one row; imported only where they run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fitune.kernels import swiglu as reference
from fitune.kernels.launch import power_of_two

BLOCK = 1024  # 16 bytes of a 2-byte dtype for each thread of four warps
# constants stand right of tensors below: Triton 3.7's interpreter knows no constant times tensor
GELU_TWICE = tl.constexpr(2 * reference.GELU_SCALE)
GELU_CUBE = tl.constexpr(reference.GELU_CUBE)


def swiglu(gate_up_T2I: torch.Tensor, out_TI: torch.Tensor) -> None:
    """Triton `swiglu`."""
    rows, width = out_TI.shape
    blocks, block = _blocks(width)
    _swiglu[(rows * blocks,)](
        gate_up_T2I, out_TI, gate_up_T2I.stride(0), out_TI.stride(0), blocks, width, BLOCK=block, num_warps=4
    )


def swiglu_backward(
    dact_TI: torch.Tensor, gate_up_T2I: torch.Tensor, dgate_up_T2I: torch.Tensor, act_TI: torch.Tensor | None
) -> None:
    """Triton `swiglu_backward`."""
    rows, width = dact_TI.shape
    blocks, block = _blocks(width)
    _swiglu_backward[(rows * blocks,)](
        dact_TI,
        gate_up_T2I,
        dgate_up_T2I,
        act_TI,
        dact_TI.stride(0),
        gate_up_T2I.stride(0),
        dgate_up_T2I.stride(0),
        0 if act_TI is None else act_TI.stride(0),
        blocks,
        width,
        BLOCK=block,
        num_warps=4,
    )


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
