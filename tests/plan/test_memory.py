"""Bytes by part: each term against real tensors or the declaration, phases, what is assumed and said."""

import math
from dataclasses import replace

import pytest
import torch

from fitune.config import build
from fitune.errors import ConfigError
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import load_base
from fitune.plan.arch import read_arch
from fitune.plan.hardware import HOPPER, OLDER, find_gpu
from fitune.plan.lengths import Lengths
from fitune.plan.memory import PHASES, head_rows, level, lora_columns, parts, plan_memory, quantized_bytes
from fitune.plan.saves import LEVELS, block_saves
from fitune.training.optim import MasterOptimizer
from plan.shapes import BLOOM_1B4, CHATGLM3, LLAMA_1B, LLAMA_8B, TINY, meta_model


def settings(method=None, **sections):
    return build({"model": {"path": "m"}, "method": method or {"name": "lora", "r": 8}, **sections})


def by_name(plan):
    return {part.name: part.bytes for part in plan.parts}


def plan_of(config, method=None, **sections):
    sections.setdefault("data", {"max_length": 1024})
    sections.setdefault("train", {"micro_batch_rows": 2})
    return plan_memory(read_arch(config), settings(method, **sections), "no data")


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("bloom")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_without_adapters_are_the_models(name, dtype):
    """R is 0 where nothing is adapted: what is left is every parameter of the real model."""
    plan = plan_of(TINY[name], model={"path": "m", "dtype": dtype}, data={"max_length": 64})
    found = {part.name: part.bytes for part in parts(replace(plan.job, lora=(0, 0, 0, 0)))}
    real = meta_model(TINY[name]).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    size = sum(p.numel() * p.element_size() for p in real.parameters())
    assert found["embedding, norms, head"] + found["block weights"] == size


@pytest.mark.parametrize(
    ("method", "dtype", "optimizer_dtype"),
    [
        ({"name": "lora", "r": 4}, "bf16", "fp32"),
        ({"name": "lora", "r": 4}, "fp32", "bf16"),
        ({"name": "full"}, "bf16", "fp32"),
        ({"name": "full"}, "fp32", "fp32"),
        ({"name": "bitfit"}, "bf16", "bf16"),
    ],
)
def test_what_training_holds_per_trained_parameter(tiny_qwen, method, dtype, optimizer_dtype):
    """Adapters, masters, gradients and states against the tensors of the real optimizer after a step."""
    config = settings(
        method,
        model={"path": str(tiny_qwen), "dtype": dtype},
        train={"optimizer_dtype": optimizer_dtype, "learning_rate": 1e-3},
        data={"max_length": 64},
    )
    base = load_base(tiny_qwen, dtype, torch.device("cpu"))
    arch = read_arch(base.model.config.to_dict())
    model = METHODS[config.method.name].apply(base, config.method)
    optimizer = MasterOptimizer(trainable(model), config.train)
    for parameter in trainable(model).values():
        (parameter.sum() * 0.1).backward()
    gradients = optimizer.gradients()
    optimizer.step(1e-3)
    found = by_name(plan_memory(arch, config, "no data"))
    trained = trainable(model)
    adapters = sum(p.numel() * p.element_size() for p in trained.values()) if method["name"] == "lora" else 0
    masters = [m for name, m in optimizer.masters.items() if m is not trained[name]]
    states = {k: t for k, t in optimizer.state().items() if k.endswith(("exp_avg", "exp_avg_sq"))}
    assert found.get("adapters", 0) == adapters
    assert found.get("master weights", 0) == sum(m.numel() * m.element_size() for m in masters)
    assert found["optimizer states"] == sum(t.numel() * t.element_size() for t in states.values())
    if method["name"] != "lora" or optimizer_dtype == "fp32":  # the engine adds to fp32 gradients whatever the masters
        assert found["gradients"] == sum(g.numel() * g.element_size() for g in gradients)


def test_8_bit_states():
    found = by_name(plan_of(LLAMA_1B, train={"micro_batch_rows": 2, "optimizer": "adamw8bit"}))
    per_block = 2 * 851_968 + 8 * 851_968 // 256  # every tensor is a multiple of 256 and has 4,096 elements or more
    assert found["optimizer states"] == per_block
    small = plan_of(TINY["llama"], {"name": "lora", "r": 4}, data={"max_length": 64}, train={"optimizer": "adamw8bit"})
    assert by_name(small)["optimizer states"] == 8 * small.job.num_trained


@pytest.mark.parametrize("name", LEVELS)
def test_saved_activations_are_the_declaration(name):
    job = replace(plan_of(LLAMA_8B).job, level=name)
    saved = {part.name: part.bytes for part in parts(job)}["saved activations"]
    buffers = [
        torch.empty(job.tokens, kept.width, dtype=torch.float32 if kept.fp32 else torch.bfloat16, device="meta")
        for _ in range(32)
        for kept in block_saves(job.shape, name)
    ]
    assert saved == sum(buffer.nbytes for buffer in buffers)


def test_more_recomputation_takes_less():
    job = plan_of(LLAMA_8B, train={"micro_batch_rows": 4}).job
    peaks = [
        sum(part.bytes for part in parts(replace(job, level=name)) if "backward" in part.phases) for name in LEVELS
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(LEVELS)


def test_quantized_storage():
    assert quantized_bytes("int8", 10, 64) == quantized_bytes("fp8", 10, 64) == 640 + 40
    elements = 4096 * 14336
    assert 8 * quantized_bytes("nf4", 4096, 14336) / elements == pytest.approx(4.127, abs=1e-3)  # QLoRA, section 3
    assert quantized_bytes("fp4", 1, 64) == 32 + 1 + 4 + 4 * 16 + 4 * 256 + 4
    assert quantized_bytes("nf4", 3, 3) == 5 + 1 + 4 + 1092  # odd sizes round up


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.49, 0.51), ("fp8", 0.49, 0.51), ("nf4", 0.25, 0.27)])
def test_quantized_blocks_shrink_and_need_scratch(kind, least, most):
    job = plan_of(LLAMA_8B, {"name": "lora", "r": 16, "target_modules": "linear"}).job
    plain, quantized = ({part.name: part.bytes for part in parts(replace(job, quantization=q))} for q in ("none", kind))
    assert least < quantized["block weights"] / plain["block weights"] < most
    assert "dequantization scratch" not in plain
    assert quantized["dequantization scratch"] == (2 * 14336 + 32) * (4096 + 32) * 2
    assert quantized["embedding, norms, head"] == plain["embedding, norms, head"]


@pytest.mark.parametrize(
    ("config", "method", "columns"),
    [
        (LLAMA_1B, {"name": "lora", "r": 8}, (16, 0, 0, 0)),
        (LLAMA_1B, {"name": "lora", "r": 16, "target_modules": "linear"}, (48, 16, 32, 16)),
        (LLAMA_1B, {"name": "lora", "r": 5, "target_modules": "linear"}, (16, 16, 16, 16)),
        (LLAMA_1B, {"name": "lora", "r": 8, "target_modules": ["up_proj", "down_proj"]}, (0, 0, 16, 16)),
        (CHATGLM3, {"name": "lora", "r": 24, "target_modules": "linear"}, (80, 32, 32, 32)),
        (LLAMA_1B, {"name": "full"}, (0, 0, 0, 0)),
    ],
)
def test_adapter_columns(config, method, columns):
    assert lora_columns(read_arch(config), settings(method)) == columns


def test_adapter_columns_stand_in_the_weights():
    job = plan_of(LLAMA_1B, {"name": "lora", "r": 8}).job
    found = {part.name: part.bytes for part in parts(job)}
    groups = [(3072 + 16, 2048 + 16), (2048, 2048), (16384, 2048), (2048, 8192)]
    assert found["block weights"] == 16 * 2 * sum(outs * ins for outs, ins in groups)


@pytest.mark.parametrize(
    ("given", "expected"), [(False, "elementwise"), (True, "full"), *((name, name) for name in LEVELS)]
)
def test_levels_by_switch_and_by_name(given, expected):
    config = settings()
    config = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": given})})
    assert level(config) == expected


@pytest.mark.parametrize(
    ("vocab", "rows"), [(128_256, 256), (151_936, 192), (32_000, 1024), (8_000, 4096), (100, 4096), (500_000, 128)]
)
def test_head_chunks(vocab, rows):
    assert head_rows(vocab) == rows


def test_phases_are_sums_of_their_parts_and_the_peak_is_the_largest():
    plan = plan_of(LLAMA_1B)
    assert tuple(plan.phases) == PHASES
    for phase, size in plan.phases.items():
        assert size == sum(part.bytes for part in plan.parts if phase in part.phases)
    assert plan.peak_bytes == max(plan.phases.values()) == plan.phases[plan.peak_phase]
    assert plan.device_bytes == plan.peak_bytes + HOPPER.context_bytes
    assert plan.largest.bytes == max(part.bytes for part in plan.parts if plan.peak_phase in part.phases)
    assert all(isinstance(part.bytes, int) and part.bytes > 0 for part in plan.parts)
    assert len({part.name for part in plan.parts}) == len(plan.parts)


def test_llama_1b_stays_near_the_design():
    """docs/engine.md predicts 2.48 GB of weights and about 0.2 GB besides the saved activations."""
    plan = plan_of(LLAMA_1B)
    found = by_name(plan)
    assert found["embedding, norms, head"] + found["block weights"] == pytest.approx(2.48e9, rel=0.005)
    rest = plan.phases["backward"] - found["saved activations"] - 2.48e9
    assert 0.1e9 < rest < 0.25e9


@pytest.mark.parametrize(
    ("config", "method", "reason"),
    [
        (BLOOM_1B4, {"name": "lora"}, "no block for bloom"),
        (LLAMA_1B, {"name": "full"}, "not method.name=full"),
        (LLAMA_1B, {"name": "lora", "dropout": 0.1}, "no adapter dropout"),
    ],
)
def test_the_plain_path_is_said_to_need_more(config, method, reason):
    plan = plan_of(config, method)
    assert reason in plan.plain_reason
    vocab = read_arch(config).vocab
    assert by_name(plan)["head"] == 2 * 1024 * vocab * 2  # all logits, padding included
    assert "self-check" not in by_name(plan)
    assert plan.job.lora == (0, 0, 0, 0)


def test_the_engine_is_planned_for_its_families():
    for name, config in TINY.items():
        reason = plan_of(config, data={"max_length": 64}).plain_reason
        assert (reason is None) == (not name.startswith("bloom"))
    assert plan_of(CHATGLM3).plain_reason is None


def test_on_cpu_there_is_no_context_and_fp32_is_the_default():
    plan = plan_of(LLAMA_1B, train={"device": "cpu"})
    assert plan.device_bytes == plan.peak_bytes
    assert plan.job.dtype_bytes == 4
    assert "cuBLAS workspaces" not in by_name(plan)


def test_rows_longer_than_the_positions_are_refused():
    with pytest.raises(ConfigError, match=r"has 512 positions; set data\.max_length=512 or less"):
        plan_of(LLAMA_1B | {"max_position_embeddings": 512})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", HOPPER),
        ("NVIDIA A100-SXM4-80GB", OLDER),
        ("NVIDIA GeForce RTX 3090", OLDER),
        ("Tesla T4", OLDER),
        (None, HOPPER),
        ("Some GPU of tomorrow", HOPPER),
    ],
)
def test_constants_by_device_name(name, row):
    assert find_gpu(name) is row
    plan = plan_memory(read_arch(LLAMA_1B), settings(), Lengths((10, 20)), row)
    assert by_name(plan)["cuBLAS workspaces"] == 2 * row.workspace_bytes
    assert math.isclose(row.workspace_bytes / 2**20, 32 if row is HOPPER else 8.125)
