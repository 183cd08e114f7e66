"""Virtual tokens on the engine against PEFT's forward: prompt tuning, P-tuning, prefix tuning, on every family."""

from array import array

import pytest
import torch

from engine_models import CONFIGS, NEEDS_CUDA, compare, difference, make, make_rows, only_what_is_declared, run
from fitune.data.batches import pack, pad
from fitune.data.prepare import Row
from fitune.engine.layout import flatten
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.methods.base import trainable
from fitune.model.libraries import import_peft
from fitune.plan.chatglm import Blank
from fitune.plan.saves import LEVELS, virtual_bytes
from fitune.training.path import PlainPath

peft = import_peft()
METHODS = {
    "prompt": {"name": "prompt", "num_virtual_tokens": 5, "init": "random"},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 4, "encoder_hidden_size": 24},
    "ptuning lstm": {"name": "ptuning", "num_virtual_tokens": 3, "encoder": "lstm", "encoder_hidden_size": 16},
    "prefix": {"name": "prefix", "num_virtual_tokens": 5, "init": "random"},
    "prefix projection": {"name": "prefix", "num_virtual_tokens": 4, "projection": True, "encoder_hidden_size": 24},
}
LENGTHS = [17, 5, 30, 2]


def one_by_one(model, device, rows):
    """The plain path's loss and gradients, each row alone: it does not pack virtual tokens."""
    path = PlainPath(model, device)
    for parameter in trainable(model).values():
        parameter.grad = None
    loss = sum(path.loss_and_grad(pad([row], 0), 0.37).item() for row in rows)
    return loss, {name: p.grad.detach().clone() for name, p in trainable(model).items()}


def check(model, engine, bound=1e-5, lengths=LENGTHS):
    rows = make_rows(lengths)
    compare(model, engine, pad(rows, 0), bound)
    plain_loss, plain = one_by_one(model, engine.device, rows)
    loss, fast = run(engine, model, pack(rows))
    assert loss == pytest.approx(plain_loss, rel=bound)
    for name in plain:
        assert difference(fast[name], plain[name]) <= bound, name
    assert engine.loss(pack(rows)).item() == pytest.approx(plain_loss, rel=bound)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path(kind, method, level):
    model, model_type = make(kind, **METHODS[method])
    check(model, EnginePath(model, model_type, level, 128, 128))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("method", ["ptuning lstm", "prefix projection"])
def test_other_encoders(method, kind):
    model, model_type = make(kind, **METHODS[method])
    check(model, EnginePath(model, model_type, "full", 128, 128))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize(
    ("quantization", "level"),
    [("int8", "elementwise"), ("nf4", "full"), ("fp4", "attention"), ("fp8", "none"), ("fp8", "full")],
)
def test_quantized_weights(quantization, level, kind, method):
    model, model_type = make(kind, quantization=quantization, **METHODS[method])
    check(model, EnginePath(model, model_type, level, 128, 128), 0.08 if quantization == "fp8" else 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_recomputation_changes_nothing(method, kind):
    """PEFT's own prefix cannot be recomputed; here every level gives what keeping everything gives."""
    batch, found = pack(make_rows(LENGTHS)), {}
    for level in LEVELS:
        model, model_type = make(kind, **METHODS[method])
        found[level] = run(EnginePath(model, model_type, level, 128, 128), model, batch)
    loss, gradients = found.pop("none")
    for other, others in found.values():
        assert other == loss
        for name in gradients:
            assert difference(others[name], gradients[name]) <= 1e-6, name


@pytest.mark.parametrize("kind", ["qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("level", LEVELS)
def test_only_what_is_declared_reaches_the_backward_pass(level, method, kind):
    model, model_type = make(kind, **METHODS[method])
    only_what_is_declared(model, EnginePath(model, model_type, level, 128, 128), pack(make_rows(LENGTHS)))


@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_bf16_is_as_close_to_fp32_as_the_plain_path(kind, method):
    rows = make_rows(LENGTHS)
    reference, _ = make(kind, **METHODS[method])
    _, exact = one_by_one(reference, torch.device("cpu"), rows)
    model, model_type = make(kind, dtype=torch.bfloat16, **METHODS[method])
    _, plain = one_by_one(model, torch.device("cpu"), rows)
    _, fast = run(EnginePath(model, model_type, "full", 128, 128), model, pack(rows))
    assert {gradient.dtype for gradient in fast.values()} == {torch.float32}
    errors = [sum(difference(found[name], exact[name]) for name in exact) for found in (fast, plain)]
    assert errors[0] <= 1.2 * errors[1]


def test_gradients_accumulate_over_micro_steps():
    model, model_type = make("llama", **METHODS["ptuning"])
    engine, rows = EnginePath(model, model_type, "elementwise", 64, 128), make_rows(LENGTHS)
    _, expected = one_by_one(model, engine.device, rows)
    for parameter in trainable(model).values():
        parameter.grad = None
    for row in rows:
        engine.loss_and_grad(pack([row]), 0.37)
    for name, parameter in trainable(model).items():
        assert difference(parameter.grad, expected[name]) <= 1e-5, name
    assert engine.vectors is None


def test_an_encoder_drops_only_in_training():
    model, model_type = make("llama", **METHODS["ptuning lstm"], dropout=0.5)
    engine, batch = EnginePath(model, model_type, "full", 128, 128), pack(make_rows(LENGTHS))
    evaluated = engine.loss(batch)
    torch.manual_seed(3)
    first, gradients = run(engine, model, batch)
    second, _ = run(engine, model, batch)
    torch.manual_seed(3)
    again, repeated = run(engine, model, batch)
    assert len({first, second, evaluated.item()}) == 3
    assert again == first
    assert all(torch.equal(repeated[name], gradients[name]) for name in gradients)
    assert torch.equal(engine.loss(batch), evaluated)


def test_a_longer_batch_makes_the_buffers_grow():
    model, model_type = make("qwen3", **METHODS["prefix"])
    engine = EnginePath(model, model_type, "full", 8, 128)
    check(model, engine)
    assert engine._buffers.capacity == sum(LENGTHS) + 5 * len(LENGTHS)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_bytes_are_the_declared_ones(method):
    for kind in ("qwen3", "chatglm"):
        model, model_type = make(kind, dtype=torch.bfloat16, **METHODS[method])
        virtual, shape = (engine := EnginePath(model, model_type, "full", 8, 8)).virtual, engine.shape
        expected = virtual_bytes(shape, len(engine.blocks), 2, prefix=method == "prefix")
        assert virtual.table.nbytes + virtual.gradient.nbytes == expected


def test_flatten_puts_virtual_rows_in_front_of_every_document():
    ids = [[5, 6, 20, 30, 7], [8, 30, 9], [5, 6]]
    rows = [Row(array("i", row), bytes([0] + [1] * (len(row) - 1)), "a") for row in ids]
    for batch in (pad(rows, 0), pack(rows)):
        got, tokens = flatten(batch, None, 2)
        assert tokens == 16
        assert got["ids"].tolist() == [0, 0, 5, 6, 20, 30, 7, 0, 0, 8, 30, 9, 0, 0, 5, 6]
        assert got["positions"].tolist() == [*range(7), *range(5), *range(4)]
        assert got["start"].tolist() == [0] * 7 + [7] * 5 + [12] * 4
        assert got["end"].tolist() == [7] * 7 + [12] * 5 + [16] * 4
        assert got["first"].tolist() == [0, 7, 12]
        assert got["index"].tolist() == [2, 3, 4, 5, 9, 10, 14]
        assert got["targets"].tolist() == [6, 20, 30, 7, 30, 9, 6]
        got, _ = flatten(batch, Blank(sop=30, gmask=20, mask=21), 2)
        assert got["positions"].tolist() == [0, 1, 2, 3, 4, 4, 4, 0, 1, 2, 2, 2, 0, 1, 2, 3]
        assert got["positions2"].tolist() == [0] * 5 + [1, 2] + [0] * 3 + [1, 2] + [0] * 4
        assert got["until"].tolist() == [5] * 7 + [10] * 5 + [16] * 4


def test_what_the_engine_does_not_do_is_named():
    model, model_type = make("llama", **METHODS["prefix"])
    model.base_model.lm_head.weight.requires_grad_(True)
    with pytest.raises(Unsupported, match=r"trains base_model\.lm_head\.weight beside virtual tokens"):
        EnginePath(model, model_type, "full", 8, 8)
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="trains nothing"):
        EnginePath(model, model_type, "full", 8, 8)
    model, model_type = make("llama", **METHODS["prompt"])
    model.peft_config["default"].peft_type = peft.PeftType.CPT
    with pytest.raises(Unsupported, match="virtual tokens of the kind CPT"):
        EnginePath(model, model_type, "full", 8, 8)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path_on_a_gpu(kind, method, level, monkeypatch):
    """Graphs of several sizes, replayed in turn with other numbers of documents; fp32 with exact products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as `fitune train` sets it
    model, model_type = make(kind, **METHODS[method])
    model.cuda()
    engine = EnginePath(model, model_type, level, 512, 128)
    for lengths in (LENGTHS, [100, 60, 120, 33, 90, 2, 7], LENGTHS, [110]):
        check(model, engine, lengths=lengths)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_on_a_gpu(quantization, method):
    model, model_type = make("qwen2", quantization=quantization, **METHODS[method])
    check(model.cuda(), EnginePath(model, model_type, "full", 512, 128))
