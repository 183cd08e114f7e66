"""The activation of an MLP and its gradient: silu(gate) * up, and BLOOM's gelu.

Forward and backward are elementwise, so a backward may write over what it reads: the gradient of gate and up
over gate and up, the activation made again over its own gradient. Where a product left out its adapters, they are added
here, where gate and up are read anyway: a pass over both less. Legend: R adapter columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fitune.kernels.launch import require, use_triton

GELU_SCALE = 0.79788456  # sqrt(2 / pi), with the digits BLOOM was trained with
GELU_CUBE = 0.044715


class Added(NamedTuple):
    """What gate and up still lack: h Bᵀ. It is added in fp32; the sum is rounded to the dtype before anything else.

    Attributes:
        h_TR: (T, R) of the dtype of gate and up; unit column stride, any row stride. Must not overlap what is written.
        B_2IR: (2 I, R) likewise.
    """

    h_TR: torch.Tensor
    B_2IR: torch.Tensor


MOST_ADDED = 64  # columns R: more would fill the registers and shared memory of a program


def swiglu(gate_up_T2I: torch.Tensor, out_TI: torch.Tensor, added: Added | None = None) -> None:
    """Write silu(gate) * up; silu is rounded to the dtype before the product, as transformers does.

    Args:
        gate_up_T2I: (T, 2 I or more) gate in the first I columns, up in the next I.
        out_TI: (T, I) written; its width is I. Must not overlap gate_up.
        added: what is added to gate and up first.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA; on CPU two fp32 copies of gate, and with `added` two of gate and up and one in the dtype.
    Source: GLU variants, arXiv:2002.05202. Differs: no.
    """
    rows, width = out_TI.shape
    require("out_TI", out_TI, rows, width)
    require("gate_up_T2I", gate_up_T2I, rows, 2 * width)
    _check(added, gate_up_T2I, width)
    if use_triton(out_TI):
        from fitune.kernels import swiglu_triton

        swiglu_triton.swiglu(gate_up_T2I, out_TI, added)
    else:
        swiglu_reference(gate_up_T2I, out_TI, added)


def swiglu_reference(gate_up_T2I: torch.Tensor, out_TI: torch.Tensor, added: Added | None = None) -> None:
    """Plain PyTorch `swiglu`."""
    width = out_TI.shape[1]
    gate_TI, up_TI = _gate_and_up(gate_up_T2I, width, added)
    silu_TI = torch.nn.functional.silu(gate_TI.float()).to(gate_TI.dtype)
    out_TI.copy_(silu_TI.float() * up_TI.float())


def swiglu_backward(
    dact_TI: torch.Tensor,
    gate_up_T2I: torch.Tensor,
    dgate_up_T2I: torch.Tensor,
    act_TI: torch.Tensor | None,
    added: Added | None = None,
) -> None:
    """Write the gradient of gate and up, and the activation again if asked.

    Args:
        dact_TI: (T, I) gradient of `swiglu`'s output; its width is I.
        gate_up_T2I: (T, 2 I or more) what `swiglu` read.
        dgate_up_T2I: (T, 2 I or more) written in its first 2 I columns; may be gate_up itself.
        act_TI: (T, I) `swiglu`'s output is written here; may be dact itself. None: not wanted.
        added: what `swiglu` added; its own gradient is dgate_up's.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA; on CPU about six fp32 copies of gate, and with `added` as in `swiglu`.
    """
    rows, width = dact_TI.shape
    require("dact_TI", dact_TI, rows, width)
    require("gate_up_T2I", gate_up_T2I, rows, 2 * width)
    require("dgate_up_T2I", dgate_up_T2I, rows, 2 * width)
    if act_TI is not None:
        require("act_TI", act_TI, rows, width)
    _check(added, gate_up_T2I, width)
    if use_triton(dact_TI):
        from fitune.kernels import swiglu_triton

        swiglu_triton.swiglu_backward(dact_TI, gate_up_T2I, dgate_up_T2I, act_TI, added)
    else:
        swiglu_backward_reference(dact_TI, gate_up_T2I, dgate_up_T2I, act_TI, added)


def swiglu_backward_reference(
    dact_TI: torch.Tensor,
    gate_up_T2I: torch.Tensor,
    dgate_up_T2I: torch.Tensor,
    act_TI: torch.Tensor | None,
    added: Added | None = None,
) -> None:
    """Plain PyTorch `swiglu_backward`."""
    width = dact_TI.shape[1]
    gate_TI, up_TI = (half_TI.float() for half_TI in _gate_and_up(gate_up_T2I, width, added))
    d_TI = dact_TI.float()
    sigmoid_TI = torch.sigmoid(gate_TI)
    silu_TI = torch.nn.functional.silu(gate_TI).to(gate_up_T2I.dtype).float()
    dgate_TI = d_TI * up_TI * sigmoid_TI * (1 + gate_TI * (1 - sigmoid_TI))
    dup_TI = d_TI * silu_TI
    made_TI = silu_TI * up_TI
    dgate_up_T2I[:, :width] = dgate_TI  # everything that reads gate, up or dact is computed above
    dgate_up_T2I[:, width : 2 * width] = dup_TI
    if act_TI is not None:
        act_TI.copy_(made_TI)


def _gate_and_up(gate_up_T2I: torch.Tensor, width: int, added: Added | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves; with what is added, rounded to their dtype."""
    gate_up_T2I = gate_up_T2I[:, : 2 * width]
    if added is not None:
        total_T2I = torch.addmm(gate_up_T2I.float(), added.h_TR.float(), added.B_2IR.float().t())
        gate_up_T2I = total_T2I.to(gate_up_T2I.dtype)
    return gate_up_T2I[:, :width], gate_up_T2I[:, width:]


def _check(added: Added | None, gate_up_T2I: torch.Tensor, width: int) -> None:
    """Refuse what cannot be added to gate and up."""
    if added is None:
        return
    columns = added.h_TR.shape[-1]
    if not 0 < columns <= MOST_ADDED or added.B_2IR.shape[-1] != columns:
        raise ValueError(
            f"h_TR has {columns} columns, B_2IR {added.B_2IR.shape[-1]}; needed: as many of one as of the other, 1 to "
            f"{MOST_ADDED}"
        )
    require("h_TR", added.h_TR, gate_up_T2I.shape[0], columns)
    require("B_2IR", added.B_2IR, 2 * width, columns)
    if not added.h_TR.dtype == added.B_2IR.dtype == gate_up_T2I.dtype:
        raise ValueError(
            f"h_TR is {added.h_TR.dtype}, B_2IR {added.B_2IR.dtype}, gate_up_T2I {gate_up_T2I.dtype}; needed: one dtype"
        )


def gelu(x_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """Write the tanh approximation of gelu with BLOOM's constants, rounded once.

    Args:
        x_TI: (T, I) read.
        out_TI: (T, I) written; may be x itself.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU three fp32 copies of x.
    Source: GELU, arXiv:1606.08415, sec. 2. Differs: 0.5 (1 + tanh z) is computed as sigmoid(2 z), which is equal.
    """
    rows, width = x_TI.shape
    require("x_TI", x_TI, rows, width)
    require("out_TI", out_TI, rows, width)
    if use_triton(x_TI):
        from fitune.kernels import swiglu_triton

        swiglu_triton.gelu(x_TI, out_TI)
    else:
        gelu_reference(x_TI, out_TI)


def gelu_reference(x_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """Plain PyTorch `gelu`."""
    x = x_TI.float()
    out_TI.copy_(x * torch.sigmoid(2 * GELU_SCALE * x * (1 + GELU_CUBE * x * x)))


def gelu_backward(dout_TI: torch.Tensor, x_TI: torch.Tensor, dx_TI: torch.Tensor, act_TI: torch.Tensor | None) -> None:
    """Write the gradient of `gelu`'s input, and its output again if asked.

    Args:
        dout_TI: (T, I) gradient of the output.
        x_TI: (T, I) what `gelu` read.
        dx_TI: (T, I) written; may be x itself.
        act_TI: (T, I) `gelu`'s output is written here; may be dout itself. None: not wanted.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU about five fp32 copies of x.
    """
    rows, width = dout_TI.shape
    for name, buffer in (("dout_TI", dout_TI), ("x_TI", x_TI), ("dx_TI", dx_TI), ("act_TI", act_TI)):
        if buffer is not None:
            require(name, buffer, rows, width)
    if use_triton(dout_TI):
        from fitune.kernels import swiglu_triton

        swiglu_triton.gelu_backward(dout_TI, x_TI, dx_TI, act_TI)
    else:
        gelu_backward_reference(dout_TI, x_TI, dx_TI, act_TI)


def gelu_backward_reference(
    dout_TI: torch.Tensor, x_TI: torch.Tensor, dx_TI: torch.Tensor, act_TI: torch.Tensor | None
) -> None:
    """Plain PyTorch `gelu_backward`."""
    width = dout_TI.shape[1]
    x = x_TI[:, :width].float()
    s = torch.sigmoid(2 * GELU_SCALE * x * (1 + GELU_CUBE * x * x))
    slope = s + x * s * (1 - s) * 2 * GELU_SCALE * (1 + 3 * GELU_CUBE * x * x)
    dx, made = dout_TI.float() * slope, x * s
    dx_TI.copy_(dx)
    if act_TI is not None:
        act_TI.copy_(made)
