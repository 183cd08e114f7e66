"""`bench cpu`: the demo's steps on CPU, both paths in one process, in turns: what disturbs one disturbs the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from bench.children import Runner

WARMUP = 3


def run(runner: Runner, pairs: int, paths: Sequence[str]) -> None:
    """Measure; the result is in `runner.results`."""
    runner.run("cpu", {"pairs": pairs, "paths": list(paths)}, {"kind": "cpu"})


def measure(pairs: int, paths: Sequence[str]) -> dict[str, Any]:
    """Time the same updates on both paths, alternately; the first of each pair changes places.

    Args:
        pairs: timed updates of each path.
        paths: two values of train.path; `default`: left alone.
    """
    from bench import ours
    from bench.curves import demo_case
    from fitune.data.batches import StepPlan, micro_batches

    runs, rows = [], []
    for path in paths:
        extra = {"model": {"dtype": "fp32"}, "train": {"max_steps": pairs + WARMUP}}
        if path != "default":
            extra["train"]["path"] = path
        config, folder, rows = demo_case("cpu", extra)
        runs.append(ours.assemble(config, folder, rows))
    plan = StepPlan([row.num_tokens for row in rows], config.train)
    seconds: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    for number in range(pairs + WARMUP):
        chosen = [rows[i] for i in plan.step(number).rows]
        batches = list(micro_batches(chosen, config.data, config.train, 0))
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            losses[which].append(ours.update(runs[which], batches, config.train.learning_rate or 0.0)[0])
            seconds[which].append(time.perf_counter() - started)
    first, second = (values[WARMUP:] for values in seconds)
    return {
        "paths": list(paths),
        "classes": [type(run.path).__name__ for run in runs],
        "median_ms": [round(statistics.median(values) * 1e3, 3) for values in (first, second)],
        "ratio": round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 4),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "last_losses": [values[-1] for values in losses],
    }
