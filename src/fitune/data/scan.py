"""Bytes of a data file -> numbered JSON objects, with every problem named and none passed over.

Lines are read as bytes, so invalid UTF-8, oversized rows and blank lines are found where they stand. Nothing here
knows what a row means; `sources.py` does.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fitune.data.strict_json import StrictDecoder
from fitune.errors import DataError

MAX_ROW_BYTES = 10_000_000
MAX_LIST_BYTES = 2 * 1024**3
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file: an object, or the problem that keeps it from being one.

    Args:
        last: the rest of the file could not be read after this row, so rows may be missing.
    """

    line: int
    value: dict[str, object] | None
    problem: str | None
    raw: str
    last: bool = False


def check_files(files: tuple[str, ...]) -> None:
    """Refuse files that cannot be read at all, all of them in one message.

    Raises:
        DataError: no files, a missing one, a directory, an unknown ending or an empty one.
    """
    if not files:
        raise DataError("no data files were given")
    problems = []
    for file in files:
        try:
            status = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{file}: does not exist")
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
        else:
            if stat.S_ISDIR(status.st_mode):
                problems.append(f"{file}: is a directory; give the files in it")
            elif not file.endswith(SUFFIXES):
                problems.append(f"{file}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
            elif not status.st_size:
                problems.append(f"{file}: is empty")
    if problems:
        raise DataError("\n".join(problems))


def scan(file: str, notes: list[str]) -> Iterator[Record]:
    """Read one file, row by row.

    Args:
        file: .json holds one list of objects, .jsonl one object per line; either may be gzipped.
        notes: gets remarks about the file which are no problem of a row.
    Raises:
        DataError: the file cannot be read or decompressed, holds no rows, or is no list.
    """
    is_list = Path(file).name.removesuffix(".gz").endswith(".json")
    line = 0
    try:
        with _open(file) as stream:
            for record in _list_rows(file, stream, notes) if is_list else _line_rows(file, stream, notes):
                line = record.line
                yield record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip file after line {line}: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not line:
        raise DataError(f"{file}: has no rows")


def _open(file: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.endswith(".gz") else open(file, "rb")


def _without_bom(file: str, head: bytes, notes: list[str]) -> bytes:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{file}: is UTF-16; save it as UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        notes.append(f"{file}: begins with a byte-order mark, which is ignored")
        return head[len(codecs.BOM_UTF8) :]
    return head


def _line_rows(file: str, stream: BinaryIO, notes: list[str]) -> Iterator[Record]:
    decoder = StrictDecoder()
    blanks: list[int] = []  # blank lines are allowed at the end only, so they wait for the next row
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        size = len(line.rstrip(b"\r\n"))
        if len(line) == MAX_ROW_BYTES + 2 and not line.endswith(b"\n"):
            size += _skip_line(stream)
        if number == 1:
            line = _without_bom(file, line, notes)
        if not line.strip():
            blanks.append(number)
            continue
        for blank in blanks:
            yield Record(blank, None, "blank line; only allowed at the end of the file", "")
        blanks.clear()
        yield _line_row(decoder, number, line, size)
    if blanks and number > len(blanks):
        notes.append(f"{file}: {len(blanks)} blank line(s) at the end are ignored")


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while rest := stream.readline(1 << 20):
        skipped += len(rest.rstrip(b"\r\n"))
        if rest.endswith(b"\n"):
            break
    return skipped


def _line_row(decoder: StrictDecoder, number: int, line: bytes, size: int) -> Record:
    content = line.rstrip(b"\r\n")
    if size > MAX_ROW_BYTES:
        head = content[:4096].decode("utf-8", "replace")
        return Record(number, None, f"a row of {size:,} bytes; at most {MAX_ROW_BYTES:,}", head)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raw = content.decode("utf-8", "replace")
        return Record(number, None, f"invalid UTF-8 at byte {error.start + 1}", raw)
    start = _after_space(text, 0)
    try:
        value, end, problem = decoder.decode(text, start)
    except json.JSONDecodeError as error:
        hint = "; a file with one list ends in .json" if number == 1 and text.strip() == "[" else ""
        return Record(number, None, f"invalid JSON: {_said(error)} at column {error.pos + 1}{hint}", text)
    end = _after_space(text, end)
    if end < len(text):
        return Record(number, None, f"invalid JSON: a second value at column {end + 1}; one object per line", text)
    return _record(number, value, problem, text)


def _list_rows(file: str, stream: BinaryIO, notes: list[str]) -> Iterator[Record]:
    content = stream.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise DataError(f"{file}: a list of more than {MAX_LIST_BYTES:,} bytes; store one object per line as .jsonl")
    # Invalid bytes become lone surrogates here, which the row that holds them is then refused for.
    text = _without_bom(file, content, notes).decode("utf-8", "surrogateescape")
    del content
    position = _after_space(text, 0)
    if not text.startswith("[", position):
        got = (
            "one object; if it has one object per line, name it .jsonl"
            if text.startswith("{", position)
            else "not that"
        )
        raise DataError(f"{file}: a .json file must hold one list of objects, but it is {got}")
    position = _after_space(text, position + 1)
    if text.startswith("]", position):
        raise DataError(f"{file}: has no rows")
    yield from _elements(text, position)


def _elements(text: str, position: int) -> Iterator[Record]:
    decoder = StrictDecoder()
    line, counted = 1, 0
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end, problem = decoder.decode(text, position)
        except json.JSONDecodeError as error:
            reason = f"invalid JSON: {_said(error)} at line {error.lineno} column {error.colno}"
            yield _unread(line, reason, text[position : position + 4096])
            return
        raw = text[position:end]
        if _ESCAPED_BYTE.search(raw):
            problem = "invalid UTF-8"
        if 4 * len(raw) > MAX_ROW_BYTES and (size := len(raw.encode("utf-8", "surrogateescape"))) > MAX_ROW_BYTES:
            problem = f"a row of {size:,} bytes; at most {MAX_ROW_BYTES:,}"
        yield _record(line, value, problem, raw)
        end = _after_space(text, end)
        if text.startswith(",", end):
            position = _after_space(text, end + 1)
            continue
        closed = text.startswith("]", end)
        if not closed or _after_space(text, end + 1) < len(text):
            line += text.count("\n", counted, end)
            what = "more text after the list" if closed else "expected ',' or ']' after a row"
            yield _unread(line, f"invalid JSON: {what}", text[end : end + 4096])
        return


def _said(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # "Unterminated string starting at"


def _unread(line: int, reason: str, raw: str) -> Record:
    return Record(line, None, f"{reason}; the rest of the list was not read", raw, last=True)


def _record(line: int, value: object, problem: str | None, raw: str) -> Record:
    if problem is None and not isinstance(value, dict):
        problem = f"expected an object, got {describe(value)}"
    return Record(line, value if problem is None and isinstance(value, dict) else None, problem, raw)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "the pattern matches nothing, too"
    return match.end()


def describe(value: object) -> str:
    """Name the JSON type of a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
