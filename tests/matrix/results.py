"""docs/results/matrix.md: the outcomes of all cells, out of the reports of their tests."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from matrix.cells import CELLS, MAX_STEPS, PRECISIONS, Cell, table

PAGE = Path("docs") / "results" / "matrix.md"


def write_page(stats: dict[str, list[Any]], root: Path) -> str:
    """Write the page, and answer with the counts.

    Args:
        stats: pytest's reports by outcome.
    """
    rows = [value for report in stats.get("passed", []) for name, value in report.user_properties if name == "cell"]
    done = {Cell(**row["cell"]): row for row in rows}
    texts = {cell: _text(done.get(cell)) for cell in CELLS}
    trained = [row for row in rows if row["status"] == "trained"]
    numbers = (len(trained), len(rows) - len(trained), len(CELLS) - len(rows))
    counts = f"{len(CELLS)} cells: {numbers[0]} trained, {numbers[1]} refused, {numbers[2]} failed"
    versions = ", ".join(f"{name} {version(name).split(chr(43))[0]}" for name in ("torch", "transformers", "peft"))
    falls = [1 - row["losses"][-1] / row["losses"][0] for row in trained]
    lines = [
        "# The matrix, run",
        "",
        f"Written by `make matrix` on CPU ({versions}, Python {platform.python_version()}). {counts}.",
        "",
        f"The loss falls over {MAX_STEPS} steps by {median(falls):.0%} in the median, {min(falls):.1%} at least. With "
        f"checkpointing it is {_changes(done)}.",
        "",
        "`fast`, `plain`: trained on that path, and all that [matrix.md](../matrix.md) names held. `refused`: before a "
        "weight was read.",
        "",
        table(texts),
    ]
    (root / PAGE).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return f"\n{table(texts)}\n{counts}"


def _changes(done: dict[Cell, dict[str, Any]]) -> str:
    """What checkpointing makes of the losses."""
    found = dict.fromkeys(PRECISIONS, 0.0)
    for cell, row in done.items():
        kept = done.get(replace(cell, checkpointing=False))
        if cell.checkpointing and kept is not None:
            for a, b in zip(row["losses"], kept["losses"], strict=False):
                found[cell.precision] = max(found[cell.precision], abs(a / b - 1))
    if not any(found.values()):
        return "the same to the bit"
    return "the same to within " + ", ".join(f"{change:.0e} in {name}" for name, change in found.items())


def _text(row: dict[str, Any] | None) -> str:
    if row is None:
        return "**failed**"
    return str(row["path"] or "refused")
