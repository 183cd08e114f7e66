"""docs/results/matrix.md: the outcomes of all cells, out of the reports of their tests."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from matrix.cells import CELLS, Cell, table

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
    counts = f"{len(CELLS)} cells: {len(trained)} trained, {len(rows) - len(trained)} refused, {len(CELLS) - len(rows)} failed"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    falls = [1 - row["losses"][-1] / row["losses"][0] for row in trained]
    lines = [
        "# The matrix, run",
        "",
        f"Written by `make matrix` ({versions}, Python {platform.python_version()}, CPU). {counts}. "
        f"The loss of three steps fell by {median(falls):.0%} in the median, {min(falls):.1%} at least.",
        "",
        "`fast`, `plain`: trained on that path, and everything that docs/matrix.md names held. `refused`: before a weight "
        "was read.",
        "",
        table(texts),
    ]
    (root / PAGE).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return f"{counts}\n\n{table(texts)}"


def _text(row: dict[str, Any] | None) -> str:
    if row is None:
        return "**failed**"
    return str(row["path"] or "refused")
