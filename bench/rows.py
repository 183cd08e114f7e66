"""`bench rows`: the tutorial's own job on real rows, each stack through its own trainer.

Chinese and English alpaca rows, Llama-3 tokenizer, Llama-3.2-1B, LoRA r=8 on q and v, bf16, loss on the whole text, no
checkpointing, no evaluation. Counted are real tokens: padding is none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.children import Runner
from bench.models import with_tokenizer

FILES = ("alpaca_gpt4_zh_demo1000.jsonl", "alpaca_en_demo.jsonl")
# (stack, how rows are laid out); unsloth's `padded` is its default, which drops the padding.
TRAINERS = (("ours", "packed"), ("hf", "padded"), ("liger", "padded"), ("unsloth", "padded"), ("unsloth", "packed"))
# Rows per update -> our steps (20 to 30 seconds at the goal's rate) and micro batches of two rows or 2 x 1024 slots.
STEPS = {32: 400, 2: 1500}
MICRO = {32: {"padded": 16, "packed": 3}, 2: {"padded": 1, "packed": 1}}
WARMUP = 10
POLL_SECONDS = 0.002
COMMAND = "import sys; from fitune.cli import main; sys.exit(main())"


def run(
    runner: Runner, data: Path, tokenizer: Path, models: Path, updates: Sequence[int], stacks: Sequence[str]
) -> None:
    """Measure; the results are in `runner.results`.

    Args:
        data: folder with `FILES`.
        tokenizer: folder of the Llama-3 tokenizer.
        models: folder of the random models.
        updates: rows per optimizer step, out of `STEPS`.
    """
    unknown = [rows for rows in updates if rows not in STEPS]
    if unknown:
        raise SystemExit(f"--updates {unknown[0]}: allowed are {', '.join(map(str, STEPS))}")
    common = _common(runner, data, tokenizer, models)
    for rows in updates:
        for stack, layout in TRAINERS:
            if stack not in stacks:
                continue
            labels = {"kind": "rows", "stack": stack, "layout": layout, "rows": rows}
            if runner.time_is_up():
                runner.record(labels | {"status": "not started: time is up"})
            elif stack == "ours":
                runner.run("ours_rows", {**common, "rows": rows, "out": str(runner.out / f"rows{rows}")}, labels)
            else:
                more = {"stack": stack, "layout": layout, "accumulation": MICRO[rows][layout]}
                runner.run("peer_rows", common | more, labels)


def both_paths(runner: Runner, data: Path, tokenizer: Path, models: Path, steps: int) -> None:
    """The same rows, 32 an update, through `fitune train` with `train.path` plain and fast; every loss is recorded."""
    common = _common(runner, data, tokenizer, models)
    for path in ("plain", "fast"):
        labels = {"kind": "rows-path", "path": path, "updates": steps}
        if runner.time_is_up():
            runner.record(labels | {"status": "not started: time is up"})
            continue
        more = {"rows": 32, "out": str(runner.out / f"rows-{path}"), "steps": steps, "path": path}
        runner.run("ours_rows", common | more, labels)


def _common(runner: Runner, data: Path, tokenizer: Path, models: Path) -> dict[str, Any]:
    """Arguments of every measurement."""
    folder = with_tokenizer(runner.make_model("llama-3.2-1b", models), tokenizer.absolute())
    return {"folder": str(folder), "data": str(data.absolute())}


def ours(
    folder: str,
    data: str,
    rows: int,
    out: str,
    steps: int | None = None,
    device: str = "cuda",
    path: str | None = None,
) -> dict[str, Any]:
    """Train with the real `fitune train` and watch its metrics.jsonl grow.

    Args:
        steps: optimizer steps; None: `STEPS[rows]`.
        path: `train.path`, and the loss of every update is returned; None: fitune's choice, first and last loss.
    """
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    file = target / "run.yaml"  # JSON is YAML
    tree = config(folder, data, rows, steps or STEPS[rows], device)
    if path is not None:
        tree["train"]["path"] = path
    file.write_text(json.dumps(tree), encoding="utf-8")
    shutil.rmtree(target / "run", ignore_errors=True)  # an earlier run's rows would look like ours
    command = [sys.executable, "-c", COMMAND, "train", str(file), f"output.dir={target / 'run'}"]
    metrics = target / "run" / "metrics.jsonl"
    said = target / "said.txt"
    started, arrivals, ended = _watch(command, metrics, said)
    words = said.read_text(encoding="utf-8", errors="replace")
    print(words)  # into this measurement's log
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    result = json.loads((target / "run" / "result.json").read_text(encoding="utf-8"))
    return _rates(lines, arrivals, started, ended) | {
        "largest_micro_step": largest_micro_step(file),
        "allocated_bytes": result["peak_memory_bytes"],
        "note": next((line for line in words.splitlines() if " path: " in line), ""),
        "losses": [line["loss"] for line in (lines if path else (lines[0], lines[-1]))],
    }


def largest_micro_step(file: Path) -> int:
    """Tokens of the static size that the longest micro-step of a run file takes, as `fitune plan` finds it."""
    command = [sys.executable, "-c", COMMAND, "plan", str(file), "--json"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(json.loads(plan)["step"]["planned_tokens"])


def _watch(command: list[str], metrics: Path, said: Path) -> tuple[float, list[float], float]:
    """Run a command; when it began, when each line of `metrics` appeared, when it ended.

    Raises:
        RuntimeError: it failed.
    """
    arrivals, size = [], 0
    started = time.perf_counter()
    with said.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            if metrics.is_file() and metrics.stat().st_size > size:
                with metrics.open("rb") as grown:
                    grown.seek(size)
                    new = grown.read()
                size += len(new)
                arrivals += [time.perf_counter()] * new.count(b"\n")
            time.sleep(POLL_SECONDS)
    if child.returncode != 0:
        words = said.read_text(encoding="utf-8", errors="replace").strip()
        raise RuntimeError(f"fitune train ended with exit code {child.returncode}: {words[-200:]}")
    return started, arrivals, time.perf_counter()


def _rates(lines: Sequence[dict[str, Any]], arrivals: list[float], started: float, ended: float) -> dict[str, Any]:
    """Tokens per second after the warm-up: on the wall clock between the rows of metrics.jsonl, and inside steps."""
    warm = min(WARMUP, len(lines) // 2)
    arrivals = arrivals + [ended] * (len(lines) - len(arrivals))
    tokens = sum(line.get("tokens", 0) for line in lines[warm:])
    wall, inside = arrivals[-1] - arrivals[warm - 1], sum(line["seconds"] for line in lines[warm:])
    steps = len(lines) - warm
    return {
        "real_tokens_per_second": round(tokens / wall),
        "inside_steps_tokens_per_second": round(tokens / inside),
        "step_ms": round(1e3 * wall / steps, 2),
        "real_tokens_per_step": round(tokens / steps),
        "slots_per_step": round(sum(line.get("padded_tokens", 0) for line in lines[warm:]) / steps),
        "startup_seconds": round(arrivals[0] - started - lines[0]["seconds"], 2),
        "ending_seconds": round(ended - arrivals[-1], 2),
    }


def config(folder: str, data: str, rows: int, steps: int, device: str) -> dict[str, Any]:
    """The run file of `ours`, as a tree."""
    return {
        "model": {"path": folder, "dtype": "bf16"},
        "method": {"name": "lora", "r": 8, "alpha": 16, "target_modules": "attention"},
        "data": {
            "train": [str(Path(data) / name) for name in FILES],
            "template": "tutorial",
            "loss_on": "all",
            "packing": True,
            "max_length": 1024,
            "on_long_rows": "truncate",
        },
        "train": {
            "global_batch_rows": rows,
            "micro_batch_tokens": 2048,
            "max_steps": steps,
            "learning_rate": 1e-4,
            "save_every_steps": steps,
            "device": device,
        },
    }
