"""Order, steps and micro batches."""

from array import array

import pytest
import torch

from fitune.config import build
from fitune.data.batches import IGNORE, StepPlan, epoch_order, micro_batches, pack, pad
from fitune.data.prepare import Row
from fitune.errors import DataError


def row(length, prompt=2, name="f:1"):
    return Row(array("i", range(10, 10 + length)), bytes([0] * prompt + [1] * (length - prompt)), name)


def plan(lengths, **train):
    return StepPlan(lengths, build({"model": {"path": "x"}, "train": train}).train)


def test_order_is_a_pure_function():
    assert epoch_order(100, 0, 0) == epoch_order(100, 0, 0)
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    assert len({epoch_order(100, seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert epoch_order(8, 1, 2) == (5, 7, 3, 1, 2, 4, 0, 6), "golden: a change breaks every stored run"


def test_every_row_once_per_epoch():
    steps = plan([5] * 10, global_batch_rows=4, epochs=2)
    assert steps.total_steps == 6
    seen = [steps.step(i) for i in range(6)]
    assert [(s.epoch, s.index, len(s.rows)) for s in seen] == [
        (e, i, n) for e in (0, 1) for i, n in enumerate((4, 4, 2))
    ]
    assert sorted(sum((s.rows for s in seen[:3]), ())) == list(range(10))
    assert seen[0].rows != seen[3].rows


def test_any_step_can_be_asked_first():
    forward = plan([5, 9, 30, 2] * 5, global_batch_tokens=40, epochs=3)
    rows = [forward.step(i) for i in range(forward.total_steps)]
    jumped = plan([5, 9, 30, 2] * 5, global_batch_tokens=40, epochs=3)
    assert [jumped.step(i) for i in reversed(range(jumped.total_steps))] == rows[::-1]


def test_token_batches_stay_within_their_limit():
    lengths = [5, 9, 30, 2, 50] * 5
    steps = plan(lengths, global_batch_tokens=40)
    for i in range(steps.total_steps):
        rows = steps.step(i).rows
        assert sum(lengths[r] for r in rows) <= 40 or len(rows) == 1


@pytest.mark.parametrize(("train", "total"), [({"epochs": 0.5}, 2), ({"epochs": 2.5}, 8), ({"max_steps": 7}, 7)])
def test_total_steps(train, total):
    assert plan([5] * 10, global_batch_rows=4, **train).total_steps == total


def test_padding_is_masked_by_length():
    batch = pad([row(6), row(3, name="f:2")], pad_id=12)  # 12 is also a real token
    assert batch.input_ids_BT.tolist()[1] == [10, 11, 12, 12, 12, 12]
    assert batch.labels_BT.tolist()[1] == [IGNORE, IGNORE, 12, IGNORE, IGNORE, IGNORE]
    assert batch.attention_mask_BT.tolist()[1] == [1, 1, 1, 0, 0, 0]
    assert batch.num_supervised == 5 == int((batch.labels_BT[:, 1:] != IGNORE).sum())
    assert batch.sources == ("f:1", "f:2")


def test_packed_documents_restart_and_their_first_token_is_never_a_target():
    batch = pack([row(4, prompt=0), row(3, prompt=0)])
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels_BT.tolist() == [[IGNORE, 11, 12, 13, IGNORE, 11, 12]]
    assert batch.attention_mask_BT is None
    assert batch.num_supervised == 5


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_hold_each_row_once(packing):
    key = {"micro_batch_tokens": 20} if packing else {"micro_batch_rows": 3}
    config = build({"model": {"path": "x"}, "data": {"packing": packing, "max_length": 16}, "train": key})
    rows = [row(3 + i % 9, name=f"f:{i}") for i in range(20)]
    batches = list(micro_batches(rows, config.data, config.train, 0))
    assert sorted(s for b in batches for s in b.sources) == sorted(r.source for r in rows)
    assert sum(b.num_supervised for b in batches) == sum(r.num_supervised for r in rows)
    if packing:
        assert all(b.input_ids_BT.shape[1] <= 20 for b in batches)
        real = sum(b.input_ids_BT.numel() for b in batches)
        assert real == sum(r.num_tokens for r in rows)


def test_a_row_that_cannot_be_packed_is_named():
    config = build(
        {"model": {"path": "x"}, "data": {"packing": True, "max_length": 8}, "train": {"micro_batch_tokens": 8}}
    )
    with pytest.raises(DataError, match="f:1: 9 tokens"):
        list(micro_batches([row(9)], config.data, config.train, 0))


def test_batches_move():
    assert pad([row(3)], 0).to(torch.device("cpu")).num_supervised == 1
