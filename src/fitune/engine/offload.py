"""What waits in page-locked host memory: block inputs between the passes, rows of an embedding before them.

Two device buffers take turns: while a block computes, an input travels out on a second stream (forward) or in
(backward). At the 55 GB/s measured over PCIe a block's input takes less time than the block as soon as a block
computes about 12,000 FLOP per byte of it; blocks of 1B models do about twice that, of 8B models five times.
"""

from __future__ import annotations

from typing import Any

import torch


class Offload:
    """Inputs of `layers` blocks, rows of `width` each.

    Args:
        slots: the two device buffers, flat, of one size.

    Memory: page-locked on the host as much as one of them for each block.
    """

    def __init__(self, slots: list[torch.Tensor], width: int, layers: int) -> None:
        self._slots, self.width = slots, width
        self._cuda = slots[0].is_cuda
        self._host = [torch.empty(len(slots[0]), dtype=slots[0].dtype, pin_memory=self._cuda) for _ in range(layers)]
        self._side: Any = torch.cuda.Stream() if self._cuda else None  # type: ignore[no-untyped-call]
        self._moved: list[Any] = [None] * layers

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory."""
        return sum(t.numel() * t.element_size() for t in self._host)

    @property
    def device_bytes(self) -> int:
        """The two buffers that take turns."""
        return sum(t.numel() * t.element_size() for t in self._slots)

    def slot(self, layer: int) -> torch.Tensor:
        """The device buffer of a block's input, flat."""
        return self._slots[layer % 2]

    def before_write(self, layer: int) -> None:
        """Wait until the slot's former content has left."""
        if layer >= 2:
            self._wait(layer - 2)

    def store(self, layer: int, tokens: int) -> None:
        """Send a block's input out. The last two stay in their slots as well."""
        self._move(layer, self._host[layer], self.slot(layer), tokens)

    def before_read(self, layer: int) -> None:
        """Wait until a block's input is back."""
        if layer < len(self._host) - 2:
            self._wait(layer)

    def fetch_below(self, layer: int, tokens: int) -> None:
        """A block's slot is free: bring in the input of the block two below."""
        if layer >= 2:
            self._move(layer - 2, self.slot(layer), self._host[layer - 2], tokens)

    def join(self) -> None:
        """Wait for everything under way (a captured graph must end with all its streams joined)."""
        if self._cuda:
            torch.cuda.current_stream().wait_stream(self._side)

    def _move(self, layer: int, to: torch.Tensor, source: torch.Tensor, tokens: int) -> None:
        count = tokens * self.width
        if not self._cuda:
            to[:count].copy_(source[:count])
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            to[:count].copy_(source[:count], non_blocking=True)
            self._moved[layer] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._moved[layer].record(self._side)

    def _wait(self, layer: int) -> None:
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._moved[layer])


class SentRows:
    """Rows of a table in the host's memory, gathered there and sent to the device before a micro-step.

    Memory: 2 * capacity * H elements, page-locked: while one micro-step's rows travel, those of the next are gathered.
    """

    def __init__(self, table_VH: torch.Tensor, capacity: int) -> None:
        self._table_VH = table_VH
        pin = table_VH.is_pinned()
        shape, dtype = (capacity, table_VH.shape[1]), table_VH.dtype
        self._slots = [torch.empty(shape, dtype=dtype, pin_memory=pin) for _ in range(2)]
        self._sent: list[Any] = [None, None]
        self._next = 0

    def send(self, index_T: torch.Tensor, out_TH: torch.Tensor) -> None:
        """out[t] = table[index[t]], once the device gets there; `index_T` is on the host."""
        slot, self._next = self._next, 1 - self._next
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        rows_TH = self._slots[slot][: index_T.shape[0]]
        torch.index_select(self._table_VH, 0, index_T, out=rows_TH)
        out_TH.copy_(rows_TH, non_blocking=True)
        if out_TH.is_cuda:
            self._sent[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent[slot].record()
