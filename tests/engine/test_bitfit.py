"""BitFit on the engine: gradients of biases are sums over tokens, and products see the biases an update wrote."""

import pytest
import torch

from engine_models import BIASED, NEEDS_CUDA, compare, difference, make, make_rows, run
from fitune.config import build
from fitune.data.batches import pack, pad
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported, base_of
from fitune.methods.base import copy_into, trainable
from fitune.plan.saves import LEVELS
from fitune.training.optim import MasterOptimizer
from fitune.training.path import PlainPath


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", BIASED)
def test_equal_to_the_plain_path(kind, level):
    model, model_type = make(kind, name="bitfit")
    engine = EnginePath(model, model_type, level, 64, 128)
    rows = make_rows([17, 5, 30, 2])
    compare(model, engine, pack(rows), 1e-5)
    compare(model, engine, pad(rows, 0), 1e-5)


@pytest.mark.parametrize("kind", ["bloom", "chatglm"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp8"])
def test_over_quantized_weights(quantization, kind):
    model, model_type = make(kind, quantization=quantization, name="bitfit")
    engine = EnginePath(model, model_type, "full", 64, 128)
    compare(model, engine, pack(make_rows([17, 5, 30, 2])), 0.08 if quantization == "fp8" else 1e-5)


def test_upper_blocks_only():
    """Nothing is computed below the lowest trained bias, which may be that of a norm before attention."""
    for path in ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "post_attention_layernorm", "input_layernorm"):
        model, model_type = make("bloom", name="bitfit")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (".h.2." in name or f".h.1.{path}." in name))
        engine = EnginePath(model, model_type, "elementwise", 64, 128)
        assert engine.lowest == 1
        compare(model, engine, pack(make_rows([17, 5])), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_biases_are_fp32(dtype):
    """As close to fp32 arithmetic as the plain path, which rounds each gradient to the parameter's dtype."""
    reference, _ = make("bloom", name="bitfit")
    batch = pack(make_rows([17, 5, 30, 2]))
    _, exact = run(PlainPath(reference, torch.device("cpu")), reference, batch)
    model, model_type = make("bloom", dtype=dtype, name="bitfit")
    _, plain = run(PlainPath(model, torch.device("cpu")), model, batch)
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    _, fast = run(engine, model, batch)
    assert {gradient.dtype for gradient in fast.values()} == {torch.float32}
    errors = [sum(difference(found[name], exact[name]) for name in exact) for found in (fast, plain)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_dtype", ["fp32", "bf16"])
def test_steps_are_those_of_the_plain_path(dtype, optimizer_dtype):
    """Three updates: every product reads the biases the optimizer wrote, masters and states are saved alike."""
    results = []
    for fast in (False, True):
        model, model_type = make("bloom", dtype=dtype, name="bitfit")
        path = EnginePath(model, model_type, "full", 64, 128) if fast else PlainPath(model, torch.device("cpu"))
        config = build({"model": {"path": "x"}, "train": {"optimizer_dtype": optimizer_dtype, "learning_rate": 1e-2}})
        optimizer = MasterOptimizer(trainable(model), config.train, path.vectors if fast else None)
        losses = []
        for seed in range(3):
            optimizer.zero()
            for part in (0, 1):
                losses.append(path.loss_and_grad(pack(make_rows([17, 9], seed + 10 * part)), 0.01).item())
            torch._foreach_mul_(optimizer.gradients(), 0.5)
            optimizer.step(1e-2)
        values = {name: p.detach().float() for name, p in trainable(model).items()}
        results.append((losses, values, optimizer.state()))
    (losses, values, state), (fast_losses, fast_values, fast_state) = results
    exact = dtype == torch.float32 and optimizer_dtype == "fp32"
    assert fast_losses == pytest.approx(losses, rel=1e-5 if exact else 1e-2)
    assert fast_state.keys() == state.keys()
    for name in values:  # without an update they would be 0.3 apart; Adam makes much of a small gradient's sign
        assert difference(fast_values[name], values[name]) < (1e-4 if exact else 0.1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_goes_on_where_it_stopped(dtype):
    config = build({"model": {"path": "x"}, "train": {"learning_rate": 1e-2}})
    batches = [pack(make_rows([17, 9], seed)) for seed in range(4)]

    def start():
        model, model_type = make("bloom", dtype=dtype, name="bitfit")
        engine = EnginePath(model, model_type, "full", 64, 128)
        return model, engine, MasterOptimizer(trainable(model), config.train, engine.vectors)

    def train(engine, optimizer, batches):
        for batch in batches:
            optimizer.zero()
            engine.loss_and_grad(batch, 0.01)
            optimizer.gradients()
            optimizer.step(1e-2)

    model, engine, optimizer = start()
    train(engine, optimizer, batches[:2])
    stored = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    values = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(engine, optimizer, batches[2:])
    again, engine, optimizer = start()
    copy_into(trainable(again), values)
    optimizer.load_state(stored)
    train(engine, optimizer, batches[2:])
    expected = trainable(model)
    for name, parameter in trainable(again).items():
        assert torch.equal(parameter, expected[name]), name


def test_biases_of_a_group_are_one_vector():
    model, model_type = make("qwen2", name="bitfit")
    engine = EnginePath(model, model_type, "full", 8, 8)
    attention = base_of(model).model.layers[1].self_attn
    bias = engine.blocks[1].groups["qkv"]._product._bias_N
    attention.k_proj.bias.data.fill_(7.0)
    q, k = attention.q_proj.out_features, attention.k_proj.out_features
    assert (bias[q : q + k] == 7).all()
    assert bias.numel() == q + 2 * k
    assert bias.untyped_storage().data_ptr() == engine.trained.values.untyped_storage().data_ptr()


def test_frozen_biases_take_no_second_copy():
    model, model_type = make("qwen2")
    EnginePath(model, model_type, "full", 8, 8)
    attention = base_of(model).model.layers[0].self_attn
    biases = [getattr(attention, name).base_layer.bias for name in ("q_proj", "k_proj", "v_proj")]
    assert len({bias.untyped_storage().data_ptr() for bias in biases}) == 1


@pytest.mark.parametrize(
    ("kind", "chosen", "message"),
    [
        ("bloom", "ln_f.weight", "trains transformer.ln_f.weight; the engine trains adapters, biases and virtual"),
        ("qwen2", "k_proj.bias", "some projections of one input and not all"),
    ],
)
def test_what_else_is_trained_is_named(kind, chosen, message):
    model, model_type = make(kind, name="bitfit")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(chosen))
    with pytest.raises(Unsupported, match=message):
        EnginePath(model, model_type, "full", 8, 8)


def test_adapters_and_biases_at_once_are_named():
    model, model_type = make("bloom")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    with pytest.raises(Unsupported, match="adapters and biases at once"):
        EnginePath(model, model_type, "full", 8, 8)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", BIASED)
def test_equal_to_the_plain_path_on_a_gpu(kind, level):
    """Graphs of several sizes, whose padding must add nothing to a sum over tokens."""
    model, model_type = make(kind, name="bitfit")
    model.cuda()
    engine = EnginePath(model, model_type, level, 512, 128)
    small, large = make_rows([17, 5, 30, 2]), make_rows([100, 60, 120, 33, 90, 2, 7])
    for rows in (small, large, small):
        compare(model, engine, pack(rows), 1e-5)
