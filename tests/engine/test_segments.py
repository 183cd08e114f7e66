"""Tensors cut from one piece of memory, and what lets go of it."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from engine_models import make, make_rows, run
from fitune.data.batches import pack
from fitune.engine.buffers import Buffers
from fitune.engine.groups import settle
from fitune.engine.path import EnginePath
from fitune.engine.segments import Segment

CPU = torch.device("cpu")


def test_tensors_follow_each_other_aligned():
    segment = Segment([3 * 5 * 2, 0, 4, 1024], CPU)
    first = segment.empty([3, 5], torch.bfloat16)
    none = segment.copy(torch.empty(0, 7))
    scalar = segment.copy(torch.tensor(2.5))
    last = segment.copy(torch.arange(256, dtype=torch.float32))
    assert [t.shape for t in (first, none, scalar, last)] == [(3, 5), (0, 7), (), (256,)]
    assert scalar == 2.5
    assert last[-1] == 255
    start = first.untyped_storage().data_ptr()
    assert [t.data_ptr() - start for t in (first, scalar, last)] == [0, 512, 1024]
    assert first.untyped_storage().nbytes() == 512 + 512 + 1024
    with pytest.raises(AssertionError, match="more than was asked for"):
        segment.empty([1], torch.uint8)


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_all_that_a_block_multiplies_by_moves(quantization):
    model, model_type = make("qwen2", "attention", quantization=quantization)
    engine = EnginePath(model, model_type, "full", 64, 128)
    groups = list(engine.blocks[0].groups.values())
    settle(groups)
    tensors = []
    for group in groups:
        product = group._product
        tensors += [value for value in vars(product).values() if isinstance(value, torch.Tensor)]
        tensors += [linear.weight if quantization == "none" else linear.codes for linear in product._linears]
        tensors += [] if quantization == "none" else [linear.scale for linear in product._linears]
        tensors = [tensor for tensor in tensors if tensor is not product._bias_N and tensor.numel()]
    assert len(tensors) == {"none": 13, "int8": 16, "fp8": 28}[quantization]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


@pytest.mark.parametrize("level", ["elementwise", "offload"])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_buffers_that_grow_let_go_of_the_smaller_ones(quantization, level, monkeypatch):
    """They are one piece of memory: a view of any would keep all of it, beside the larger one that is made."""
    model, model_type = make("llama", quantization=quantization, dropout=0.1)
    engine = EnginePath(model, model_type, level, 64, 256)
    run(engine, model, pack(make_rows([17, 5])))
    kept = [StorageWeakRef(t.untyped_storage()) for t in engine._buffers._shared.values()]
    assert not any(ref.expired() for ref in kept)
    gone = []

    def larger(*args):
        gone.extend(ref.expired() for ref in kept)
        return Buffers(*args)

    monkeypatch.setattr("fitune.engine.path.Buffers", larger)
    run(engine, model, pack(make_rows([100, 60])))
    assert len(gone) == len(kept) > 4
    assert all(gone)
