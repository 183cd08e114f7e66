"""What a step is to reach, from the first measurement of the other stacks on an H200 (2026-11-23).

The floor counts 4 FLOP per frozen weight and token (6 with recomputation) and 4 for the head at 690 TFLOP/s, attention
at 400; adapters and elementwise work are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """Step time [ms] and peak allocated memory [GB = 1e9 bytes] to reach; the floor [ms] is a bound, no goal."""

    ms: float
    gb: float | None
    floor_ms: float


GOALS: dict[str, Goal] = {
    "1b": Goal(21, 4.4, 16),
    "1b-ckpt": Goal(28, 2.85, 22),
    "1b-ckpt-nf4": Goal(32, 1.46, 23),
    "1b-ckpt-int8": Goal(30, 1.98, 22),
    "8b": Goal(650, 19.0, 570),
    "8b-nf4": Goal(670, 8.6, 585),
    "8b-int8": Goal(660, 12.0, 575),
    "8b-fp8": Goal(440, 12.5, 340),
    "8b-48gb": Goal(505, 48.0, 400),
    "glm": Goal(122, 13.6, 107),
    "glm-int8": Goal(126, 7.9, 108),
    "bloom": Goal(25, 5.5, 17),
    "bloom-bitfit": Goal(27, 5.5, 17),
}


@dataclass(frozen=True)
class RowsGoal:
    """Real tokens per second to reach with so many rows per update, and the peak [GB]."""

    tokens_per_second: int
    gb: float


ROWS_GOALS: dict[int, RowsGoal] = {32: RowsGoal(80_000, 4.5), 2: RowsGoal(25_000, 4.5)}
