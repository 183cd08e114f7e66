"""The rows of a run: read, check, encode, fit to max_length, split into training and held-out, count.

All of it happens before the model loads, so that a bad row costs seconds. No row is dropped without being counted:
it is in train, in eval or in rejected, or the run stops.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fitune.config import DataConfig
from fitune.data.example import BadRow, Example, writable
from fitune.data.rows import LongRow, Row, cut, encode, fit, windows
from fitune.data.sources import ReadResult, read
from fitune.data.templates import Template, resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import CheckpointError, DataError

__all__ = ["Dataset", "Row", "percentile", "prepare", "write_rejected"]

MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of a run.

    Args:
        rejected: rows left out by data.on_bad_rows or data.on_long_rows, with their reasons.
        fingerprint: sha256 over ids, marks, order and split; where files lie does not count.
        summary: numbers for the report, ready for JSON.
    """

    train: tuple[Row, ...]
    eval: tuple[Row, ...]
    rejected: tuple[BadRow, ...]
    fingerprint: str
    summary: Mapping[str, object]


@dataclass(slots=True)
class _Part:
    """Rows of one set of files; `groups` keeps the windows of one text together."""

    groups: list[list[Row]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    long: list[tuple[Example, LongRow]] = field(default_factory=list)
    hopeless: list[tuple[Example, LongRow]] = field(default_factory=list)  # truncation would keep nothing to learn
    num_truncated: int = 0
    num_split: int = 0
    read: ReadResult | None = None
    template: Template | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group]


def prepare(data: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Make the training and held-out rows that a configuration asks for.

    Raises:
        DataError: rows are bad or too long and the configuration refuses them, or no rows are left.
        ConfigError: the template cannot be used with the tokenizer.
    """
    parts = [_part(data.train, data, tokenizer)]
    if isinstance(data.eval, tuple):
        parts.append(_part(data.eval, data, tokenizer))
    rejected = _reject(parts, data)
    train, held_out = parts[0].rows, parts[1].rows if len(parts) > 1 else []
    if isinstance(data.eval, float):
        train, held_out = _split(parts[0].groups, data.eval)
    if not train:
        raise DataError(f"no training rows are left of {', '.join(data.train)}; {len(rejected):,} were rejected")
    if data.eval is not None and not held_out:
        raise DataError(f"no held-out rows: data.eval is {data.eval!r}, which leaves none of {len(train):,} rows")
    return Dataset(
        tuple(train),
        tuple(held_out),
        tuple(rejected),
        _fingerprint(train, held_out),
        _summary(parts, train, held_out, rejected),
    )


def write_rejected(path: Path, rejected: Sequence[BadRow]) -> None:
    """Write rejected rows as JSON Lines: file, line, reason, row (its own JSON, to be repaired and used again).

    Raises:
        CheckpointError: the disk refused.
    """
    try:
        with path.open("w", encoding="utf-8") as stream:
            for bad in rejected:
                row = {"file": bad.file, "line": bad.line, "reason": bad.reason, "row": bad.raw}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CheckpointError(f"disk: cannot write {path}: {reason}; choose another output.dir") from error


def template_for(result: ReadResult, data: DataConfig, tokenizer: Tokenizer) -> Template | None:
    """The template that these rows need; None for raw text, which has no layout."""
    talks = any(example.messages is not None for example in result.examples)
    return resolve_template(data.template, tokenizer) if talks else None


def _part(files: tuple[str, ...], data: DataConfig, tokenizer: Tokenizer) -> _Part:
    result = read(files, data.format)
    part = _Part(bad=list(result.bad_rows), read=result)
    template = part.template = template_for(result, data, tokenizer)
    for example, row in encode(result.examples, tokenizer, template, data.loss_on):
        if isinstance(row, BadRow):
            part.bad.append(row)
        elif example.messages is None:
            group = windows(row, data.max_length, tokenizer.opening_ids)
            part.num_split += len(group) > 1
            part.groups.append(group)
        else:
            fitted = fit(row, data.max_length)
            if isinstance(fitted, Row):
                part.groups.append([fitted])
            elif data.on_long_rows != "truncate":
                part.long.append((example, fitted))
            elif fitted.num_kept_supervised:
                part.groups.append([cut(row, data.max_length)])
                part.num_truncated += 1
            else:
                part.hopeless.append((example, fitted))
    return part


def _too_long(example: Example, long: LongRow, max_length: int, hopeless: bool) -> BadRow:
    tokens = f"(the row has {long.row.num_tokens:,} tokens)"
    reason = f"longer than data.max_length={max_length} {tokens}"
    if hopeless:
        reason = f"no answer token fits data.max_length={max_length} {tokens}; raise data.max_length"
    return BadRow(example.file, example.line, reason, writable(example.raw))


def _reject(parts: Sequence[_Part], data: DataConfig) -> list[BadRow]:
    """Rows that are left out, as far as the configuration lets them be left out."""
    bad = sorted((row for part in parts for row in part.bad), key=lambda row: (row.file, row.line))
    long = [item for part in parts for item in part.long]
    incomplete = [file for part in parts if part.read is not None for file in part.read.incomplete]
    hopeless = [item for part in parts for item in part.hopeless]
    nothing_left = [_too_long(item, one, data.max_length, True) for item, one in hopeless]
    complaints = []
    if bad and (data.on_bad_rows == "refuse" or incomplete):
        complaints.append(_listing(f"{len(bad):,} bad row{'s' * (len(bad) > 1)}", [str(row) for row in bad]))
        if incomplete:
            complaints.append(f"{', '.join(incomplete)} could not be read to the end; repair it first.")
        else:
            complaints.append(
                "Repair them, or set data.on_bad_rows=quarantine to train without them (they go to rejected.jsonl)."
            )
    if hopeless and data.on_bad_rows == "refuse":
        count = f"{len(hopeless):,} row{'s' * (len(hopeless) > 1)}"
        complaints.append(_listing(f"{count} of which truncation keeps nothing to learn", list(map(str, nothing_left))))
        complaints.append(
            f"Set data.max_length={_longest(hopeless)} to keep them whole, or data.on_bad_rows=quarantine to train "
            "without them."
        )
    if long and data.on_long_rows == "refuse":
        complaints += _refused_as_long(long, data.max_length)
    if complaints:
        raise DataError("\n".join(complaints))
    return bad + nothing_left + [_too_long(item, one, data.max_length, False) for item, one in long]


def _refused_as_long(long: Sequence[tuple[Example, LongRow]], max_length: int) -> list[str]:
    lines = [f"{item.source}: {one.row.num_tokens:,} tokens" for item, one in long]
    count = "1 row is" if len(long) == 1 else f"{len(long):,} rows are"
    title = f"{count} longer than data.max_length {max_length:,}, which would cut the answer"
    num_hopeless = sum(not one.num_kept_supervised for _, one in long)
    but = (
        f" ({num_hopeless:,} of them would keep no answer token and could only be quarantined)" if num_hopeless else ""
    )
    advice = (
        f"Set data.max_length={_longest(long)} to keep them all, data.on_long_rows=truncate to cut them{but}, or "
        "data.on_long_rows=quarantine to train without them."
    )
    return [_listing(title, lines), advice]


def _longest(long: Sequence[tuple[Example, LongRow]]) -> int:
    return max(one.row.num_tokens for _, one in long)


def _listing(title: str, lines: Sequence[str]) -> str:
    shown = [f"  {line}" for line in lines[:MAX_SHOWN]]
    more = [f"  ... and {len(lines) - MAX_SHOWN:,} more"] if len(lines) > MAX_SHOWN else []
    return "\n".join([f"{title}:", *shown, *more])


def _split(groups: Sequence[Sequence[Row]], fraction: float) -> tuple[list[Row], list[Row]]:
    """Hold out the groups with the smallest hashes, whole sets of identical ones only."""
    digests = [hashlib.sha256(b"".join(row.digest() for row in group)).digest() for group in groups]
    copies = Counter(digests)
    wanted = min(max(1, round(len(groups) * fraction)), len(groups) - 1)
    chosen: set[bytes] = set()
    for digest in sorted(copies):
        if not wanted:
            break
        if copies[digest] <= wanted:
            chosen.add(digest)
            wanted -= copies[digest]
    train: list[Row] = []
    held_out: list[Row] = []
    for digest, group in zip(digests, groups, strict=True):
        (held_out if digest in chosen else train).extend(group)
    return train, held_out


def _fingerprint(train: Sequence[Row], held_out: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for name, rows in (("train", train), ("eval", held_out)):
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(row.digest())
    return digest.hexdigest()


def percentile(ordered: Sequence[int], share: float) -> int:
    """The value that `share` of an ascending list does not exceed (nearest rank); 0 of an empty list."""
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] if ordered else 0


def _by_reason(rejected: Sequence[BadRow]) -> dict[str, int]:
    """How many rows each reason takes away; names in rows can make any number of reasons, so the rarest are one."""
    counts = Counter(row.kind for row in rejected).most_common()
    rest = sum(count for _, count in counts[MAX_SHOWN:])
    return dict(counts[:MAX_SHOWN]) | ({"other reasons": rest} if rest else {})


def _summary(
    parts: Sequence[_Part], train: Sequence[Row], held_out: Sequence[Row], rejected: Sequence[BadRow]
) -> dict[str, object]:
    lengths = sorted(row.num_tokens for row in train)
    results = [part.read for part in parts if part.read is not None]
    seen = {row.digest() for row in train} if held_out else set()
    template = next((part.template for part in parts if part.template is not None), None)
    return {
        "template": template.name if template is not None else None,
        "template_hash": template.hash if template is not None else None,
        "template_notes": template.remarks if template is not None else [],
        "formats": {file: name for result in results for file, name in result.formats_by_file.items()},
        "notes": [note for result in results for note in result.notes],
        "extra_keys": dict(sum((Counter(result.extra_keys) for result in results), Counter())),
        "rows_read": sum(result.num_rows for result in results),
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "eval_rows_also_in_train": sum(row.digest() in seen for row in held_out),
        "train_tokens": sum(lengths),
        "train_supervised_tokens": sum(row.num_supervised for row in train),
        "eval_tokens": sum(row.num_tokens for row in held_out),
        "eval_supervised_tokens": sum(row.num_supervised for row in held_out),
        "rejected_rows": len(rejected),
        "rejected_by_reason": _by_reason(rejected),
        "truncated_rows": sum(part.num_truncated for part in parts),
        "split_texts": sum(part.num_split for part in parts),
        "train_length_tokens": {
            "p50": percentile(lengths, 0.5),
            "p95": percentile(lengths, 0.95),
            "p99": percentile(lengths, 0.99),
            "max": lengths[-1],
        },
    }
