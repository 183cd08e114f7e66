"""Examples -> rows of ids with the tokens that count marked, and what becomes of rows that are too long.

Second step of a run's data, after `sources.py`; `prepare.py` puts the rows of a run together.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fitune.data.example import BadRow, Example, clean, writable
from fitune.data.templates import Encoded, Template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError

_CHUNK = 1000  # examples encoded at once; bounds memory, keeps every core of the tokenizer busy


@dataclass(frozen=True, slots=True)
class Row:
    """One training row.

    Args:
        input_ids: 32-bit ids.
        learn: one byte per id, 1 where the token counts in the loss.
        source: `file:line`; windows of one text share it.
    """

    input_ids: array[int]
    learn: bytes
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens in the loss; the first never is, since nothing predicts it."""
        return self.learn.count(1, 1)

    def digest(self) -> bytes:
        """A hash of ids and marks, the same for identical rows wherever they come from."""
        ids = self.input_ids
        if sys.byteorder == "big":
            ids = ids[:]
            ids.byteswap()
        return hashlib.sha256(ids.tobytes() + self.learn).digest()


@dataclass(frozen=True, slots=True)
class LongRow:
    """A conversation that max_length would cut, and what is left of it."""

    row: Row
    num_kept_supervised: int


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    template: Template | None,
    loss_on: Literal["answers", "all"] = "answers",
) -> Iterator[tuple[Example, Row | BadRow]]:
    """Turn examples into rows of any length, in order; a raw text is one row still.

    Args:
        template: may be None if no example is a conversation.
        loss_on: `all` marks every token of a conversation; a raw text is always learnt as a whole.
    Raises:
        ConfigError: raw text with a tokenizer that has no end-of-sequence token.
    """
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        talks = [example.messages for example in chunk if example.messages is not None]
        assert template is not None or not talks, "conversations need a template"
        laid_out = iter(template.conversations(talks)) if template is not None else iter(())
        texts = iter(_encode_texts([example.text for example in chunk if example.text is not None], tokenizer))
        for example in chunk:
            encoded = next(texts) if example.messages is None else next(laid_out)
            if isinstance(encoded, DataError):
                yield example, _bad(example, str(encoded))
                continue
            learn = encoded.learn if loss_on == "answers" else b"\1" * len(encoded.ids)
            row = Row(array("i", encoded.ids), b"\0" + learn[1:], example.source)
            yield example, row if row.num_supervised else _bad(example, "no token is supervised")


def _encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[Encoded]:
    if not texts:
        return []
    if tokenizer.eos_id is None:
        raise ConfigError(f"{tokenizer.folder}: the tokenizer has no end-of-sequence token, which ends every text")
    rows = ([*tokenizer.prefix_ids, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts))
    return [Encoded(ids, b"\1" * len(ids)) for ids in rows]


def windows(row: Row, max_length: int, opening: Sequence[int] = ()) -> list[Row]:
    """Cut a raw text into consecutive rows of at most max_length tokens, each token once.

    A last window of one token would teach nothing, so the one before it gives it another.

    Args:
        opening: ids that every row needs in front; `row` has them.
    """
    bounds = [0, *range(max_length, row.num_tokens, max(1, max_length - len(opening))), row.num_tokens]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and not opening:
        bounds[-2] -= 1
    rows = [Row(row.input_ids[: bounds[1]], b"\0" + row.learn[1 : bounds[1]], row.source)]
    for start, end in pairwise(bounds[1:]):
        ids, learn = array("i", opening) + row.input_ids[start:end], bytes(len(opening)) + row.learn[start:end]
        rows.append(Row(ids, b"\0" + learn[1:], row.source))
    return rows


def fit(row: Row, max_length: int) -> Row | LongRow:
    """A conversation within max_length; only an end that nobody learns from (a newline) is cut without a word."""
    if row.num_tokens <= max_length:
        return row
    if row.learn.count(1, max_length):
        return LongRow(row, row.learn.count(1, 1, max_length))
    return cut(row, max_length)


def cut(row: Row, max_length: int) -> Row:
    """The first max_length tokens of a row."""
    return Row(row.input_ids[:max_length], row.learn[:max_length], row.source)


def _bad(example: Example, reason: str) -> BadRow:
    return BadRow(example.file, example.line, clean(reason), writable(example.raw))
