"""`bench step`: every chosen work item by every chosen stack, one process each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.children import Runner
from bench.work import WORKS


def run(
    runner: Runner,
    rows: Sequence[str],
    stacks: Sequence[str],
    models: Path,
    device: str = "cuda",
    change: dict[str, Any] | None = None,
) -> None:
    """Measure; the results are in `runner.results`.

    Args:
        rows: keys of `work.WORKS`.
        stacks: out of `work.STACKS`; one that cannot do a work item is passed over.
        models: folder of the random models; missing ones are made.
        change: fields of every work item to replace, such as the number of steps.
    """
    if device == "cuda" and not runner.time_is_up() and not runner.has("gemm"):
        runner.run("gemm", {}, {"kind": "gemm"})
    for key in rows:
        for stack in stacks:
            if stack not in WORKS[key].stacks:
                continue
            if runner.time_is_up():
                runner.record({"kind": "step", "row": key, "stack": stack, "status": "not started: time is up"})
                continue
            runner.make_model(WORKS[key].model, models)
            arguments = {"key": key, "models": str(models.absolute()), "change": change or {}}
            arguments |= {"device": device} if stack == "ours" else {"stack": stack}
            runner.run("ours" if stack == "ours" else "peer", arguments, {"kind": "step", "row": key, "stack": stack})
