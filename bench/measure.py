"""Clock and memory inside a child. GB elsewhere; everything here is bytes and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class DeviceUse:
    """The device's memory in use, by everybody, sampled where the child asks for it.

    Allocators rarely give memory back, so samples after loading and between steps come close to the highest value; the
    parent watches from outside as well.
    """

    highest_bytes: int = 0

    def sample(self) -> int:
        """Bytes in use now; 0 without a GPU."""
        if not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        self.highest_bytes = max(self.highest_bytes, total - free)
        return total - free


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pinned_bytes() -> int:
    """Most host memory that PyTorch's pinned allocator held at once."""
    if not torch.cuda.is_available():
        return 0
    stats = torch.cuda.host_memory_stats()
    return max((int(value) for key, value in stats.items() if key.endswith("_bytes.peak")), default=0)


def peaks() -> dict[str, int]:
    """Highest allocated and reserved bytes since the counters were last reset."""
    if not torch.cuda.is_available():
        return {"allocated_bytes": 0, "reserved_bytes": 0}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


@dataclass
class Timed:
    """What `timed` found: seconds of each timed step, of the first step ever, and all losses."""

    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before_reset: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the timed steps."""
        return statistics.median(self.seconds)

    def report(self, tokens: int) -> dict[str, Any]:
        """Times as a record has them.

        Args:
            tokens: trained tokens of one step.
        """
        return {
            "step_ms": round(self.median * 1e3, 3),
            "min_ms": round(min(self.seconds) * 1e3, 3),
            "times_ms": [round(value * 1e3, 3) for value in self.seconds],
            "first_step_seconds": round(self.first_seconds, 3),
            "tokens_per_second": round(tokens / self.median),
            "losses": [round(value, 5) for value in self.losses[:4]],
        }


def timed(step: Callable[[], float], warmup: int, steps: int, use: DeviceUse, reset: bool = False) -> Timed:
    """Time steps one by one, the device idle before and after each.

    Args:
        step: one optimizer step; returns its loss.
        reset: forget the peaks after the warm-up (how other stacks' peaks are usually given); what they were by then
            is in `before_reset`.
    """
    found = Timed()
    for index in range(warmup + steps):
        if index == warmup:
            found.before_reset = peaks()
            if reset and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        synchronize()
        started = time.perf_counter()
        loss = step()
        synchronize()
        seconds = time.perf_counter() - started
        found.losses.append(loss)
        if index == 0:
            found.first_seconds = seconds
        if index >= warmup:
            found.seconds.append(seconds)
        else:
            use.sample()
    use.sample()
    return found
