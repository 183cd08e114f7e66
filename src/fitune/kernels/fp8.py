"""8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa): rows of activations, weights, and their products.

A row is stored as codes and one fp32 scale, its largest magnitude / 448. The forward multiplies rows of activations
with rows of weights. For the input gradient the weights' scales are folded into the incoming gradient before that is
quantized, and the codes are transposed: one stored copy serves both. Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch

from fitune.kernels.launch import require, require_vector, use_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-120  # its reciprocal is finite too; rows of zeros get it
_ALIGNMENT = 16  # inner and output width that the tensor cores ask for


def has_units(device: torch.device) -> bool:
    """Whether the device multiplies fp8 itself: CUDA of compute capability 8.9 (Ada, Hopper) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(
    x_TK: torch.Tensor, out8_TK: torch.Tensor, scale_T: torch.Tensor, column_scale_K: torch.Tensor | None = None
) -> None:
    """Write codes and scales of the rows of x * column_scale; a row that is not finite gets the scale inf.

    Args:
        x_TK: (T, K) fp32, fp16 or bf16; unit column stride, any row stride. Read only.
        out8_TK: (T, K) float8_e4m3fn written: round(x * column_scale / scale), saturated.
        scale_T: (T,) fp32 written: largest magnitude / 448, at least 2^-120.
        column_scale_K: (K,) fp32 or None: factors of the columns.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA with fp8 units; elsewhere two fp32 copies of x.
    Source: FP8 formats, arXiv:2209.05433. Differs: one scale per row, from the row itself.
    """
    rows, columns = _check(x_TK, out8_TK)
    require_vector("scale_T", scale_T, rows)
    if column_scale_K is not None:
        require_vector("column_scale_K", column_scale_K, columns)
    if use_triton(x_TK) and has_units(x_TK.device):
        from fitune.kernels import fp8_triton

        fp8_triton.quantize_rows(x_TK, out8_TK, scale_T, column_scale_K)
    else:
        quantize_rows_reference(x_TK, out8_TK, scale_T, column_scale_K)


def quantize_rows_reference(
    x_TK: torch.Tensor, out8_TK: torch.Tensor, scale_T: torch.Tensor, column_scale_K: torch.Tensor | None = None
) -> None:
    """Plain PyTorch `quantize_rows`."""
    x_TK = x_TK.float()
    if column_scale_K is not None:
        x_TK = x_TK * column_scale_K
    largest_T = x_TK.abs().amax(dim=1).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    scale_T[: x_TK.shape[0]] = (largest_T / LARGEST).clamp_(min=SMALLEST_SCALE)
    # The cast itself turns what is too large into NaN; rounding of the reciprocal can push 448 just over.
    out8_TK.copy_((x_TK * scale_T[: x_TK.shape[0], None].reciprocal()).clamp_(-LARGEST, LARGEST))


def dequantize_fp8(codes_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> None:
    """Write codes * scale.

    Args:
        codes_NK: (N, K) float8_e4m3fn, unit column stride.
        scale_N: (N,) fp32.
        out_NK: (N, K) fp32, fp16 or bf16; unit column stride, any row stride.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none on CUDA with fp8 units; elsewhere one fp32 copy.
    """
    rows, _ = _check(out_NK, codes_NK)
    require_vector("scale_N", scale_N, rows)
    if use_triton(codes_NK) and has_units(codes_NK.device):
        from fitune.kernels import dequantize_triton

        dequantize_triton.dequantize_rows(codes_NK, scale_N, 1.0, out_NK)
    else:
        dequantize_fp8_reference(codes_NK, scale_N, out_NK)


def dequantize_fp8_reference(codes_NK: torch.Tensor, scale_N: torch.Tensor, out_NK: torch.Tensor) -> None:
    """Plain PyTorch `dequantize_fp8`."""
    out_NK.copy_(codes_NK.float().mul_(scale_N[: codes_NK.shape[0], None]))


def transpose_codes(codes_NK: torch.Tensor, out_KN: torch.Tensor) -> None:
    """Write the transpose of a matrix of bytes.

    Args:
        codes_NK: (N, K) of any 1-byte dtype, unit column stride, any row stride. Read only.
        out_KN: (K, N) of the same dtype, unit column stride, any row stride. Must not overlap codes_NK.
    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    Memory: none.
    """
    if codes_NK.dtype.itemsize != 1 or codes_NK.dtype != out_KN.dtype or codes_NK.dim() != 2:
        raise ValueError(
            f"codes_NK is {tuple(codes_NK.shape)} {codes_NK.dtype}, out_KN {out_KN.dtype}; needed: a matrix of "
            "one-byte values and an output of the same dtype"
        )
    rows, columns = codes_NK.shape
    require("codes_NK", codes_NK, rows, columns)
    require("out_KN", out_KN, columns, rows)
    codes_NK, out_KN = codes_NK.view(torch.uint8), out_KN.view(torch.uint8)
    if use_triton(codes_NK):
        from fitune.kernels import fp8_triton

        fp8_triton.transpose_codes(codes_NK, out_KN)
    else:
        transpose_codes_reference(codes_NK, out_KN)


def transpose_codes_reference(codes_NK: torch.Tensor, out_KN: torch.Tensor) -> None:
    """Plain PyTorch `transpose_codes`."""
    out_KN[:, : codes_NK.shape[0]].copy_(codes_NK.T)


def is_native(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether `multiply_rows` runs on fp8 units for weights of (rows, columns) and this dtype of the result.

    PyTorch's kernel with row scales gives bf16 only and wants both sizes to be multiples of 16.
    """
    fits = rows % _ALIGNMENT == 0 and columns % _ALIGNMENT == 0
    return fits and dtype == torch.bfloat16 and has_units(device)


def multiply_rows(
    codes_TK: torch.Tensor,
    scale_T: torch.Tensor,
    codes_NK: torch.Tensor,
    scale_N: torch.Tensor | None,
    dtype: torch.dtype,
    bias_N: torch.Tensor | None = None,
    fast_accumulation: bool = False,
) -> torch.Tensor:
    """Multiply rows of codes with rows of codes: scale_T * scale_N * sum over K, plus the bias.

    Args:
        codes_TK: (T, K) float8_e4m3fn, contiguous.
        scale_T: (T,) fp32.
        codes_NK: (N, K) float8_e4m3fn, contiguous.
        scale_N: (N,) fp32, or None for ones.
        dtype: of the result.
        bias_N: (N,) in `dtype`, or None.
        fast_accumulation: let the fp8 units keep sums in fewer bits; only they look at it.
    Returns:
        (T, N): from fp8 units where `is_native` says so; elsewhere the same codes multiplied in fp32 (on CUDA in bf16,
        which holds each code exactly, if `dtype` has 16 bits).
    Raises:
        RuntimeError: shapes that do not fit.
    Memory: the result; when emulated, also both operands in the dtype they are multiplied in and the product in fp32.
    """
    out_TN = torch.empty(codes_TK.shape[0], codes_NK.shape[0], dtype=dtype, device=codes_TK.device)
    multiply_rows_into(out_TN, (codes_TK, scale_T), (codes_NK, scale_N), bias_N, fast_accumulation)
    return out_TN


def multiply_rows_into(
    out_TN: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor | None],
    bias_N: torch.Tensor | None = None,
    fast_accumulation: bool = False,
) -> None:
    """`multiply_rows` into a given contiguous (T, N) buffer; rows and weights are pairs of codes and scales."""
    (codes_TK, scale_T), (codes_NK, scale_N) = rows, weights
    dtype = out_TN.dtype
    if scale_N is None:
        scale_N = torch.ones(codes_NK.shape[0], device=codes_NK.device)
    scales = scale_T[:, None], scale_N[None, :]
    # One row is a vector to the library, which has no such product; generation runs emulated.
    if len(codes_TK) > 1 and is_native(codes_TK.device, dtype, codes_NK.shape[0], codes_NK.shape[1]):
        torch._scaled_mm(
            codes_TK, codes_NK.T, *scales, bias=bias_N, out_dtype=dtype, use_fast_accum=fast_accumulation, out=out_TN
        )
        return
    operand = torch.bfloat16 if codes_TK.is_cuda and dtype.itemsize == 2 else torch.float32
    product_TN = (codes_TK.to(operand) @ codes_NK.to(operand).T).float() * scales[0] * scales[1]
    out_TN.copy_(product_TN if bias_N is None else product_TN + bias_N)


def _check(x_TK: torch.Tensor, codes_TK: torch.Tensor) -> tuple[int, int]:
    if x_TK.dim() != 2 or not x_TK.is_floating_point() or codes_TK.shape != x_TK.shape or codes_TK.dtype != E4M3:
        raise ValueError(
            f"values are {tuple(x_TK.shape)} {x_TK.dtype}, codes {tuple(codes_TK.shape)} {codes_TK.dtype}; needed: two "
            "matrices of one shape, fp32, fp16 or bf16 and float8_e4m3fn"
        )
    rows, columns = x_TK.shape
    require("the values", x_TK, rows, columns)
    require("the codes", codes_TK, rows, columns)
    return rows, columns
