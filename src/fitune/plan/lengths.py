"""How many tokens the largest micro-step has, from the lengths of the rows or, without them, from the limits.

The rooms that read data stand above this one, so lengths are handed in: `micro_step(config, Lengths(train, eval))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fitune.config import RunConfig


@dataclass(frozen=True)
class Lengths:
    """Tokens of each training row and of each held-out row."""

    train: tuple[int, ...]
    eval: tuple[int, ...] = ()


@dataclass(frozen=True)
class MicroStep:
    """The largest micro-step of a run.

    Attributes:
        real: tokens of its rows, no padding.
        padded: positions it has when every row is padded to the longest.
        rows: how many rows that are.
        first: tokens of the first training row, which the engine's self-check runs.
        how: where the numbers come from, in words.
        alike: every micro-step of the run has this many tokens.
        documents: most rows that a micro-step has, padded or packed.
    """

    real: int
    padded: int
    rows: int
    first: int
    how: str
    alike: bool = False
    documents: int = 1

    def tokens(self, virtual: int) -> int:
        """Upper bound of its rows in the engine, `virtual` ones in front of each document included."""
        return self.real + virtual * self.documents


def micro_step(config: RunConfig, lengths: Lengths | str) -> MicroStep:
    """The largest micro-step that training or evaluation can have.

    Args:
        lengths: of the rows, or why they are not known.
    """
    train, data = config.train, config.data
    if data.packing:
        capacity = train.micro_batch_tokens or 2 * data.max_length
        if isinstance(lengths, str):
            how = f"lengths unknown: planned at train.micro_batch_tokens, {capacity:,} tokens ({lengths})"
            documents = max(1, capacity // data.max_length)
            return MicroStep(capacity, capacity, 1, data.max_length, how, documents=documents)
        most = max(min(capacity, total) for total in (_step_tokens(config, lengths.train), sum(lengths.eval)))
        how, documents = f"at most {most:,} packed tokens", _most_packed(config, lengths, capacity)
        return MicroStep(most, most, 1, lengths.train[0], how, documents=documents)
    rows = train.micro_batch_rows or 4
    if isinstance(lengths, str):
        if data.eval is None:  # evaluation knows no global batch
            rows = min(rows, train.global_batch_rows or rows)
        most = rows * data.max_length
        how = f"lengths unknown: planned at max_length, {rows:,} x {data.max_length:,} tokens ({lengths})"
        return MicroStep(most, most, rows, data.max_length, how, documents=rows)
    found = []
    for group, limit in ((lengths.train, _step_tokens(config, lengths.train)), (lengths.eval, sum(lengths.eval))):
        count = min(rows, train.global_batch_rows or rows) if group is lengths.train else rows
        longest = _longest(group, count)
        found.append((min(sum(longest), limit), (len(longest) * max(longest, default=0), len(longest))))
    real, (padded, most_rows) = max(real for real, _ in found), max(padded for _, padded in found)
    how = f"at most {real:,} tokens in {rows:,} rows"
    documents = max(count for _, (_, count) in found)
    return MicroStep(real, padded, most_rows, lengths.train[0], how, _alike(config, lengths, rows), documents)


def _alike(config: RunConfig, lengths: Lengths, rows: int) -> bool:
    """Padded micro-steps of `rows` rows, all of one length, none of them left over, and no evaluation."""
    step = config.train.global_batch_rows
    if step is None or lengths.eval or len(set(lengths.train)) != 1:
        return False
    return step % rows == 0 and len(lengths.train) % step == 0


def _most_packed(config: RunConfig, lengths: Lengths, capacity: int) -> int:
    """Rows of a packed micro-step at most: the shortest could meet in it."""
    limit = config.train.global_batch_rows or len(lengths.train)
    fitting = [sum(total <= capacity for total in accumulate(sorted(group))) for group in (lengths.train, lengths.eval)]
    return max(min(fitting[0], limit), fitting[1])


def _longest(lengths: Sequence[int], count: int) -> list[int]:
    return sorted(lengths, reverse=True)[:count]


def _step_tokens(config: RunConfig, lengths: Sequence[int]) -> int:
    """A bound on the tokens of one optimizer step: the longest rows could meet in it."""
    train = config.train
    if train.global_batch_tokens is not None:
        return max(min(train.global_batch_tokens, sum(lengths)), max(lengths, default=0))
    return sum(_longest(lengths, train.global_batch_rows or 1))
