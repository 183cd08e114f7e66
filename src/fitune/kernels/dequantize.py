"""Quantized weights -> a matrix in the dtype of the model, written into the caller's buffer.

Called once per projection and pass, by the engine into its scratch matrix and by `model.quantize` on the plain path.
Values are those of bitsandbytes: computed in fp32, rounded once. Legend: N rows (outputs), K columns (inputs),
G blocks of 64 weights, S blocks of 256 G.
"""

from __future__ import annotations

import torch

from fitune.kernels.launch import require, require_vector, use_triton

BLOCK_SIZE = 64  # weights that share one absmax
NESTED_BLOCK_SIZE = 256  # absmax values that share one nested absmax
INT8_STEP = 7.874015718698502e-3  # 1 / 127, with bitsandbytes' digits
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_int8(codes_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> None:
    """Write codes * scale / 127.

    Args:
        codes_NK: (N, K) int8, unit column stride.
        scale_N: (N,) fp32, the largest magnitude of each row.
        out_NK: (N, K) fp32, fp16 or bf16; unit column stride, any row stride.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA; on CPU one fp32 copy.
    Source: LLM.int8(), arXiv:2208.07339, sec. 2. Differs: weights only, no outlier columns.
    """
    rows, columns = _check_matrices(codes_NK, out_NK)
    _check_dtype("codes_NK", codes_NK, torch.int8)
    _check_dtype("scale_N", scale_N, torch.float32)
    require_vector("scale_N", scale_N, rows)
    require("codes_NK", codes_NK, rows, columns)
    if use_triton(codes_NK):
        from fitune.kernels import dequantize_triton

        dequantize_triton.dequantize_rows(codes_NK, scale_N, INT8_STEP, out_NK)
    else:
        dequantize_int8_reference(codes_NK, scale_N, out_NK)


def dequantize_int8_reference(codes_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> None:
    """Plain PyTorch `dequantize_int8`."""
    out_NK.copy_((codes_NK * scale_N[:, None]).mul_(INT8_STEP))


def dequantize_4bit(
    packed: torch.Tensor,
    absmax_G: torch.Tensor,
    code_16: torch.Tensor,
    nested_absmax_S: torch.Tensor | None,
    nested_code_256: torch.Tensor | None,
    offset: torch.Tensor | None,
    out_NK: torch.Tensor,
) -> None:
    """Write code[4 bits] * absmax of the block; the absmax is itself an 8-bit code (double quantization).

    Weight i of the flattened matrix is the high half of byte i // 2 if i is even, else the low half. It belongs to
    block i // 64, whose absmax is nested_code[absmax[block]] * nested_absmax[block // 256] + offset. Without double
    quantization the absmax values stand there themselves, and what is nested is None.

    Args:
        packed: (ceil(N K / 2),) uint8.
        absmax_G: (ceil(N K / 64),) uint8; fp32 without double quantization.
        code_16: (16,) fp32, the values of the 16 codes (nf4 or fp4).
        nested_absmax_S: (ceil(G / 256),) fp32.
        nested_code_256: (256,) fp32, the values of the 256 absmax codes.
        offset: () fp32, mean of the absmax values.
        out_NK: (N, K) fp32, fp16 or bf16; unit column stride, any row stride.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA; on CPU about three fp32 copies.
    Source: QLoRA, arXiv:2305.14314, sec. 3. Differs: no.
    """
    rows, columns = _check_matrices(out_NK, out_NK)
    blocks = -(-rows * columns // BLOCK_SIZE)
    expected = [
        ("packed", packed, -(-rows * columns // 2), torch.uint8),
        ("absmax_G", absmax_G, blocks, torch.float32 if nested_absmax_S is None else torch.uint8),
        ("code_16", code_16, 16, torch.float32),
    ]
    if nested_absmax_S is not None:
        if nested_code_256 is None or offset is None:
            raise ValueError("nested_absmax_S needs nested_code_256 and offset beside it")
        expected += [
            ("nested_absmax_S", nested_absmax_S, -(-blocks // NESTED_BLOCK_SIZE), torch.float32),
            ("nested_code_256", nested_code_256, 256, torch.float32),
            ("offset", offset.view(1), 1, torch.float32),
        ]
    for name, vector, length, dtype in expected:
        _check_dtype(name, vector, dtype)
        require_vector(name, vector, length)
    if use_triton(packed):
        from fitune.kernels import dequantize_triton as body

        body.dequantize_4bit(packed, absmax_G, code_16, nested_absmax_S, nested_code_256, offset, out_NK)
    else:
        dequantize_4bit_reference(packed, absmax_G, code_16, nested_absmax_S, nested_code_256, offset, out_NK)


def dequantize_4bit_reference(
    packed: torch.Tensor,
    absmax_G: torch.Tensor,
    code_16: torch.Tensor,
    nested_absmax_S: torch.Tensor | None,
    nested_code_256: torch.Tensor | None,
    offset: torch.Tensor | None,
    out_NK: torch.Tensor,
) -> None:
    """Plain PyTorch `dequantize_4bit`."""
    count = out_NK.numel()
    blocks = -(-count // BLOCK_SIZE)
    scale_G = absmax_G[:blocks]
    if nested_absmax_S is not None and nested_code_256 is not None and offset is not None:
        scale_G = nested_code_256[absmax_G[:blocks].int()]
        scale_G *= nested_absmax_S.repeat_interleave(NESTED_BLOCK_SIZE)[:blocks]
        scale_G += offset
    # Both values of each of the 256 bytes: one look-up per byte instead of two shifts and two look-ups.
    pairs = torch.stack([code_16.repeat_interleave(16), code_16.repeat(16)], dim=1)
    values = pairs[packed[: -(-count // 2)].int()].flatten()
    values = torch.nn.functional.pad(values, (0, blocks * BLOCK_SIZE - values.numel()))
    values = values.view(blocks, BLOCK_SIZE).mul_(scale_G[:, None]).flatten()
    out_NK.copy_(values[:count].view(out_NK.shape))


def _check_matrices(codes_NK: torch.Tensor, out_NK: torch.Tensor) -> tuple[int, int]:
    if out_NK.dim() != 2 or out_NK.dtype not in _FLOATS:
        raise ValueError(
            f"out_NK has shape {tuple(out_NK.shape)} and dtype {out_NK.dtype}; needed: two dimensions in fp32, fp16 or "
            "bf16"
        )
    rows, columns = out_NK.shape
    require("out_NK", out_NK, rows, columns)
    if codes_NK.shape != out_NK.shape:
        raise ValueError(
            f"codes_NK has shape {tuple(codes_NK.shape)}, out_NK {tuple(out_NK.shape)}; give an out_NK of the same "
            "shape"
        )
    return rows, columns


def _check_dtype(name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}; needed: {dtype}")
