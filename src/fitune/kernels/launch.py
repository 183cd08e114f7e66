"""Which body of a kernel runs, what buffers must look like, and how wide a program is.

Every public function of this room checks its buffers with `require`, asks `use_triton` once, and calls either
`NAME_reference` (plain PyTorch: the meaning) or the function of the same name in the `_triton` file beside it,
which alone imports triton. Legend of shape suffixes: T tokens, H width, I MLP width, P positions, R pairs of a
rotation, N supervised positions, V vocabulary, n, q, k widths of a row of all heads, query heads, key heads.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

ELEMENTS_PER_WARP = 512  # two 16-byte accesses of a 2-byte dtype for each of 32 threads
MAX_WARPS = 16


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton body runs: on CUDA where triton is installed."""
    return x.is_cuda and has_triton()


def require(name: str, x: torch.Tensor, rows: int, columns: int) -> None:
    """Refuse a buffer that a kernel would read or write past its end or across its columns.

    Args:
        name: what the caller calls it, for the message.
        x: any (rows, columns or more) view with unit column stride; the row stride is free.
    Raises:
        ValueError: another number of rows, fewer columns, or columns that are not adjacent in memory.
    """
    if x.dim() != 2 or x.shape[0] != rows or x.shape[1] < columns or (columns > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; needed: ({rows}, at least {columns}) with "
            "column stride 1. Pass a view of rows, not a transpose."
        )


def require_vector(name: str, x: torch.Tensor, length: int) -> None:
    """Refuse a vector of another length or with gaps.

    Raises:
        ValueError: not one dimension, fewer than `length` values, or a stride other than 1.
    """
    if x.dim() != 1 or x.shape[0] < length or (length > 1 and x.stride(0) != 1):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; needed: at least {length} adjacent values."
        )


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps of a program that handles this many elements (a power of two)."""
    return max(1, min(MAX_WARPS, elements // ELEMENTS_PER_WARP))
