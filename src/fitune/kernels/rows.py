"""Rows to given places, deterministic (PyTorch's index_copy_ has another, slower body in deterministic mode)."""

from __future__ import annotations

import torch

from fitune.kernels.launch import require, require_vector, use_triton


def scatter_rows(x_MH: torch.Tensor, index_M: torch.Tensor, out_TH: torch.Tensor) -> None:
    """out[index[m]] = x[m].

    Args:
        x_MH: (M, H), unit column stride.
        index_M: (M,) int64, below T (not checked). Rows named twice get one of the two.
        out_TH: (T, H or more) of x's dtype, unit column stride, any row stride. Other rows stay.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none.
    """
    rows, width = x_MH.shape
    require("x_MH", x_MH, rows, width)
    require("out_TH", out_TH, out_TH.shape[0], width)
    require_vector("index_M", index_M, rows)
    if use_triton(x_MH):
        from fitune.kernels import rows_triton

        rows_triton.scatter_rows(x_MH, index_M, out_TH)
    else:
        scatter_rows_reference(x_MH, index_M, out_TH)


def scatter_rows_reference(x_MH: torch.Tensor, index_M: torch.Tensor, out_TH: torch.Tensor) -> None:
    """Plain PyTorch `scatter_rows`."""
    out_TH[:, : x_MH.shape[1]].index_copy_(0, index_M, x_MH)
