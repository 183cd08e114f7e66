"""LLM.int8(): rows of activations in 8 bits times rows of weights in 8 bits, outlier columns in the model's dtype.

    y = (codes of x · codes of Wᵀ) * scale of x * scale of W / 127²  +  x[:, outliers] · W[:, outliers]ᵀ

A few columns of a large model's activations are 20 to 100 times larger than the others. One of them in a row makes the
step of its 8-bit grid so coarse that all others vanish; taken out, they cost a thin 16-bit product.

Plain PyTorch. Legend: T tokens, N outputs, K inputs, C outlier columns.
"""

from __future__ import annotations

from functools import cache

import torch

from fitune.kernels.dequantize import dequantize_int8

PRODUCT_STEP = 1 / 127**2
_EXACT = 1024  # columns whose products fp32 sums exactly: 127 * 127 * 1024 < 2^24
_ALIGNMENT, _LEAST_ROWS = 8, 17  # what cuBLAS asks of an int8 product


def llm_int8(
    x_TK: torch.Tensor, codes_NK: torch.Tensor, scale_N: torch.Tensor, bias_N: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """x Wᵀ + bias with both sides in 8 bits, except columns of x that hold an outlier.

    Args:
        x_TK: (T, K) fp32, fp16 or bf16. Read only. All T rows decide together which columns are outliers.
        codes_NK: (N, K) int8.
        scale_N: (N,) fp32, the largest magnitude of each row of W.
        bias_N: (N,) or None.
        threshold: a column with a magnitude of at least this is an outlier; 0: none is.
    Returns:
        (T, N) in the dtype of x.
    Memory: codes of x and the (T, N) product in int32 and fp32; without int8 units fp32 copies of 1,024 columns.
    Source: LLM.int8(), arXiv:2208.07339, sec. 3. Differs: outlier columns of W are the expanded 8-bit ones, since no
        others are stored; small values of an outlier column still count in their row's largest magnitude. Both as in
        bitsandbytes, whose results these are bit by bit but for one constant: its CPU code (0.50) has 6.200124e-05 for
        1 / 127² = 6.2000124e-05, which is 2e-5 of the 8-bit part and in fp16 and bf16 at most one rounding of it.
    """
    codes_TK, scale_T, outliers_C = quantize_rows(x_TK, threshold)
    y_TN = multiply_codes(codes_TK, codes_NK) * (scale_T[:, None] * scale_N[None, :]) * PRODUCT_STEP
    if bias_N is not None:
        y_TN += bias_N
    y_TN = y_TN.to(x_TK.dtype)
    if len(outliers_C):
        weight_NC = torch.empty(len(codes_NK), len(outliers_C), dtype=x_TK.dtype, device=x_TK.device)
        dequantize_int8(codes_NK[:, outliers_C].contiguous(), scale_N, weight_NC)
        y_TN = y_TN.addmm(x_TK[:, outliers_C], weight_NC.T)
    return y_TN


def quantize_rows(x_TK: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """round(x * 127 / largest magnitude of the row), outliers left out.

    Args:
        x_TK: (T, K) fp32, fp16 or bf16; rounded to fp16 first, as bitsandbytes does. Read only.
        threshold: see `llm_int8`.
    Returns:
        codes (T, K) int8, 0 in outlier columns; scale (T,) fp32, the largest magnitude below the threshold, nan or inf
        where that is not finite; outlier columns (C,) int64, ascending.
    Memory: about three fp32 copies of x.
    """
    x_TK = x_TK.half()
    outliers_C = torch.empty(0, dtype=torch.int64, device=x_TK.device)
    if threshold > 0:
        large_TK = x_TK.abs() >= threshold
        outliers_C = large_TK.any(dim=0).nonzero().view(-1)
        x_TK = x_TK.masked_fill(large_TK, 0)
    scale_T = x_TK.abs().amax(dim=1).float()
    # A row of zeros has no scale; its codes are 0. A row that is not finite keeps a scale that is not finite either.
    codes_TK = (x_TK * (127.0 / scale_T[:, None])).nan_to_num_(0.0, 0.0, 0.0).round_().to(torch.int8)
    codes_TK[:, outliers_C] = 0
    return codes_TK, scale_T, outliers_C


def multiply_codes(codes_TK: torch.Tensor, codes_NK: torch.Tensor) -> torch.Tensor:
    """(T, N) int32 sums over K of products of int8 codes, exact: by int8 units where they can be used, else in fp32."""
    if _has_units(codes_TK, codes_NK):
        return torch._int_mm(codes_TK, codes_NK.T)
    y_TN = torch.zeros(len(codes_TK), len(codes_NK), dtype=torch.int32, device=codes_TK.device)
    for start in range(0, codes_TK.shape[1], _EXACT):
        columns = slice(start, start + _EXACT)
        y_TN += (codes_TK[:, columns].float() @ codes_NK[:, columns].float().T).to(torch.int32)
    return y_TN


def _has_units(codes_TK: torch.Tensor, codes_NK: torch.Tensor) -> bool:
    """Whether `torch._int_mm` takes these shapes and is fast: on a CPU without AVX-512 it takes 16 times as long."""
    (rows, columns), outputs = codes_TK.shape, len(codes_NK)
    if not codes_TK.is_cuda:
        return _has_avx512()
    return rows >= _LEAST_ROWS and columns % _ALIGNMENT == 0 and outputs % _ALIGNMENT == 0


@cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
