"""Copies of many small fp32 matrices into 16-bit ones, scaled, in one launch.

LoRA's adapters are hundreds of small parameters; copying each into the matrix its group multiplies with would be
hundreds of launches per micro-step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fitune.kernels.launch import use_triton


class Copy(NamedTuple):
    """to = scale * source; both (rows, columns), the source contiguous, `to` with unit column stride."""

    source: torch.Tensor
    to: torch.Tensor
    scale: float


class Refresh:
    """A fixed set of copies; the tensors must stay where they are.

    Args:
        copies: all sources of one dtype, all targets of one dtype, on one device.
    Memory: 44 bytes per copy on CUDA.
    """

    def __init__(self, copies: list[Copy]) -> None:
        self._copies = copies
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        if copies and use_triton(copies[0].to):
            device = copies[0].to.device
            for copy in copies:
                if not copy.source.is_contiguous() or copy.to.stride(1) != 1 or copy.source.shape != copy.to.shape:
                    raise ValueError(f"cannot copy {tuple(copy.source.shape)} into {tuple(copy.to.shape)}: strides")
            rows = [[c.source.data_ptr(), c.to.data_ptr(), *c.to.shape, c.to.stride(0)] for c in copies]
            scales = torch.tensor([copy.scale for copy in copies], dtype=torch.float32, device=device)
            self._table = (torch.tensor(rows, dtype=torch.int64, device=device), scales)

    def run(self) -> None:
        """Do all copies."""
        if self._table is None:
            for source, to, scale in self._copies:
                to.copy_(source.detach() * scale if scale != 1.0 else source.detach())
            return
        from fitune.kernels.refresh_triton import refresh

        refresh(*self._table, self._copies[0].source, self._copies[0].to, max(c.to.numel() for c in self._copies))
