"""Virtual tokens on the engine against PEFT's forward: prompt tuning, P-tuning, prefix tuning, on every family."""

import pytest

from engine_models import CONFIGS, compare, difference, make, make_rows, run
from fitune.data.batches import pack, pad
from fitune.engine.path import EnginePath
from fitune.methods.base import trainable
from fitune.plan.saves import LEVELS
from fitune.training.path import PlainPath

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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path(kind, method, level):
    model, model_type = make(kind, **METHODS[method])
    check(model, EnginePath(model, model_type, level, 128, 128))


@pytest.mark.parametrize("level", ["none", "elementwise", "full"])
@pytest.mark.parametrize("method", ["prompt", "ptuning", "prefix"])
@pytest.mark.parametrize("kind", ["qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4", "fp8"])
def test_quantized_weights(quantization, kind, method, level):
    model, model_type = make(kind, quantization=quantization, **METHODS[method])
    check(model, EnginePath(model, model_type, level, 128, 128), 0.08 if quantization == "fp8" else 1e-5)
