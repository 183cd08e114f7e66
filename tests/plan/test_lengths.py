"""The largest micro-step: a bound that the real batching never passes, and reaches."""

import random

import pytest

from fitune.config import build
from fitune.data.batches import StepPlan, micro_batches
from fitune.data.rows import Row
from fitune.plan.lengths import Lengths, micro_step


def config(data=None, **train):
    return build({"model": {"path": "m"}, "data": {"max_length": 64, **(data or {})}, "train": train})


def rows_of(lengths):
    return [Row(tuple(range(length)), bytes([1] * length), f"f:{i}") for i, length in enumerate(lengths)]


def real_sizes(settings, lengths):
    """(tokens, padded positions) of every micro batch of training and evaluation."""
    rows = rows_of(lengths.train)
    plan = StepPlan(lengths.train, settings.train)
    groups = [[rows[i] for i in plan.step(number).rows] for number in range(plan.total_steps)]
    for group in [*groups, rows_of(lengths.eval)]:
        for batch in micro_batches(group, settings.data, settings.train, 0):
            mask = batch.attention_mask_BT
            yield batch.input_ids_BT.numel() if mask is None else int(mask.sum()), batch.input_ids_BT.numel()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("data", "train"),
    [
        ({}, {"global_batch_rows": 8, "micro_batch_rows": 3}),
        ({}, {"global_batch_rows": 2, "micro_batch_rows": 5}),
        ({}, {"global_batch_tokens": 100, "micro_batch_rows": 4}),
        ({"packing": True}, {"global_batch_rows": 8, "micro_batch_tokens": 100}),
        ({"packing": True}, {"global_batch_tokens": 90}),
    ],
)
def test_no_real_micro_batch_is_larger(data, train, seed):
    draw = random.Random(seed)
    settings = config(data, epochs=3, **train)
    lengths = Lengths(*(tuple(draw.randint(1, 64) for _ in range(count)) for count in (30, 7)))
    planned = micro_step(settings, lengths)
    for tokens, positions in real_sizes(settings, lengths):
        assert tokens <= planned.real
        assert positions <= planned.padded


@pytest.mark.parametrize("data", [{}, {"packing": True}])
def test_the_bound_is_reached_when_a_step_has_all_rows(data):
    train = {"micro_batch_tokens": 64} if data else {"micro_batch_rows": 3}
    settings = config(data, global_batch_rows=6, **train)
    lengths = Lengths((10, 64, 32, 32, 5, 1))
    assert max(tokens for tokens, _ in real_sizes(settings, lengths)) == micro_step(settings, lengths).real


def test_evaluation_counts():
    settings = config(global_batch_rows=2, micro_batch_rows=4)
    assert micro_step(settings, Lengths((10, 9, 8), (5, 5, 5, 6, 1))).real == 21
    assert micro_step(settings, Lengths((10, 9, 8), (1,))).real == 19


def test_unknown_lengths_are_planned_at_their_limit():
    padded = micro_step(config(micro_batch_rows=3), "no data")
    assert (padded.real, padded.padded) == (192, 192)
    assert padded.how == "lengths unknown: planned at max_length, 3 x 64 tokens (no data)"
    assert micro_step(config(micro_batch_rows=3, global_batch_rows=2), "x").real == 128
    assert micro_step(config({"eval": 0.1}, micro_batch_rows=3, global_batch_rows=2), "x").real == 192
    packed = micro_step(config({"packing": True}), "no data")
    assert packed.real == 128
    assert "planned at train.micro_batch_tokens, 128 tokens (no data)" in packed.how
