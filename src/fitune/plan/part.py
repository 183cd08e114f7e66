"""One part of a run's memory, and the phases of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["loading", "self-check", "capture", "forward", "head", "backward", "optimizer step"]
AGAIN: tuple[Phase, ...] = ("forward", "head", "backward", "optimizer step")
STEP: tuple[Phase, ...] = ("capture", *AGAIN)
READY: tuple[Phase, ...] = ("self-check", *STEP)
PHASES: tuple[Phase, ...] = ("loading", *READY)


@dataclass(frozen=True)
class Part:
    """Bytes of one thing, the formula they come from, and when they are taken."""

    name: str
    bytes: int
    formula: str
    phases: tuple[Phase, ...] = PHASES
