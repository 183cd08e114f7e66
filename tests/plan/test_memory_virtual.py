"""Bytes of virtual tokens and IA3's factors: the plan against the engine's own tensors, and where they are planned."""

import pytest

from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.errors import ConfigError
from fitune.methods.base import trainable
from fitune.plan.arch import read_arch
from fitune.plan.lengths import Lengths, micro_step
from fitune.plan.memory import plan_memory
from fitune.plan.saves import check_tokens
from plan.shapes import LLAMA_1B, TINY
from plan.test_memory import applied, by_name, plan_of, real_model, settings

METHODS = {
    "prompt": {"name": "prompt", "num_virtual_tokens": 7, "init": "random"},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 7},
    "prefix": {"name": "prefix", "num_virtual_tokens": 7, "init": "random"},
    "projection": {"name": "prefix", "num_virtual_tokens": 7, "projection": True},
    "ia3": {"name": "ia3"},
}
NAMES = [name for name in TINY if not name.startswith("mistral")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("keep", ["none", "attention", "full"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_buffer_is_counted_to_the_byte(name, method, keep, dtype):
    longest, rows = 60, 5
    config = settings(
        METHODS[method],
        model={"path": "m", "dtype": dtype},
        data={"max_length": longest},
        train={"micro_batch_rows": rows, "device": "cpu", "activation_checkpointing": keep},
    )
    plan = plan_memory(read_arch(TINY[name]), config, "no data")
    found, kind = by_name(plan), TINY[name]["model_type"]
    assert plan.plain_reason is None
    model = applied(config.method, real_model(TINY[name], dtype), kind)
    engine = EnginePath(model, kind, keep, plan.job.step.tokens(plan.job.virtual_tokens), longest)
    assert engine.shape == plan.job.shape
    assert plan.job.capacity == engine._buffers.capacity == rows * (longest + engine.shape.virtual)
    assert found["saved activations"] == engine._buffers.kept_bytes()
    assert found["working set"] == engine._buffers.shared_bytes()
    assert found["ids, labels, positions"] == engine._integers.inputs.nbytes + engine._integers.documents.nbytes
    tables = (engine._rotary.cos_PR, engine._rotary.sin_PR) if engine._rotary else ()
    assert found.get("rotary tables", 0) == sum(table.nbytes for table in tables)
    trained = sum(p.nbytes for p in trainable(model).values())
    assert found["adapters"] == found["gradients"] == trained
    if engine.virtual:
        assert found["virtual tokens"] == engine.virtual.table.nbytes + engine.virtual.gradient.nbytes
        assert found["virtual tokens, encoded"] == engine.virtual.gradient.nbytes
        assert "gradients set aside" not in found
    else:
        assert engine.trained.gradients.nbytes == trained
        assert engine.shape.scaled == max(engine.shape.qkv, engine.shape.intermediate)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"target_modules": "linear"}, "on other layers than queries, keys, values"),
        ({"target_modules": ["o_proj"]}, "on other layers than queries, keys, values"),
        ({"target_modules": ["k_proj"], "feedforward_modules": ["k_proj"]}, "on the input of queries, keys or values"),
        ({"target_modules": ["down_proj"], "feedforward_modules": []}, "on the output of the MLP's last projection"),
        ({"target_modules": ["q_proj", "down_proj"]}, None),
        ({"target_modules": "attention"}, None),
    ],
)
def test_factors_are_planned_where_the_engine_has_them(method, reason):
    plan = plan_of(TINY["llama"], {"name": "ia3"} | method, data={"max_length": 64})
    model = applied(plan.job.method, real_model(TINY["llama"]), "llama")
    if reason is None:
        assert plan.plain_reason is None
        assert EnginePath(model, "llama", "full", 8, 8).shape.scaled == plan.job.shape.scaled
        return
    assert reason in plan.plain_reason
    with pytest.raises(Unsupported, match=reason):
        EnginePath(model, "llama", "full", 8, 8)


def test_upper_factors_keep_less():
    method = {"name": "ia3", "target_modules": ["layers.1.mlp.down_proj"]}
    plan = plan_of(TINY["llama"], method, data={"max_length": 64}, train={"device": "cpu"})
    model = applied(plan.job.method, real_model(TINY["llama"]), "llama")
    engine = EnginePath(model, "llama", "elementwise", plan.job.capacity, 64)
    assert (plan.job.kept_blocks, plan.job.shape.scaled) == (1, TINY["llama"]["intermediate_size"])
    assert by_name(plan)["saved activations"] == engine._buffers.kept_bytes()


def test_virtual_tokens_take_rows_of_every_document():
    method, data = {"name": "prefix", "num_virtual_tokens": 10}, {"max_length": 1024}
    padded = plan_of(LLAMA_1B, method, data=data, train={"micro_batch_rows": 4, "device": "cpu"})
    assert padded.job.capacity == 4 * 1034
    packed = {"max_length": 64, "packing": True}
    config = settings(method, data=packed, train={"global_batch_rows": 6, "micro_batch_tokens": 100})
    lengths = Lengths((60, 50, 9, 8, 7, 6, 5, 5, 5), (50, 25, 25, 25))
    assert micro_step(config, lengths).tokens(10) == 100 + 6 * 10
    assert micro_step(config, Lengths((60,), (50, 25, 25, 25))).tokens(10) == 100 + 3 * 10
    plain = plan_of(LLAMA_1B, method, data=data, train={"micro_batch_rows": 4, "device": "cpu", "path": "plain"})
    assert plain.job.capacity == 4 * 1024
    assert plain.job.shape.virtual == 0
    gpu = plan_of(LLAMA_1B, method, data=data)
    assert gpu.job.checked == 64 >= check_tokens(LLAMA_1B["vocab_size"]) + 10
    assert by_name(gpu)["virtual tokens"] == 16 * 2 * 10 * 512 * (2 + 4)


def test_only_the_plain_path_refuses_packed_or_recomputed_virtual_tokens():
    method = {"name": "prefix", "num_virtual_tokens": 4}
    for sections in (
        {"data": {"max_length": 64, "packing": True}},
        {"train": {"activation_checkpointing": "full"}, "data": {"max_length": 64}},
    ):
        sections.setdefault("train", {})
        assert plan_of(TINY["llama"], method, **sections).plain_reason is None
        with pytest.raises(ConfigError, match=r"data\.packing is true|activation_checkpointing is full"):
            plan_of(TINY["llama"], method, **(sections | {"train": sections["train"] | {"path": "plain"}}))
