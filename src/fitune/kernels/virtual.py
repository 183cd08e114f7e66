"""Virtual tokens: the same few rows at the head of every document, and the sum of their gradients over documents.

Shapes: T tokens, D documents (or places for as many), P virtual tokens of each, g heads (1 for whole rows), d their
width.
"""

from __future__ import annotations

import torch

from fitune.kernels.launch import require_vector, use_triton


def place_rows(table_Pgd: torch.Tensor, first_D: torch.Tensor, out_Tgd: torch.Tensor) -> None:
    """out[first[i] + p] = table[p] for every document i; other rows stay.

    Args:
        table_Pgd: (P, g, d) of out's dtype, contiguous.
        first_D: (D,) int64, the first of each document's P rows (not checked against T); -1: no document.
        out_Tgd: (T, g, d), unit stride in d, any other strides.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU a copy of what is written.
    """
    _check("table_Pgd", table_Pgd, "out_Tgd", out_Tgd, first_D)
    if use_triton(out_Tgd):
        from fitune.kernels import virtual_triton

        virtual_triton.place_rows(table_Pgd, first_D, out_Tgd)
    else:
        place_rows_reference(table_Pgd, first_D, out_Tgd)


def take_rows(x_Tgd: torch.Tensor, first_D: torch.Tensor, into_Pgd: torch.Tensor) -> None:
    """into[p] = sum over documents i of x[first[i] + p], in fp32; those rows of x are zero afterwards.

    The same bits in every run: documents are added in one order by one owner.

    Args:
        x_Tgd: (T, g, d) fp32, bf16 or fp16, unit stride in d, any other strides.
        first_D: as in `place_rows`.
        into_Pgd: (P, g, d) fp32, contiguous. Written, not added to.
    Raises:
        ValueError: shapes or strides that do not fit.
    Memory: none on CUDA; on CPU a copy of what is summed.
    """
    _check("into_Pgd", into_Pgd, "x_Tgd", x_Tgd, first_D)
    if use_triton(x_Tgd):
        from fitune.kernels import virtual_triton

        virtual_triton.take_rows(x_Tgd, first_D, into_Pgd)
    else:
        take_rows_reference(x_Tgd, first_D, into_Pgd)


def place_rows_reference(table_Pgd: torch.Tensor, first_D: torch.Tensor, out_Tgd: torch.Tensor) -> None:
    """Plain PyTorch `place_rows`."""
    out_Tgd[_places(first_D, len(table_Pgd))] = table_Pgd


def take_rows_reference(x_Tgd: torch.Tensor, first_D: torch.Tensor, into_Pgd: torch.Tensor) -> None:
    """Plain PyTorch `take_rows`."""
    places_DP = _places(first_D, len(into_Pgd))
    torch.sum(x_Tgd[places_DP], 0, dtype=torch.float32, out=into_Pgd)
    x_Tgd[places_DP] = 0


def _places(first_D: torch.Tensor, count: int) -> torch.Tensor:
    return first_D[first_D >= 0][:, None] + torch.arange(count, device=first_D.device)


def _check(name: str, few_Pgd: torch.Tensor, rows_name: str, rows_Tgd: torch.Tensor, first_D: torch.Tensor) -> None:
    require_vector("first_D", first_D, 0)
    if few_Pgd.dim() != 3 or few_Pgd.shape[1:] != rows_Tgd.shape[1:] or not few_Pgd.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(few_Pgd.shape)} and strides {few_Pgd.stride()}; needed: contiguous (P, g, d) "
            f"with the g and d of {rows_name}, whose shape is {tuple(rows_Tgd.shape)}"
        )
    if rows_Tgd.stride(2) != 1:
        raise ValueError(f"{rows_name} has strides {rows_Tgd.stride()}; needed: stride 1 in its last dimension")
