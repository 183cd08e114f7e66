"""What is in data files, what is wrong with them, and what a run would make of them; `fitune data FILE...`.

Reads like a run does, but refuses nothing: every problem is collected, and lengths are those before any cut.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fitune.config import DataConfig
from fitune.data.doctor_text import render_text, to_json
from fitune.data.example import BadRow, Example
from fitune.data.prepare import percentile, template_for
from fitune.data.row_view import RowView, view
from fitune.data.rows import Row, encode, fit, windows
from fitune.data.sources import read
from fitune.data.tokenizer import Tokenizer

__all__ = ["DoctorReport", "examine", "render_text", "to_json"]

NUM_EXAMPLES = 3
NUM_BUCKETS = 12


@dataclass(frozen=True, slots=True)
class Cuts:
    """What data.max_length does to conversations.

    Args:
        num_rows: rows of which an answer would be cut.
        num_answers: answers in all rows; conversations, which are learnt whole, with data.loss_on=all.
        num_cut_answers: answers that would lose their end, the end-of-sequence token included.
        num_lost_supervised: supervised tokens behind the cut.
        num_hopeless_rows: rows that would keep no supervised token; truncation rejects them.
        max_length_for_all: the smallest data.max_length that cuts no answer.
        num_split_texts: raw texts longer than max_length, which are split into num_windows rows, not cut.
    """

    num_rows: int
    num_answers: int
    num_cut_answers: int
    num_lost_supervised: int
    num_hopeless_rows: int
    max_length_for_all: int
    num_split_texts: int
    num_windows: int


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The findings.

    Args:
        template: the layout used, None for raw text only.
        lengths: tokens per row: p50, p95, p99, max and mean.
        histogram: (from, below, rows) buckets of those lengths, from the smallest that has a row.
        duplicates: (first, again) as `file:line`, one pair for every row that repeats an earlier one exactly.
        examples: the first rows as the model sees them, what is learnt between ⟦ and ⟧.
        num_unknown_tokens, num_byte_tokens: tokens for characters that the vocabulary does not know, or knows only
            byte by byte; many of them mean that the model hardly reads this language.
        rendered: the first rows token by token, as many as were asked for.
    """

    files: tuple[str, ...]
    formats: Mapping[str, str]
    template: str | None
    max_length: int
    loss_on: str
    on_bad_rows: str
    on_long_rows: str
    num_rows: int
    bad_rows: tuple[BadRow, ...]
    notes: tuple[str, ...]
    extra_keys: Mapping[str, int]
    num_tokens: int
    num_supervised: int
    lengths: Mapping[str, int]
    histogram: tuple[tuple[int, int, int], ...]
    cuts: Cuts
    duplicates: tuple[tuple[str, str], ...]
    examples: tuple[tuple[str, str], ...]
    num_unknown_tokens: int
    num_byte_tokens: int
    rendered: tuple[RowView, ...] = ()

    @property
    def num_bad_rows(self) -> int:
        """Rows that no run can use."""
        return len(self.bad_rows)

    @property
    def bad_by_reason(self) -> dict[str, int]:
        """How many rows each reason takes away, most first."""
        return dict(Counter(row.kind for row in self.bad_rows).most_common())


def examine(files: Sequence[str], data: DataConfig, tokenizer: Tokenizer, render: int = 0) -> DoctorReport:
    """Read files and measure them as training data.

    Args:
        files: taken instead of data.train.
        data: format, template, loss_on and max_length count; the rules for bad and long rows only change the advice.
        render: rows to show token by token, instead of examples.
    Raises:
        DataError: a file cannot be read at all.
        ConfigError: the template cannot be used with the tokenizer.
    """
    result = read(files, data.format)
    template = template_for(result, data, tokenizer)
    measure = _Measure(data.max_length, tokenizer, render)
    bad = list(result.bad_rows)
    for example, row in encode(result.examples, tokenizer, template, data.loss_on):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            measure.add(example, row)
    ordered = sorted(measure.lengths)
    return DoctorReport(
        files=tuple(files),
        formats=result.formats_by_file,
        template=template.name if template is not None else None,
        max_length=data.max_length,
        loss_on=data.loss_on,
        on_bad_rows=data.on_bad_rows,
        on_long_rows=data.on_long_rows,
        num_rows=result.num_rows,
        bad_rows=tuple(sorted(bad, key=lambda row: (row.file, row.line))),
        notes=(*result.notes, *(template.remarks if template is not None else [])),
        extra_keys=result.extra_keys,
        num_tokens=sum(ordered),
        num_supervised=measure.num_supervised,
        lengths={
            "p50": percentile(ordered, 0.5),
            "p95": percentile(ordered, 0.95),
            "p99": percentile(ordered, 0.99),
            "max": ordered[-1] if ordered else 0,
            "mean": round(sum(ordered) / len(ordered)) if ordered else 0,
        },
        histogram=tuple(_histogram(ordered)),
        cuts=measure.cuts(),
        duplicates=tuple(measure.duplicates),
        examples=tuple(measure.examples),
        num_unknown_tokens=measure.num_unknown,
        num_byte_tokens=measure.num_byte,
        rendered=tuple(measure.rendered),
    )


@dataclass(slots=True)
class _Measure:
    """What is counted row by row."""

    max_length: int
    tokenizer: Tokenizer
    render: int
    lengths: list[int] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    rendered: list[RowView] = field(default_factory=list)
    num_supervised: int = 0
    num_unknown: int = 0
    num_byte: int = 0
    _cuts: Counter[str] = field(default_factory=Counter)
    _longest: int = 8  # the smallest max_length that the configuration allows
    _first: dict[bytes, str] = field(default_factory=dict)
    _bytes: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._bytes = self.tokenizer.byte_ids()

    def add(self, example: Example, row: Row) -> None:
        """Count one row."""
        self.lengths.append(row.num_tokens)
        self.num_supervised += row.num_supervised
        if self.tokenizer.unk_id is not None:
            self.num_unknown += row.input_ids.count(self.tokenizer.unk_id)
        self.num_byte += sum(map(self._bytes.__contains__, row.input_ids))
        key = hashlib.sha256(repr((example.messages, example.text)).encode()).digest()
        first = self._first.setdefault(key, example.source)
        if first != example.source:
            self.duplicates.append((first, example.source))
        if len(self.rendered) < self.render:
            self.rendered.append(view(row, self.tokenizer))
        if len(self.examples) < NUM_EXAMPLES and not self.render:
            self.examples.append((example.source, mark(row, self.tokenizer)))
        if example.messages is None:
            num_windows = len(windows(row, self.max_length, self.tokenizer.opening_ids))
            self._cuts["split"] += num_windows > 1
            self._cuts["windows"] += num_windows if num_windows > 1 else 0
        else:
            self._add_answers(row)

    def _add_answers(self, row: Row) -> None:
        answers = row.learn.count(b"\0\1")
        self._cuts["answers"] += answers
        self._longest = max(self._longest, row.learn.rfind(b"\1") + 1)
        fitted = fit(row, self.max_length)
        if not isinstance(fitted, Row):
            self._cuts["rows"] += 1
            self._cuts["cut"] += answers - row.learn.count(b"\1\0", 0, self.max_length + 1)
            self._cuts["lost"] += row.num_supervised - fitted.num_kept_supervised
            self._cuts["hopeless"] += not fitted.num_kept_supervised

    def cuts(self) -> Cuts:
        """The counts so far."""
        count = self._cuts
        return Cuts(
            num_rows=count["rows"],
            num_answers=count["answers"],
            num_cut_answers=count["cut"],
            num_lost_supervised=count["lost"],
            num_hopeless_rows=count["hopeless"],
            max_length_for_all=self._longest,
            num_split_texts=count["split"],
            num_windows=count["windows"],
        )


def mark(row: Row, tokenizer: Tokenizer) -> str:
    """A row as text, special tokens shown, what is learnt between ⟦ and ⟧."""
    parts = []
    start = 0
    while start < row.num_tokens:
        learnt = row.learn[start]
        end = row.learn.find(b"\0" if learnt else b"\1", start)
        end = row.num_tokens if end < 0 else end
        text = tokenizer.decode(row.input_ids[start:end].tolist(), skip_special=False)
        parts.append(f"⟦{text}⟧" if learnt else text)
        start = end
    return "".join(parts)


def _histogram(ordered: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    if not ordered:
        return
    width = next(w for w in _nice_widths() if w * NUM_BUCKETS > ordered[-1])
    counts = Counter(length // width for length in ordered)
    for bucket in range(min(counts), max(counts) + 1):
        yield bucket * width, (bucket + 1) * width, counts[bucket]


def _nice_widths() -> Iterable[int]:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10
