"""Every activation of the engine lives in a buffer that is declared in plan/saves.py and allocated once.

Kept tensors have one buffer per block, the others one that all blocks share. A buffer is made for the largest
micro-step; smaller ones use a part of it.
"""

from __future__ import annotations

import torch

from fitune.engine.offload import Offload
from fitune.engine.segments import Segment
from fitune.plan.saves import ONE_ROW_MORE, BlockShape, Level, Saved, block_saves, shared_buffers


class Buffers:
    """Buffers of `layers` blocks for micro-steps of up to `capacity` tokens.

    Memory: capacity * (layers * what `block_saves` lists + what `shared_buffers` lists), each rounded up to 512 bytes,
    cut from one segment; the part marked `host` in page-locked host memory.
    """

    def __init__(
        self, shape: BlockShape, level: Level, layers: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        shared = shared_buffers(shape, level)
        kept = [saved for saved in block_saves(shape, level) if not saved.host]

        def rows(saved: Saved) -> int:
            return capacity + (saved.name in ONE_ROW_MORE)

        every = (*shared, *kept * layers)
        segment = Segment((rows(saved) * saved.bytes_per_token(dtype.itemsize) for saved in every), device)

        def make(saved: Saved) -> torch.Tensor:
            own = {0: dtype, 1: torch.uint8, 4: torch.float32}[saved.size]
            return segment.empty([rows(saved) * saved.width], own)

        self._shared = {saved.name: make(saved) for saved in shared}
        self._kept = [{saved.name: make(saved) for saved in kept} for _ in range(layers)]
        slots = [self._shared.pop(name) for name in ("x0", "x1") if name in self._shared]
        self.offload = Offload(slots, shape.hidden, layers) if slots else None
        self._widths = {s.name: s.width for s in (*shared, *block_saves(shape, level))}

    def kept_bytes(self) -> int:
        """Bytes of all per-block buffers."""
        return sum(t.numel() * t.element_size() for kept in self._kept for t in kept.values())

    def shared_bytes(self) -> int:
        """Bytes of the buffers all blocks share."""
        own = sum(t.numel() * t.element_size() for t in self._shared.values())
        return own + (self.offload.device_bytes if self.offload else 0)

    def block(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        """Buffers of one block as (tokens, width) matrices; per-head statistics (fp32) as (width, tokens)."""
        views = {}
        flats = self._shared | self._kept[layer]
        if self.offload:
            flats["x"] = self.offload.slot(layer)
        for name, flat in flats.items():
            width = self._widths[name]
            rows = (width, tokens) if name in ("lse", "delta") else (tokens, width)
            views[name] = flat[: tokens * width].view(rows)
        for name in {"rstd1", "rstd2", "mean1", "mean2"} & set(views):
            views[name] = views[name].view(tokens)
        return views

    def rows_of_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where products in fp8 put the codes and scales of their rows."""
        return self._shared["codes"], self._shared["scales"]

    def with_spare_row(self, name: str, tokens: int) -> torch.Tensor:
        """`branch` or `d` as (tokens + 1, width)."""
        width = self._widths[name]
        return self._shared[name][: (tokens + 1) * width].view(tokens + 1, width)


def carve(buffer: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """A contiguous (T, width) part of a contiguous (T, n) buffer, behind `start` columns' worth of memory."""
    tokens = buffer.shape[0]
    return buffer.view(-1)[tokens * start : tokens * (start + width)].view(tokens, width)
