"""Rows -> optimizer steps -> micro batches of tensors.

Which rows make up step k is a pure function of (seed, epoch, index): no library's random generator is involved, so
it is the same on every version and machine. Packing and micro batches rearrange rows inside one step only.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fitune.config import DataConfig, TrainConfig
from fitune.data.prepare import Row
from fitune.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    Attributes:
        input_ids_BT: int64.
        labels_BT: int64, the token itself where it is supervised, else -100. Not shifted. The first token of a
            document is never supervised, so no document predicts the start of the next.
        position_ids_BT: int64, restarts at 0 with each document.
        attention_mask_BT: int64, 1 for real tokens; None when packed (transformers finds documents in position_ids).
        num_supervised: count of labels that are not -100.
        sources: `file:line` of each row in the batch.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None
    num_supervised: int
    sources: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to `device`."""
        mask = self.attention_mask_BT
        return Batch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            self.position_ids_BT.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.num_supervised,
            self.sources,
        )


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step and where it stands."""

    epoch: int
    index: int
    rows: tuple[int, ...]


class StepPlan:
    """Assigns rows to optimizer steps.

    Args:
        lengths: tokens of each training row.
        config: gives seed, epochs, max_steps and the global batch, counted in rows or tokens.
    """

    def __init__(self, lengths: Sequence[int], config: TrainConfig) -> None:
        self._lengths = tuple(lengths)
        self._config = config
        # Per-epoch lists are rebuilt on demand; two are enough for a run that moves forward.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._starts = [0]  # number of steps before each epoch
        self.total_steps = self._count()

    def step(self, number: int) -> Step:
        """Rows of optimizer step `number`, counted from 0."""
        if self._config.global_batch_tokens is None:  # every epoch has as many steps
            epoch, index = divmod(number, self.steps_of_epoch(0))
            return Step(epoch, index, self._epoch(epoch)[index])
        epoch = max(e for e, start in enumerate(self._starts) if start <= number)
        while number >= self._starts[epoch] + len(self._epoch(epoch)):
            self._starts.append(self._starts[epoch] + len(self._epoch(epoch)))
            epoch += 1
        index = number - self._starts[epoch]
        return Step(epoch, index, self._epoch(epoch)[index])

    def steps_of_epoch(self, epoch: int) -> int:
        """How many optimizer steps one epoch has."""
        if self._config.global_batch_tokens is None:
            return math.ceil(len(self._lengths) / (self._config.global_batch_rows or 1))
        return len(self._epoch(epoch))

    def _count(self) -> int:
        if self._config.max_steps is not None:
            return self._config.max_steps
        whole, part = divmod(self._config.epochs, 1.0)
        if self._config.global_batch_tokens is None:
            return max(1, math.ceil(self._config.epochs * self.steps_of_epoch(0)))
        total = sum(self.steps_of_epoch(epoch) for epoch in range(int(whole)))
        if part:
            total += math.ceil(part * self.steps_of_epoch(int(whole)))
        return max(1, total)

    def _build_epoch(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        order = epoch_order(len(self._lengths), self._config.seed, epoch)
        if self._config.global_batch_tokens is None:
            rows = self._config.global_batch_rows or 1
            return tuple(order[i : i + rows] for i in range(0, len(order), rows))
        steps: list[tuple[int, ...]] = []
        taken: list[int] = []
        tokens = 0
        for row in order:
            if taken and tokens + self._lengths[row] > self._config.global_batch_tokens:
                steps.append(tuple(taken))
                taken, tokens = [], 0
            taken.append(row)
            tokens += self._lengths[row]
        return (*steps, tuple(taken))


def epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Permutation of range(num_rows): rows sorted by a keyed hash of their index."""
    prefix = f"{seed}:{epoch}:".encode()
    return tuple(sorted(range(num_rows), key=lambda i: hashlib.blake2b(prefix + b"%d" % i, digest_size=8).digest()))


def micro_batches(rows: Sequence[Row], data: DataConfig, train: TrainConfig, pad_id: int) -> Iterator[Batch]:
    """Cut the rows of one step into micro batches, longest first, so that little is padded.

    Args:
        rows: rows of one optimizer step, or of the evaluation set.
        pad_id: any valid id; padding is masked by length, so it may equal the end-of-sequence id.
    """
    by_length = sorted(rows, key=lambda row: -row.num_tokens)  # stable: ties keep their order
    if data.packing:
        for group in _first_fit(by_length, train.micro_batch_tokens or 2 * data.max_length):
            yield pack(group)
    else:
        size = train.micro_batch_rows or 4
        for start in range(0, len(by_length), size):
            yield pad(by_length[start : start + size], pad_id)


def _first_fit(rows: Sequence[Row], capacity: int) -> list[list[Row]]:
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        if row.num_tokens > capacity:
            raise DataError(f"{row.source}: {row.num_tokens} tokens, more than train.micro_batch_tokens ({capacity})")
        for index, free in enumerate(room):
            if row.num_tokens <= free:
                groups[index].append(row)
                room[index] -= row.num_tokens
                break
        else:
            groups.append([row])
            room.append(capacity - row.num_tokens)
    return groups


def pad(rows: Sequence[Row], pad_id: int) -> Batch:
    """One sequence per row, padded on the right to the longest row."""
    width = max(row.num_tokens for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels_BT = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BT[i, : row.num_tokens], labels_BT[i, : row.num_tokens] = _tensors(row)
        mask_BT[i, : row.num_tokens] = 1
    positions_BT = torch.arange(width).expand(len(rows), width)
    return Batch(ids_BT, labels_BT, positions_BT, mask_BT, _supervised(rows), tuple(row.source for row in rows))


def pack(rows: Sequence[Row]) -> Batch:
    """All rows one after another in one sequence (1, T); positions restart, no attention mask."""
    parts = [_tensors(row) for row in rows]
    ids_T = torch.cat([ids for ids, _ in parts])
    labels_T = torch.cat([labels for _, labels in parts])
    positions_T = torch.cat([torch.arange(row.num_tokens) for row in rows])
    sources = tuple(row.source for row in rows)
    return Batch(ids_T[None], labels_T[None], positions_T[None], None, _supervised(rows), sources)


def _tensors(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    ids_T = torch.tensor(row.input_ids, dtype=torch.int64)
    learn_T = torch.tensor(list(row.learn), dtype=torch.bool)
    learn_T[0] = False
    return ids_T, torch.where(learn_T, ids_T, IGNORE)


def _supervised(rows: Sequence[Row]) -> int:
    return sum(row.num_supervised for row in rows)
