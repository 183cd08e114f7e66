"""results.jsonl -> Markdown. Of several records of one measurement the newest counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.gemm import rate_for
from bench.goals import GOALS
from bench.markdown import GB, Record, failure, newest, ratio, table
from bench.sections import (
    cpu_section,
    curve_section,
    family_section,
    fit_section,
    profile_section,
    rows_path_section,
    rows_section,
    sweep_section,
)
from bench.work import STACKS, WORKS

TITLE = "# Measurements\n\nMade with `python -m bench`; what is measured and what the columns mean: bench/README.md."


def read(file: Path) -> list[Record]:
    """All records of a results file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def markdown(records: Sequence[Record]) -> str:
    """One section per kind of measurement found."""
    parts = [write(chosen) for kind, write in SECTIONS.items() if (chosen := _of_kind(records, kind))]
    return "\n\n".join([TITLE, *parts]) + "\n"


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """Records of a kind, the GPU's own rates with them, as the shares need those."""
    chosen = [record for record in records if record["kind"] == kind]
    return [*chosen, *(r for r in records if r["kind"] == "gemm")] if chosen and kind == "step" else chosen


def gemm_section(records: Sequence[Record]) -> str:
    """The ceilings."""
    good = [record for record in records if record["status"] == "ok"]
    if not good:
        return f"## Ceilings\n\nfailed: {records[-1].get('error')}"
    last = good[-1]
    rows = [
        [f"{p['rows']} x {p['inputs']} x {p['outputs']}"]
        + [f"{p[key]:.0f}" if key in p else "-" for key in ("bf16", "bf16_input_gradient", "fp8_rowwise")]
        for p in last["products"]
    ]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items())
    head = f"## Ceilings\n\n{last['gpu']}; {versions}. Device copy {last['copy_gb_per_second']} GB/s.\n\n"
    return head + table(["rows x in x out", "bf16 TFLOP/s", "bf16 input gradient", "fp8 row-wise"], rows)


def step_section(records: Sequence[Record]) -> str:
    """Times and peaks of one step, against the best other stack and the goal."""
    gemms = [record for record in records if record["kind"] == "gemm" and record["status"] == "ok"]
    found = newest([record for record in records if record["kind"] == "step"], "row", "stack")
    keys = [key for key in WORKS if any(row == key for row, _ in found)]
    stacks = [stack for stack in STACKS if any(s == stack for _, s in found)]
    rows = []
    for key in keys:
        cells = [_step_cell(found.get((key, stack))) for stack in stacks]
        rows.append([f"`{key}`", WORKS[key].title, *cells, *_against(key, found)])
    times = table(["", "work", *stacks, "time / best other", "peak / best other", "goal"], rows)
    details = [
        _detail(key, stack, found[key, stack], gemms) for key in keys for stack in stacks if (key, stack) in found
    ]
    head = ["", "stack", "path", "tokens/s", "share of GEMM rate", "allocated", "from start", "reserved"]
    head += ["device", "pinned", "start-up s"]
    note = (
        "Milliseconds: median (min). GB = 1e9 bytes, allocated / reserved: ours since the process began, the others' "
        "since a reset after their warm-up (`from start` has both alike)."
    )
    return f"## One training step\n\n{note}\n\n{times}\n\n{table(head, [row for row in details if row])}"


def _step_cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record["status"] != "ok":
        return failure(record)
    memory = f"{record['allocated_bytes'] / GB:.2f}/{record['reserved_bytes'] / GB:.2f} GB"
    return f"{record['step_ms']:.1f} ({record['min_ms']:.1f}) ms, {memory}"


def _against(key: str, found: dict[tuple[str, ...], Record]) -> list[str]:
    """Time and memory over the best other stack's, and the goal with whether it is met."""
    ours = found.get((key, "ours"))
    good = [r for (row, stack), r in found.items() if row == key and stack != "ours" and r["status"] == "ok"]
    goal = GOALS.get(key)
    wanted = "-" if goal is None else f"{goal.ms:g} ms" + (f", {goal.gb:g} GB" if goal.gb else "")
    if ours is None or ours["status"] != "ok":
        return ["-", "-", wanted]
    ratios = [ratio(ours, good, name) for name in ("step_ms", "allocated_bytes")]
    if goal is not None:
        met_time = ours["step_ms"] <= goal.ms
        met_memory = goal.gb is None or ours["allocated_bytes"] <= goal.gb * GB
        wanted += f": time {'met' if met_time else 'missed'}, memory {'met' if met_memory else 'missed'}"
    return [*ratios, wanted]


def _detail(key: str, stack: str, record: Record, gemms: Sequence[Record]) -> list[str]:
    if record["status"] != "ok":
        return []
    share = "-"
    if gemms:
        rate = rate_for(gemms[-1], WORKS[key].rows * WORKS[key].tokens)
        share = f"{record['useful_flop'] / record['step_ms'] / 1e9 / rate:.0%}"
    from_start = record.get("allocated_from_start_bytes", record["allocated_bytes"])
    device = record.get("device_used_bytes", record["device_sampled_bytes"])
    sizes = [record["allocated_bytes"], from_start, record["reserved_bytes"], device, record["pinned_bytes"]]
    memory = [f"{value / GB:.2f}" for value in sizes]
    startup = f"{record['startup_seconds']:.1f}"
    return [f"`{key}`", stack, record.get("path", ""), f"{record['tokens_per_second']:,}", share, *memory, startup]


SECTIONS: dict[str, Callable[[Sequence[Record]], str]] = {
    "gemm": gemm_section,
    "step": step_section,
    "profile": profile_section,
    "rows": rows_section,
    "rows-path": rows_path_section,
    "sweep": sweep_section,
    "fit": fit_section,
    "curve": curve_section,
    "family": family_section,
    "cpu": cpu_section,
}
