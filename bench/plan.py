"""`bench plan`: what `fitune plan` predicts beside what other commands measured of fitune, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import rows, sweep
from bench.markdown import Record, newest, table
from bench.models import SHAPES
from bench.ours import config_of
from bench.work import WORKS
from fitune.config import build
from fitune.plan.arch import read_arch
from fitune.plan.hardware import find_gpu
from fitune.plan.lengths import Lengths
from fitune.plan.memory import MemoryPlan, plan_memory

KINDS = ("step", "rows", "sweep", "fit-probe")
HEAD = """# Planned and measured memory

`python -m bench plan RESULTS.jsonl`: what `fitune plan` says of each record of ours on {gpu}. Peak: most bytes that
PyTorch's allocator handed out since the process began. Context: memory of the device in use, less what was in use when
idle, less what the allocator had reserved. Host: page-locked. GB = 1e9 bytes. What the differences are: docs/memory.md.

"""


def markdown(records: Sequence[Record]) -> str:
    """The comparison as one table; of several records of one work item and level the newest counts."""
    gpu = next((record["gpu"] for record in reversed(records) if record["kind"] == "gemm"), None)
    good = [
        {"row": "rows", **record, "level": _level(record["note"])}
        for record in records
        if record["kind"] in KINDS and record.get("stack", "ours") == "ours" and record.get("note")
    ]
    names = ("kind", "row", "rows", "level", "micro_tokens", "tokens", "cap_gb")
    lines = [_line(record, gpu) for record in newest(good, *names).values()]
    columns = ["work", "level", "largest phase", "peak planned", "measured", "error"]
    columns += ["context planned", "measured", "host planned", "measured", "self-check ran"]
    return HEAD.format(gpu=gpu or "an unnamed GPU") + table(columns, lines) + "\n"


def planned(
    record: Record,
    gpu: str | None,
    change: dict[str, Any] | None = None,
    extra: dict[str, dict[str, Any]] | None = None,
) -> MemoryPlan:
    """The plan of the configuration that a record is of, for the GPU of that name.

    Args:
        change: fields of the work item to replace.
        extra: section -> settings over those of the work item.
    """
    if record["kind"] == "rows":
        # The lengths are those of files that need not be here; older records do not say what came of them.
        config = build(rows.config("model", "data", record["rows"], 1, "cuda"))
        largest = record.get("largest_micro_step")
        lengths = Lengths((largest,)) if largest else "not read"
        return plan_memory(_arch("llama-3.2-1b"), config, lengths, find_gpu(gpu))
    row = record.get("row")
    if record["kind"] == "sweep":
        change = sweep.change(record["micro_tokens"], record["tokens"])
    elif record["kind"] == "fit-probe":
        row, extra = "8b-nf4", sweep.FIT_SETTINGS
        change = {key: sweep.FIT[key] for key in ("rows", "r", "targets")} | {"tokens": record["tokens"]}
    work = replace(WORKS[row], level=_level(record["note"]), **(change or {}))
    lengths = Lengths((work.tokens,) * work.rows)
    return plan_memory(_arch(work.model), config_of(work, Path("model"), "cuda", extra), lengths, find_gpu(gpu))


def _arch(model: str) -> Any:
    import transformers

    name, arguments = SHAPES[model]
    return read_arch(getattr(transformers, name)(**arguments).to_dict())


def _level(note: str) -> str:
    found = re.search(r"keeps `(\w+)`", note)
    return found.group(1) if found else ""


def _name(record: Record) -> str:
    if record["kind"] == "rows":
        return f"rows, {record['rows']} an update"
    if record["kind"] == "sweep":
        return f"{record['row']}, {record['micro_tokens'] // record['tokens']} x {record['tokens']:,}"
    if record["kind"] == "fit-probe":
        return f"fit {record['cap_gb']:g} GB, 1 x {record['tokens']:,}"
    return str(record["row"])


def _line(record: Record, gpu: str | None) -> list[str]:
    plan = planned(record, gpu)
    measured = record["allocated_bytes"]
    reserved, used, pinned = (record.get(name) for name in ("reserved_bytes", "device_used_bytes", "pinned_bytes"))
    tokens = re.search(r"on (\d+) tokens to .*?\((loss|each block)\)", record["note"])
    how = {"loss": "the whole model", "each block": "block by block"}
    checked = f"{tokens.group(1)} tokens, {how[tokens.group(2)]}" if tokens else "-"
    return [
        f"`{_name(record)}`",
        f"`{plan.job.level}`",
        plan.peak_phase,
        f"{plan.peak_bytes / 1e9:.3f}",
        f"{measured / 1e9:.3f}",
        f"{(plan.peak_bytes - measured) / measured:+.1%}",
        f"{plan.context_bytes / 1e9:.3f}",
        f"{(used - reserved) / 1e9:.3f}" if used and reserved else "-",
        f"{plan.host_bytes / 1e9:.4f}",
        f"{pinned / 1e9:.4f}" if pinned else "-",
        checked,
    ]
