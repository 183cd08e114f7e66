"""Data files -> examples with file and line, and every row that cannot be used with its reasons.

First step of a run's data. Formats: alpaca, messages (OpenAI, sharegpt and TRL spelling), raw text; see `formats.py`.
Try it: `fitune data FILE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fitune.data.example import BadRow, Example, Message, cap, clean, writable
from fitune.data.formats import MARKS, parse, recognise, unused_keys
from fitune.data.scan import Record, check_files, scan

__all__ = ["BadRow", "Example", "Message", "ReadResult", "read"]

_MAX_REASONS = 5


@dataclass(frozen=True, slots=True)
class ReadResult:
    """All that is in the files.

    Args:
        formats_by_file: `unknown` when no row of the file could be recognised.
        num_rows: good and bad ones.
        notes: remarks on files which are no problem of a row, such as a byte-order mark.
        extra_keys: top-level keys which the format does not know, and in how many rows they stand.
        incomplete: files whose end could not be read, so that rows are missing from both lists.
    """

    examples: tuple[Example, ...]
    bad_rows: tuple[BadRow, ...]
    formats_by_file: Mapping[str, str]
    num_rows: int
    notes: tuple[str, ...] = ()
    extra_keys: Mapping[str, int] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()


def read(files: Sequence[str], format: str = "auto") -> ReadResult:
    """Read every row of the files, collecting all problems instead of stopping at the first.

    Args:
        files: .json (one list) or .jsonl (one object per line), either also .gz.
        format: alpaca, messages, text, or `auto`: the format of each file's first row that can be recognised.
    Raises:
        DataError: a file is missing, unreadable or without rows; the message names it.
    """
    names = tuple(str(file) for file in files)
    check_files(names)
    reader = _Reader(format)
    for name in names:
        reader.file(name)
    return ReadResult(
        tuple(reader.examples),
        tuple(reader.bad_rows),
        reader.formats,
        len(reader.examples) + len(reader.bad_rows),
        tuple(reader.notes),
        dict(reader.extra_keys),
        tuple(reader.incomplete),
    )


class _Reader:
    """The lists that grow while files are read."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.examples: list[Example] = []
        self.bad_rows: list[BadRow] = []
        self.formats: dict[str, str] = {}
        self.notes: list[str] = []
        self.extra_keys: Counter[str] = Counter()
        self.incomplete: list[str] = []

    def file(self, file: str) -> None:
        """Read one file; rows before the first recognisable one wait until the file's format is known."""
        known = None if self.format == "auto" else self.format
        waiting: list[Record] = []
        for record in scan(file, self.notes):
            if record.last:
                self.incomplete.append(file)
            if known is None and record.value is not None:
                known = recognise(record.value)
            waiting.append(record)
            if known is not None:
                for each in self._drain(waiting):
                    self._row(file, each, known)
        for each in self._drain(waiting):
            self._row(file, each, None)
        self.formats[file] = known or "unknown"

    @staticmethod
    def _drain(waiting: list[Record]) -> Iterator[Record]:
        yield from waiting
        waiting.clear()

    def _row(self, file: str, record: Record, known: str | None) -> None:
        row, problem = record.value, record.problem
        if row is None:
            self.bad_rows.append(BadRow(file, record.line, clean(problem or "unreadable"), cap(record.raw)))
            return
        problems: list[str] = []
        other = recognise(row)
        if known is None:
            problems.append(
                f"{_keys(row)}: no known format; expected instruction and output, messages, prompt and completion, "
                "or text"
            )
        elif other not in (None, known) and (self.format == "auto" or not row.keys() & MARKS[known]):
            why = "data.format says so" if self.format != "auto" else "so is the file's first row"
            problems.append(f"{_keys(row)}: expected a row of format {known} ({why}), got {other}")
        else:
            parsed = parse(row, known, problems)
            if not problems:
                self.extra_keys.update(clean(key, 60) for key in unused_keys(row, known))
                self.examples.append(Example(file, record.line, parsed.messages, parsed.text, record.raw))
                return
        if len(problems) > _MAX_REASONS:
            problems[_MAX_REASONS:] = [f"{len(problems) - _MAX_REASONS} more problems"]
        self.bad_rows.append(BadRow(file, record.line, clean("; ".join(problems)), writable(record.raw)))


def _keys(row: Mapping[str, object]) -> str:
    shown = ", ".join(list(row)[:6]) + (", ..." if len(row) > 6 else "")
    return f"keys {shown}" if row else "an empty object"
