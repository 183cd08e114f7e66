"""One piece of memory for tensors that stay together.

PyTorch's allocator takes the GPU's memory in segments: of 2 MiB for tensors up to 1 MiB, of 20 MiB for those below 10,
as many as fit, and one for each that is larger, rounded up to 2 MiB. What is left of a segment is lost if nothing else
is of a size for it: 4 MB for every two of 8.4 MB, as the weights and buffers of 1B models are. A segment that something
still lies in is never given back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

ALIGNED = 512  # bytes: what PyTorch aligns tensors to on a GPU


class Segment:
    """Memory that tensors are cut from, one after another.

    Args:
        sizes: of all of them, in bytes.

    Memory: theirs, each rounded up to 512 bytes. PyTorch takes up to 2 MiB more for it from 10 MiB on.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        self._flat = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=device)
        self._at = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, not initialised."""
        size = math.prod(shape) * dtype.itemsize
        start, self._at = self._at, self._at + _aligned(size)
        assert start + size <= len(self._flat), "more than was asked for"
        return self._flat[start : start + size].view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The next tensor, a copy of this one."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
