"""IA3 on the engine against PEFT's forward: factors of keys, values and the MLP's activation, on every family."""

import pytest
import torch

from engine_models import CONFIGS, NEEDS_CUDA, compare, difference, make, make_rows, only_what_is_declared, run
from fitune.data.batches import pack, pad
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.methods.base import trainable
from fitune.plan.saves import LEVELS
from fitune.training.path import PlainPath

IA3 = {"name": "ia3"}


def check(model, engine, bound=1e-5):
    rows = make_rows([17, 5, 30, 2])
    compare(model, engine, pack(rows), bound)
    compare(model, engine, pad(rows, 0), bound)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path(kind, level):
    model, model_type = make(kind, **IA3)
    check(model, EnginePath(model, model_type, level, 64, 128))


@pytest.mark.parametrize("level", ["none", "attention"])
@pytest.mark.parametrize("targets", [["v_proj"], ["q_proj", "v_proj"], ["k_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_some_of_them(kind, targets, level):
    model, model_type = make(kind, target_modules=targets, **IA3)
    check(model, EnginePath(model, model_type, level, 64, 128))


@pytest.mark.parametrize("kind", ["qwen2", "bloom"])
@pytest.mark.parametrize(
    ("quantization", "level"),
    [("int8", "elementwise"), ("nf4", "full"), ("fp4", "attention"), ("fp8", "none"), ("fp8", "full")],
)
def test_quantized_weights(quantization, level, kind):
    model, model_type = make(kind, quantization=quantization, **IA3)
    check(model, EnginePath(model, model_type, level, 64, 128), 0.08 if quantization == "fp8" else 1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize("level", LEVELS)
def test_only_what_is_declared_reaches_the_backward_pass(level, kind):
    model, model_type = make(kind, **IA3)
    only_what_is_declared(model, EnginePath(model, model_type, level, 64, 128), pack(make_rows([17, 5, 30])))


@pytest.mark.parametrize("level", ["none", "full"])
def test_factors_of_zero(level):
    """Nothing is divided by them."""
    model, model_type = make("llama", **IA3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.view(-1)[::3] = 0.0
    check(model, EnginePath(model, model_type, level, 64, 128))


def test_upper_blocks_only():
    model, model_type = make("llama", **IA3)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.1.self_attn" in name:
            parameter.requires_grad_(False)
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    assert engine.lowest == 1
    check(model, engine)


def test_bf16_is_as_close_to_fp32_as_the_plain_path():
    batch = pack(make_rows([17, 5, 30, 2]))
    reference, _ = make("llama", **IA3)
    _, exact = run(PlainPath(reference, torch.device("cpu")), reference, batch)
    model, model_type = make("llama", dtype=torch.bfloat16, **IA3)
    _, plain = run(PlainPath(model, torch.device("cpu")), model, batch)
    _, fast = run(EnginePath(model, model_type, "full", 64, 128), model, batch)
    assert {gradient.dtype for gradient in fast.values()} == {torch.float32}
    errors = [sum(difference(found[name], exact[name]) for name in exact) for found in (fast, plain)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("level", LEVELS)
def test_lora_has_no_buffer_for_them(level):
    model, model_type = make("llama")
    engine = EnginePath(model, model_type, level, 8, 8)
    assert "scaled" not in engine._buffers._shared
    assert "first" not in engine._integers._names


def test_factors_elsewhere_are_named():
    model, model_type = make("llama", target_modules="linear", **IA3)
    with pytest.raises(Unsupported, match="on other layers than queries, keys, values and the MLP's last"):
        EnginePath(model, model_type, "full", 8, 8)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path_on_a_gpu(kind, level):
    """Graphs of several sizes, whose padding must add nothing to a sum over tokens."""
    model, model_type = make(kind, **IA3)
    model.cuda()
    engine = EnginePath(model, model_type, level, 512, 128)
    small, large = make_rows([17, 5, 30, 2]), make_rows([100, 60, 120, 33, 90, 2, 7])
    for rows in (small, large, small):
        compare(model, engine, pack(rows), 1e-5)
