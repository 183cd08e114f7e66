"""The engine against the plain path on models of each family: same loss, same gradients, the declared memory."""

import copy
import math
from array import array

import pytest
import torch
import transformers

from engine_models import (
    CONFIGS,
    NEEDS_CUDA,
    SIZES,
    TARGETS,
    compare,
    difference,
    make,
    make_rows,
    only_what_is_declared,
    run,
    targets_of,
)
from fitune.config import build
from fitune.data.batches import pack, pad
from fitune.data.prepare import Row
from fitune.engine.block import Block
from fitune.engine.groups import settle
from fitune.engine.layout import flatten
from fitune.engine.offload import SentRows
from fitune.engine.path import EnginePath
from fitune.engine.spec import SPECS, Unsupported
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.chatglm_v1 import ALPHA
from fitune.model.load import Base
from fitune.model.prefix_lm import Blank
from fitune.model.quantize import quantize_blocks
from fitune.plan.budget import unused_bytes
from fitune.plan.saves import LEVELS, head_bytes, saved_bytes, shared_bytes
from fitune.training.path import PlainPath


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path(kind, targets, level):
    model, model_type = make(kind, targets_of(kind, targets))
    engine = EnginePath(model, model_type, level, 64, 128)
    rows = make_rows([17, 5, 30, 2])
    compare(model, engine, pack(rows), 1e-5)
    compare(model, engine, pad(rows, 0), 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_groups_that_have_other_columns_in_other_blocks(quantization, level):
    """16 columns in the first block, 32 in the second: buffers are made for the most."""
    targets = ["q_proj", "gate_proj", "down_proj", "layers.2.self_attn.o_proj"]
    targets += [f"layers.1.{layer}" for layer in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")]
    model, model_type = make("qwen2", targets, quantization=quantization, r=8)
    engine = EnginePath(model, model_type, level, 64, 128)
    assert [block.groups["qkv"].R for block in engine.blocks] == [16, 32, 16]
    assert [block.groups["up"].R for block in engine.blocks] == [16, 16, 16]
    compare(model, engine, pack(make_rows([17, 5, 30, 2])), 0.2 if quantization == "fp8" else 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "bloom", "chatglm"])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_quantized_weights_give_the_plain_path_s_gradients(quantization, kind, level):
    model, model_type = make(kind, quantization=quantization)
    engine = EnginePath(model, model_type, level, 64, 128)
    compare(model, engine, pack(make_rows([17, 5, 30, 2])), 1e-5)
    engine.loss(pack(make_rows([9, 8])))
    compare(model, engine, pack(make_rows([17, 5])), 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_layers_that_are_not_quantized_among_others_that_are(quantization, kind, level):
    attention = "self_attention" if kind == "bloom" else "self_attn"
    model, model_type = make(kind, quantization=quantization, whole=[f".0.{attention}", ".1.mlp"])
    engine = EnginePath(model, model_type, level, 64, 128)
    stored = [[group.quantization for group in block.groups.values()] for block in engine.blocks]
    assert stored[:2] == [["none", "none", quantization, quantization], [quantization, quantization, "none", "none"]]
    compare(model, engine, pack(make_rows([17, 5, 30, 2])), 1e-5)
    engine.loss(pack(make_rows([9, 8])))
    compare(model, engine, pack(make_rows([17, 5])), 1e-5)


@pytest.mark.parametrize("level", ["elementwise", "full"])
def test_the_widest_weights_are_expanded_twice(level, monkeypatch):
    """Recomputation is a third product of the first MLP projections, but their input gradient finds them expanded."""
    model, model_type = make("llama", quantization="int8")
    engine = EnginePath(model, model_type, level, 64, 128)
    counts = dict.fromkeys(("gate_proj", "down_proj"), 0)
    for name in counts:
        linear = getattr(engine.layers[1].mlp, name).base_layer
        expand = linear.dequantize_into

        def counted(out, name=name, expand=expand):
            counts[name] += 1
            expand(out)

        monkeypatch.setattr(linear, "dequantize_into", counted)
    run(engine, model, pack(make_rows([17, 5])))
    assert counts == {"gate_proj": 2, "down_proj": 2}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "bloom", "chatglm"])
def test_fp8_follows_the_plain_path(kind, level):
    """The engine quantizes gradients of q, k and v as one row, the plain path each alone: close, not equal."""
    model, model_type = make(kind, quantization="fp8")
    engine = EnginePath(model, model_type, level, 64, 128)
    batch = pack(make_rows([17, 5, 30, 2]))
    plain_loss, plain = run(PlainPath(model, engine.device), model, batch)
    loss, fast = run(engine, model, batch)
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    for name in plain:
        assert difference(fast[name], plain[name]) < 0.08, name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", {}), ("qwen2", {"dropout": 0.3}), ("glm", {}), ("bloom", {}), ("llama", {"r": 64})]
)
def test_fp8_adds_adapters_where_gate_and_up_are_read(kind, method, level):
    """The same as if the product itself had added them, but for sums in another order, which may turn a code."""
    model, model_type = make(kind, quantization="fp8", **method)
    engine = EnginePath(model, model_type, level, 64, 128)
    batch = pack(make_rows([17, 5, 30, 2]))
    ups = [block.groups["up"] for block in engine.blocks]
    expected_to = kind != "bloom" and "r" not in method  # no gate; more columns than a kernel takes
    assert {group._leaves_out for group in ups} == {expected_to}
    torch.manual_seed(3)
    loss, fast = run(engine, model, batch)
    for group in ups:
        group._leaves_out = False
    torch.manual_seed(3)
    expected_loss, expected = run(engine, model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name in expected:
        assert difference(fast[name], expected[name]) < 5e-3, name


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp8"])
def test_quantized_weights_on_a_gpu(quantization):
    """Against fp32 arithmetic over the same weights: two paths in bf16 differ by more."""
    model, model_type = make("qwen2", dtype=torch.bfloat16, quantization=quantization)
    batch = pack(make_rows([17, 5, 30, 2]))
    exact = copy.deepcopy(model).float()
    exact_loss, reference = run(PlainPath(exact, torch.device("cpu")), exact, batch)
    engine = EnginePath(model.cuda(), model_type, "full", 512, 128)
    loss, fast = run(engine, model, batch)
    assert loss == pytest.approx(exact_loss, rel=0.01)
    for name, gradient in reference.items():
        assert difference(fast[name].cpu(), gradient) <= (0.1 if quantization == "fp8" else 0.05), name


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path_on_a_gpu(kind, level):
    """Graphs of several sizes, replayed in turn; fp32 with exact products."""
    model, model_type = make(kind)
    model.cuda()
    engine = EnginePath(model, model_type, level, 512, 128)
    small, large = make_rows([17, 5, 30, 2]), make_rows([100, 60, 120, 33, 90, 2, 7])
    for rows in (small, large, small, large):
        compare(model, engine, pack(rows), 1e-5)
    compare(model, engine, pad(small, 0), 1e-5)
    assert engine.loss(pack(large)).item() == pytest.approx(
        PlainPath(model, engine.device).loss(pack(large)).item(), rel=1e-6
    )


def test_weights_that_became_views_serve_the_plain_path():
    model, model_type = make("qwen2")
    batch = pack(make_rows([9, 12]))
    before = run(PlainPath(model, torch.device("cpu")), model, batch)
    EnginePath(model, model_type, "full", 64, 128)
    after = run(PlainPath(model, torch.device("cpu")), model, batch)
    assert after[0] == pytest.approx(before[0], rel=1e-6)
    for name in before[1]:
        assert difference(after[1][name], before[1][name]) < 1e-6


@pytest.mark.parametrize("targets", ["linear", "attention"])
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_weights_that_moved_are_the_same(quantization, targets, monkeypatch):
    """On a GPU, those of a block into one segment."""
    model, model_type = make("qwen2", targets, quantization=quantization)
    batch = pack(make_rows([9, 12]))
    other = copy.deepcopy(model)
    expected_loss, expected = run(EnginePath(other, model_type, "full", 64, 128), other, batch)
    plain_loss, _ = run(PlainPath(other, torch.device("cpu")), other, batch)
    before = []

    def moved(*args):
        block = Block(*args)
        groups = list(block.groups.values())
        for group in groups:
            group._product.move(lambda tensor: before.append(tensor) or tensor)
        settle(groups)
        return block

    monkeypatch.setattr("fitune.engine.path.Block", moved)
    engine = EnginePath(model, model_type, "full", 64, 128)
    assert before
    for tensor in before:
        tensor.view(-1).view(torch.uint8).fill_(7)  # nothing reads it any more
    loss, found = run(engine, model, batch)
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert run(PlainPath(model, torch.device("cpu")), model, batch)[0] == plain_loss


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_no_holes_in_the_memory_of_a_gpu(quantization):
    """Sizes of which the allocator puts two into a segment of 20 MiB, or one into a segment of its own."""
    torch.cuda.empty_cache()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    sizes = SIZES | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes), dtype=torch.bfloat16)
    base = Base(model.requires_grad_(False).eval(), None, "llama", SIZES["vocab_size"], "")
    if quantization != "none":
        quantize_blocks(model, quantization, torch.device("cuda"))
    config = build({"model": {"path": "x"}, "method": {"name": "lora", "r": 4}})
    engine = EnginePath(METHODS["lora"].apply(base, config.method).cuda(), "llama", "full", 2048, 128)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - reserved
    used = torch.cuda.memory_allocated() - allocated
    assert taken - used <= unused_bytes(len(engine.blocks))


def test_upper_layers_only_stop_at_the_lowest_adapter():
    model, model_type = make("llama")
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.1." in name:
            parameter.requires_grad_(False)
    # Frozen adapters still act; only layer 2 gets gradients.
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    compare(model, engine, pack(make_rows([17, 5])), 1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("qwen3", {}),
        ("qwen3", {"dropout": 0.3}),
        ("qwen3", {"quantization": "fp8"}),
        ("bloom", {}),
        ("bloom", {"name": "bitfit"}),
        ("chatglm", {}),
        ("chatglm", {"name": "bitfit"}),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_only_what_is_declared_reaches_the_backward_pass(level, kind, method):
    model, model_type = make(kind, **method)
    only_what_is_declared(model, EnginePath(model, model_type, level, 64, 128), pack(make_rows([17, 5, 30])))


@pytest.mark.parametrize(("kind", "dropout"), [("qwen3", 0.0), ("qwen3", 0.3), ("bloom", 0.3), ("chatglm", 0.0)])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_declared_ones(level, dtype, kind, dropout):
    model, model_type = make(kind, dtype=dtype, dropout=dropout)
    assert (dropout > 0) == ("dropped" in EnginePath(model, model_type, level, 8, 8)._buffers._shared)
    engine = EnginePath(model, model_type, level, 48, 128)
    layers, size = SIZES["num_hidden_layers"], dtype.itemsize
    assert engine._buffers.kept_bytes() == saved_bytes(engine.shape, level, 48, layers, size)
    assert engine._buffers.shared_bytes() == shared_bytes(engine.shape, level, 48, size)
    head = engine._head
    tensors = [
        tensor for name, tensor in vars(head).items() if name.endswith(("_MV", "_MH", "_M")) and tensor is not None
    ]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == head_bytes(engine.shape, SIZES["vocab_size"], size)


def test_bf16_is_as_close_to_fp32_as_the_plain_path():
    reference, _ = make("llama", "linear")
    batch = pack(make_rows([17, 5, 30, 2]))
    _, exact = run(PlainPath(reference, torch.device("cpu")), reference, batch)
    model, model_type = make("llama", "linear", torch.bfloat16)
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    _, plain = run(PlainPath(model, torch.device("cpu")), model, batch)
    _, fast = run(engine, model, batch)
    error = {name: (difference(fast[name], exact[name]), difference(plain[name], exact[name])) for name in exact}
    total = [sum(pair[i] for pair in error.values()) for i in (0, 1)]
    # The plain path computes adapters in fp32, the engine in bf16 as autocast would.
    assert total[0] <= 2 * total[1], error


@pytest.fixture
def unwritten_is_nan():
    """torch.empty gives NaN, as it may at any time; 255 in the bytes that buffers are cut from is NaN as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_is_read_that_nothing_wrote(unwritten_is_nan, kind, level, dtype):
    model, model_type = make(kind, dtype=dtype)
    engine = EnginePath(model, model_type, level, 64, 128)
    for rows in ([17, 5, 30, 2], [9, 8]):
        loss, gradients = run(engine, model, pack(make_rows(rows)))
        assert math.isfinite(loss)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_gradients_accumulate_over_micro_steps_and_restart_after_the_step():
    model, model_type = make("llama")
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    plain = PlainPath(model, torch.device("cpu"))
    rows = make_rows([17, 5, 30, 2])
    for path, store in ((plain, {}), (engine, {})):
        for _ in range(2):
            for parameter in trainable(model).values():
                parameter.grad = None
            for row in rows:
                path.loss_and_grad(pack([row]), 1.0)
        store |= {name: p.grad.clone() for name, p in trainable(model).items()}
        if path is plain:
            expected = store
    for name in expected:
        assert difference(store[name], expected[name]) < 1e-5


def test_a_longer_batch_makes_the_buffers_grow():
    model, model_type = make("llama")
    engine = EnginePath(model, model_type, "elementwise", 8, 128)
    compare(model, engine, pack(make_rows([17, 5, 30])), 1e-5)
    assert engine._buffers.capacity == 52


def test_evaluation_is_the_same_loss():
    model, model_type = make("llama")
    engine = EnginePath(model, model_type, "full", 64, 128)
    batch = pad(make_rows([17, 5, 30]), 0)
    plain = PlainPath(model, torch.device("cpu")).loss(batch).item()
    assert engine.loss(batch).item() == pytest.approx(plain, rel=1e-6)
    assert all(p.grad is None for p in trainable(model).values())


def test_flatten_drops_padding_and_shifts_labels():
    rows = [Row(array("i", [5, 6, 7]), bytes([0, 0, 1]), "a"), Row(array("i", [8, 9]), bytes([0, 1]), "b")]
    for batch in (pad(rows, 0), pack(rows)):
        got, tokens = flatten(batch)
        assert tokens == 5
        assert got["ids"].tolist() == [5, 6, 7, 8, 9]
        assert got["positions"].tolist() == [0, 1, 2, 0, 1]
        assert got["start"].tolist() == [0, 0, 0, 3, 3]
        assert got["end"].tolist() == [3, 3, 3, 5, 5]
        assert (got["index"].tolist(), got["targets"].tolist()) == ([1, 3], [7, 9])


def test_flatten_finds_prefixes():
    """Two position rows, and how far all of a document is seen: up to sop, or everywhere without it."""
    ids = [[5, 6, 20, 30, 7], [8, 30, 9], [5, 6]]
    rows = [Row(array("i", row), bytes(len(row)), "a") for row in ids]
    for batch in (pad(rows, 0), pack(rows)):
        got, _ = flatten(batch, Blank(sop=30, gmask=20, mask=21))
        assert got["positions"].tolist() == [0, 1, 2, 2, 2, 0, 0, 0, 0, 1]
        assert got["positions2"].tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 0, 0]
        assert got["until"].tolist() == [3] * 5 + [6] * 3 + [10] * 2


def test_what_an_odd_vocabulary_has_beyond_multiples_of_8_is_multiplied_apart():
    model, model_type = make("llama")
    parts = EnginePath(model, model_type, "full", 8, 8)._head._parts
    assert [(part.start, part.stop) for part in parts] == [(0, 128), (128, 131)]


def test_the_stream_is_carried_as_in_the_model():
    assert SPECS["chatglm"].carried == ALPHA


def test_what_the_engine_does_not_do_is_named():
    model, model_type = make("llama")
    with pytest.raises(Unsupported, match="no block description for 'gpt2'"):
        EnginePath(model, "gpt2", "full", 8, 8)
    model.config.attention_dropout = 0.1
    with pytest.raises(Unsupported, match="attention_dropout"):
        EnginePath(model, model_type, "full", 8, 8)


def test_an_adapter_outside_the_blocks_is_not_forgotten():
    model, model_type = make("llama")
    model.elsewhere = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2, bias=False)})
    with pytest.raises(Unsupported, match="elsewhere.lora_A.weight, which is in no block"):
        EnginePath(model, model_type, "full", 8, 8)


@pytest.mark.parametrize(
    ("key", "size", "message"), [("head_dim", 512, "heads 512 wide"), ("hidden_size", 18432, "rows 18432 wide")]
)
def test_what_is_too_wide_for_the_kernels_takes_the_plain_path(key, size, message):
    model, model_type = make("llama")
    setattr(model.config, key, size)
    with pytest.raises(Unsupported, match=message):
        EnginePath(model, model_type, "full", 8, 8)


def test_rows_are_sent_ahead():
    torch.manual_seed(0)
    table, out = torch.randn(9, 6), torch.zeros(3, 4, 6)
    rows = SentRows(table, 5)
    for number, index in enumerate(torch.tensor([[8, 0, 3, 3], [1, 1, 2, 7], [5, 4, 6, 0]])):
        rows.send(index, out[number])
        assert torch.equal(out[number], table[index])
