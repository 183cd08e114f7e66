"""The findings of `doctor.py` as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fitune.data.example import cap
from fitune.data.row_view import table

if TYPE_CHECKING:  # doctor.py hands these two functions on, so that callers import one module
    from fitune.data.doctor import DoctorReport

MAX_BAD_ROWS = 100
MAX_DUPLICATES = 20
MAX_EXAMPLE_CHARACTERS = 1500
BAR_WIDTH = 40


def to_json(report: DoctorReport) -> str:
    """The whole report, every bad row and duplicate included, as one JSON object."""
    tree = dataclasses.asdict(report)
    tree["bad_rows"] = [
        {"file": row.file, "line": row.line, "reason": row.reason, "row": cap(row.raw)} for row in report.bad_rows
    ]
    tree["num_bad_rows"] = report.num_bad_rows
    tree["bad_by_reason"] = report.bad_by_reason
    tree["num_duplicates"] = len(report.duplicates)
    return json.dumps(tree, ensure_ascii=False, indent=2)


def render_text(report: DoctorReport) -> str:
    """The report for a terminal, without colours."""
    sections = [
        _overview(report),
        _bad_rows(report),
        _lengths(report),
        _cuts(report),
        _duplicates(report),
        *(table(row) for row in report.rendered),
        *([f"--- {source}, what is learnt between ⟦ and ⟧", _shorten(text)] for source, text in report.examples),
    ]
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def _overview(report: DoctorReport) -> Iterator[str]:
    for file in report.files:
        yield f"{file}: format {report.formats[file]}"
    for note in report.notes:
        yield f"note: {note}"
    if report.extra_keys:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in report.extra_keys.items())
        yield f"keys that are not used: {keys}"
    good = report.num_rows - report.num_bad_rows
    yield f"rows        {report.num_rows:,}: {good:,} good, {report.num_bad_rows:,} bad"
    yield f"template    {report.template or _no_template(report)}"
    yield (
        f"tokens      {report.num_tokens:,}, of which {report.num_supervised:,} "
        f"({_share(report.num_supervised, report.num_tokens)}) are learnt"
    )
    yield (
        f"unknown     {report.num_unknown_tokens:,} tokens ({_share(report.num_unknown_tokens, report.num_tokens)}); "
        f"single bytes of unknown characters {report.num_byte_tokens:,} "
        f"({_share(report.num_byte_tokens, report.num_tokens)})"
    )


def _no_template(report: DoctorReport) -> str:
    only_text = set(report.formats.values()) == {"text"}
    return "none (raw text)" if only_text else "none (no row is a good conversation)"


def _bad_rows(report: DoctorReport) -> Iterator[str]:
    if not report.bad_rows:
        return
    yield f"{_rows(report.num_bad_rows, 'bad row')}, by reason:"
    for reason, count in list(report.bad_by_reason.items())[:20]:
        yield f"  {count:>7,}  {reason}"
    yield "where:"
    for row in report.bad_rows[:MAX_BAD_ROWS]:
        yield f"  {row}"
    if report.num_bad_rows > MAX_BAD_ROWS:
        yield f"  ... and {report.num_bad_rows - MAX_BAD_ROWS:,} more (--json has all)"
    yield f"  data.on_bad_rows=quarantine would train without them; now set: data.on_bad_rows={report.on_bad_rows}"


def _lengths(report: DoctorReport) -> Iterator[str]:
    if not report.histogram:
        return
    numbers = ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())
    yield f"tokens per row: {numbers}"
    most = max(count for _, _, count in report.histogram)
    for low, high, count in report.histogram:
        bar = " " + "#" * -(-count * BAR_WIDTH // most) if count else ""
        here = "  <- max_length" if low < report.max_length <= high else ""
        yield f"  {low:>8,} - {high - 1:>8,} {count:>9,}{bar}{here}"


def _cuts(report: DoctorReport) -> Iterator[str]:
    cuts = report.cuts
    if cuts.num_split_texts:
        yield (
            f"{_rows(cuts.num_split_texts, 'text')} longer than max_length {report.max_length:,}: split into "
            f"{cuts.num_windows:,} rows; each token is kept once"
        )
    if not cuts.num_answers:
        return
    answer = "answer" if report.loss_on == "answers" else "conversation"
    if not cuts.num_rows:
        yield f"max_length {report.max_length:,} cuts no {answer}; {cuts.max_length_for_all:,} would be enough"
        return
    yield (
        f"max_length {report.max_length:,} cuts {cuts.num_cut_answers:,} of {_rows(cuts.num_answers, answer)} "
        f"({_share(cuts.num_cut_answers, cuts.num_answers)}) in {_rows(cuts.num_rows)}: they lose their end, the "
        "end-of-sequence token included"
    )
    yield (
        f"  data.on_long_rows=truncate would keep {cuts.num_rows - cuts.num_hopeless_rows:,} of these rows, lose "
        f"{cuts.num_lost_supervised:,} supervised tokens, and reject {_rows(cuts.num_hopeless_rows)} with none left"
    )
    yield f"  data.on_long_rows=quarantine would train without {_rows(cuts.num_rows)}"
    yield f"  data.max_length={cuts.max_length_for_all} keeps every {answer} whole"
    yield f"  now set: data.on_long_rows={report.on_long_rows}"


def _duplicates(report: DoctorReport) -> Iterator[str]:
    if not report.duplicates:
        return
    yield f"{_rows(len(report.duplicates))} repeating an earlier row exactly:"
    for first, again in report.duplicates[:MAX_DUPLICATES]:
        yield f"  {again} repeats {first}"
    if len(report.duplicates) > MAX_DUPLICATES:
        yield f"  ... and {len(report.duplicates) - MAX_DUPLICATES:,} more (--json has all)"


def _shorten(text: str) -> str:
    # Control characters of a data file have no business in a terminal.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[:MAX_EXAMPLE_CHARACTERS])
    return shown if len(text) <= MAX_EXAMPLE_CHARACTERS else f"{shown} ... (shortened)"


def _rows(count: int, what: str = "row") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"
