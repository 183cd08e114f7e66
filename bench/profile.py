"""`bench profile`: where the GPU time of fitune's step goes, kernel by kernel (torch.profiler)."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.children import Runner
from bench.work import WORKS

STEPS = 2
# Of a kernel's name the first that matches says what it is; what is none of them is "other".
PARTS = {
    "attention": "^(forward|dq|dkv|sum_parts)_kernel|flash|fmha",
    "GEMM": "nvjet|gemm|cutlass|splitK|cublas",
    "loss": "^_(cross_entropy|loss_only)",
    "norms": "^_(add_norm|norm_only|norm_backward)|layer_norm",
    "rotation": "^_(rotate|qk_norm_rotate)",
    "activation": "^_(swiglu|gelu)",
    "weights to 16 bit": "^_(rows|aligned|any)_kernel",
    "to fp8": "^_(quantize|transpose)_kernel",
    "dropout": "^_drop",
    "sums over rows": "^_add_column_sums",
    "copies": "[Mm]emcpy|[Mm]emset|copy|^_(refresh|scatter|place|take)",
}


def run(runner: Runner, keys: Sequence[str], models: Path) -> None:
    """Measure; the results are in `runner.results`."""
    for key in keys:
        labels = {"kind": "profile", "row": key}
        if runner.time_is_up():
            runner.record(labels | {"status": "not started: time is up"})
            continue
        runner.make_model(WORKS[key].model, models)
        runner.run("profile", {"key": key, "models": str(models.absolute())}, labels)


def measure(key: str, models: str) -> dict[str, Any]:
    """Milliseconds and launches of each kernel in one step, the largest first; copies count as kernels.

    Returns:
        `kernels`: [name, grid, launches, ms]; `parts`: what they are -> ms; `gpu_ms`: their sum; `span_ms`: from the
        first kernel's start to the last one's end. All are of one step, the mean of `STEPS`.
    """
    import torch

    from bench import ours
    from bench.models import make, model_config
    from fitune.data.batches import pad

    work = WORKS[key]
    folder = make(work.model, Path(models))
    rows = ours.random_rows(work.rows, work.tokens, model_config(folder)["vocab_size"])
    run = ours.assemble(ours.config_of(work, folder, "cuda"), folder, rows)
    batch = pad(rows, 0)
    for _ in range(work.warmup):
        ours.update(run, [batch])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            ours.update(run, [batch])
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return {"note": run.note, **_sums(events)}


def _sums(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, from the events of a trace [us]."""
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in on_gpu:
        grid = "x".join(map(str, event["args"].get("grid", [])))
        kernels[event["name"][:80], grid].append(event["dur"] / 1e3)
    parts: dict[str, float] = defaultdict(float)
    for (name, _), times in kernels.items():
        parts[_part(name)] += sum(times) / STEPS
    ordered = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    span = max(e["ts"] + e["dur"] for e in on_gpu) - min(e["ts"] for e in on_gpu)
    return {
        "kernels": [[*key, len(times) / STEPS, round(sum(times) / STEPS, 4)] for key, times in ordered],
        "parts": {name: round(ms, 3) for name, ms in sorted(parts.items(), key=lambda item: -item[1])},
        "gpu_ms": round(sum(parts.values()), 3),
        "span_ms": round(span / 1e3 / STEPS, 3),
    }


def _part(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
