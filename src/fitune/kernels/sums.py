"""Sums over rows: gradients of what all tokens share, a bias (sum of dy) or a factor of each column (sum of dy y)."""

from __future__ import annotations

import torch

from fitune.kernels.launch import require, require_vector, use_triton


def add_column_sums(
    x_TN: torch.Tensor, scale: float, into_N: torch.Tensor, times_TN: torch.Tensor | None = None
) -> None:
    """into += scale * sum of the rows of x, or of x times, in fp32; the same bits in every run.

    Args:
        x_TN: (T, N or more) fp32, bf16 or fp16; N is the length of into.
        scale: of what is added.
        into_N: (N,) fp32, added to.
        times_TN: (T, N or more) of x's dtype, or None.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU an fp32 copy of x if it has 16 bits, and one of times and the products.
    """
    require("x_TN", x_TN, x_TN.shape[0], into_N.shape[0])
    require_vector("into_N", into_N, into_N.shape[0])
    if times_TN is not None:
        require("times_TN", times_TN, x_TN.shape[0], into_N.shape[0])
    if use_triton(x_TN):
        from fitune.kernels import sums_triton

        sums_triton.add_column_sums(x_TN, scale, into_N, times_TN)
    else:
        add_column_sums_reference(x_TN, scale, into_N, times_TN)


def add_column_sums_reference(
    x_TN: torch.Tensor, scale: float, into_N: torch.Tensor, times_TN: torch.Tensor | None = None
) -> None:
    """Plain PyTorch `add_column_sums`."""
    x_TN = x_TN[:, : into_N.shape[0]]
    if times_TN is not None:
        x_TN = x_TN.float() * times_TN[:, : into_N.shape[0]].float()
    into_N.add_(x_TN.sum(0, dtype=torch.float32), alpha=scale)
