"""Small pieces of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
GB = 1e9


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def failure(record: Record) -> str:
    """A record without a result, in one cell."""
    text = str(record.get("error") or "").replace("|", "/").replace("\n", " ")
    return f"{record['status']}: {text[:60]}" if text else str(record["status"])


def ratio(ours: Record, others: Sequence[Record], name: str, best: Any = min) -> str:
    """Ours over the best of the others; `best` is min for costs, max for rates."""
    chosen = best((record[name] for record in others), default=0)
    return f"{ours[name] / chosen:.2f}" if chosen else "-"


def newest(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], Record]:
    """Records by what tells them apart; of equals the last one."""
    return {tuple(record.get(name) for name in names): record for record in records}
