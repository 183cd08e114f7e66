"""Bytes by part: each term against real tensors or the declaration, phases, what is assumed and said."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from fitune.config import build
from fitune.data.batches import pack
from fitune.data.prepare import Row
from fitune.engine.groups import adapter_columns
from fitune.engine.path import EnginePath
from fitune.engine.products import Expanded, Fused
from fitune.engine.spec import SPECS, Unsupported, block_spec
from fitune.errors import ConfigError, PlanError
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import DTYPES, Base, load_base
from fitune.model.quantize import QuantLinear, block_linears, quantize_blocks, use_int8
from fitune.plan.arch import read_arch
from fitune.plan.budget import check_budget, needed_bytes
from fitune.plan.hardware import H200, HOPPER, OLDER, find_gpu
from fitune.plan.job import block_columns
from fitune.plan.lengths import Lengths
from fitune.plan.memory import lora_columns, plan_memory, planned_level
from fitune.plan.part import PHASES
from fitune.plan.parts import parts, plain_bytes_per_token
from fitune.plan.saves import LEVELS
from fitune.plan.weights import quantized_bytes, shared_segments
from fitune.training.optim import MasterOptimizer
from fitune.training.path import PlainPath
from plan.shapes import BLOOM_1B4, CHATGLM3, LLAMA_1B, LLAMA_8B, TINY, meta_model


def settings(method=None, **sections):
    return build({"model": {"path": "m"}, "method": method or {"name": "lora", "r": 8}, **sections})


def by_name(plan):
    return {part.name: part.bytes for part in plan.parts}


def plan_of(config, method=None, **sections):
    sections.setdefault("data", {"max_length": 1024})
    sections.setdefault("train", {"micro_batch_rows": 2})
    return plan_memory(read_arch(config), settings(method, **sections), "no data")


def storage_bytes(tensors):
    """Bytes behind tensors that may be views of the same memory."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


ENGINE = [name for name in TINY if not name.startswith("mistral")]
BIASED = [name for name in ENGINE if name.startswith(("bloom", "chatglm", "qwen2", "glm")) and "no bias" not in name]


def real_model(config, dtype="fp32"):
    """The model with memory, frozen; tensors on the meta device are untied on their way."""
    real = meta_model(config).to(DTYPES[dtype]).to_empty(device="cpu").requires_grad_(False)
    real.tie_weights()
    return real


def applied(method, real, kind):
    """The model with what the method trains."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return METHODS[method.name].apply(Base(real, None, kind, 128, ""), method)


@pytest.mark.parametrize("name", ENGINE)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("keep", "targets"),
    [
        ("none", "linear"),
        ("elementwise", "attention"),
        ("attention", "linear"),
        ("full", "last of the upper block"),
        ("offload", "linear"),
        ("elementwise", "biases"),
    ],
)
def test_every_buffer_of_the_engine_is_counted_to_the_byte(name, dtype, keep, targets):
    tokens, longest = 300, 60
    if targets == "biases":
        if name not in BIASED:
            return
        method = {"name": "bitfit"}
    else:
        arch = read_arch(TINY[name])
        named = [f"{arch.block.format(1).removeprefix('model.')}.{arch.linears[-1].path}"]
        method = {"name": "lora", "r": 5, "target_modules": targets if targets in ("linear", "attention") else named}
    config = settings(
        method,
        model={"path": "m", "dtype": dtype},
        data={"max_length": longest},
        train={"micro_batch_rows": 5, "device": "cpu", "activation_checkpointing": keep},
    )
    found = by_name(plan_memory(read_arch(TINY[name]), config, "no data"))
    kind = TINY[name]["model_type"]
    real = real_model(TINY[name], dtype)
    blocks = real.get_submodule(SPECS[kind].layers)
    inner = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    outer = {id(p): p for p in real.parameters()}
    model = applied(config.method, real, kind)
    engine = EnginePath(model, kind, keep, tokens, longest)
    weights = [linear.weight for linear in inner]
    for weight in weights:
        outer.pop(id(weight))
    assert found["block weights"] == storage_bytes(weights)
    assert found["embedding, norms, head"] == storage_bytes(outer.values())
    groups = [group for block in engine.blocks for group in block.groups.values()]
    biases = [group._product._bias_N for group in groups if group._product._bias_N is not None]
    own = {p.untyped_storage().data_ptr() for p in outer.values()}
    assert {bias.untyped_storage().data_ptr() for bias in biases} <= own, "a second copy of biases"
    assert found["gradients"] == engine.trained.gradients.nbytes
    if config.method.name == "lora":
        assert found["adapters"] == engine.trained.values.nbytes == sum(p.nbytes for p in trainable(model).values())
    assert found["saved activations"] == engine._buffers.kept_bytes()
    assert found["working set"] == engine._buffers.shared_bytes()
    made = [t for name, t in vars(engine._head).items() if name.endswith(("_MV", "_MH", "_M")) and t is not None]
    assert found["head chunk"] == sum(t.nbytes for t in made)
    tables = (engine._rotary.cos_PR, engine._rotary.sin_PR) if engine._rotary else ()
    assert found.get("rotary tables", 0) == sum(table.nbytes for table in tables)
    assert found["ids, labels, positions"] == engine._integers.inputs.nbytes + engine._integers.documents.nbytes
    counted = {"block weights", "embedding, norms, head", "gradients", "adapters"}
    counted |= {"saved activations", "working set", "head chunk", "rotary tables", "ids, labels, positions"}
    rest = {"optimizer states", "master weights", "group being put together"}
    rest |= {"self-check: engine", "self-check: copies", "self-check: largest moment"}
    assert counted | rest >= set(found), "a part that nothing above holds"


SPLIT_SIZES = [{}, {"hidden_size": 256, "intermediate_size": 352}, {"num_key_value_heads": 4}]
FUSED_SIZES = [{}, {"hidden_size": 256, "inner_hidden_size": 352}]


@pytest.mark.parametrize("method", ["attention", "linear", "biases"])
@pytest.mark.parametrize(
    ("kind", "wide"),
    [(kind, wide) for kind in ("llama", "qwen3", "glm") for wide in SPLIT_SIZES]
    + [(kind, wide) for kind in ("bloom", "chatglm") for wide in FUSED_SIZES],
)
def test_what_the_plain_path_keeps_per_token(kind, method, wide):
    """The self-check's activations: saved tensors of autograd, two layers against one, so that the head cancels."""
    if method == "biases" and kind not in BIASED:
        return
    method = {"name": "bitfit"} if method == "biases" else {"name": "lora", "target_modules": method}
    config = TINY[kind] | wide
    config |= {} if kind in ("bloom", "chatglm") else {"head_dim": wide.get("hidden_size", 64) // 4}
    job = plan_of(config, method, data={"max_length": 64}).job
    length = 40
    batch = pack([Row(tuple(range(1, length + 1)), bytes([0] + [1] * (length - 1)), "f:1")])
    sizes = []
    for layers in (1, 2):
        count = {"bloom": "n_layer", "chatglm": "num_layers"}.get(kind, "num_hidden_layers")
        model = real_model(config | {count: layers}, "bf16")
        if hasattr(model, "model"):
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is no parameter
        model = applied(job.method, model, kind)
        ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            PlainPath(model.train(), torch.device("cpu"))._loss_sum(batch)
        sizes.append(storage_bytes(t for t in kept if t.untyped_storage().data_ptr() not in ours))
    assert plain_bytes_per_token(job) == pytest.approx((sizes[1] - sizes[0]) / length, rel=0.02)


@pytest.mark.parametrize(
    ("method", "dtype", "optimizer_dtype"),
    [
        ({"name": "lora", "r": 4}, "bf16", "fp32"),
        ({"name": "lora", "r": 4}, "fp32", "bf16"),
        ({"name": "full"}, "bf16", "fp32"),
        ({"name": "full"}, "fp32", "fp32"),
        ({"name": "bitfit"}, "bf16", "bf16"),
        ({"name": "lora", "r": 4, "init": "pissa"}, "bf16", "fp32"),
        ({"name": "lora", "r": 4, "dora": True}, "bf16", "bf16"),
        ({"name": "lora", "r": 4, "modules_to_save": ["lm_head", "norm"]}, "bf16", "fp32"),
        ({"name": "lora", "r": 4, "modules_to_save": ["lm_head", "norm"]}, "fp32", "bf16"),
        ({"name": "freeze", "num_layers": 1}, "bf16", "fp32"),
        ({"name": "prompt"}, "bf16", "fp32"),
        ({"name": "prompt"}, "fp32", "bf16"),
        ({"name": "ptuning"}, "bf16", "fp32"),
        ({"name": "prefix", "projection": True}, "bf16", "fp32"),
        ({"name": "ia3"}, "bf16", "fp32"),
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
    plan = plan_memory(arch, config, "no data")
    found, trained = by_name(plan), trainable(model)
    added = method["name"] not in ("full", "freeze", "bitfit")
    copies = {name for name in trained if "modules_to_save" in name}
    adapters = sum(p.nbytes for name, p in trained.items() if added and name not in copies)
    starts = sum(buffer.nbytes for name, buffer in model.named_buffers() if "initial_" in name)
    masters = [m for name, m in optimizer.masters.items() if m is not trained[name]]
    states = {k: t for k, t in optimizer.state().items() if k.endswith(("exp_avg", "exp_avg_sq"))}
    assert found.get("adapters", 0) == adapters
    assert found.get("adapters as they began", 0) == starts
    assert found.get("modules trained whole", 0) == sum(trained[name].nbytes for name in copies)
    assert found.get("master weights", 0) == sum(m.numel() * m.element_size() for m in masters)
    assert found["optimizer states"] == sum(t.numel() * t.element_size() for t in states.values())
    # The engine adds to fp32 gradients, whatever the parameters and the masters are, but for those left to autograd.
    engine = plan.job.own_gradients
    assert found["gradients"] == sum(g.numel() * (4 if engine else g.element_size()) for g in gradients)
    assert found.get("gradients of masters", 0) == (sum(g.nbytes for g in gradients if g.itemsize < 4) if engine else 0)


def test_8_bit_states():
    found = by_name(plan_of(LLAMA_1B, train={"micro_batch_rows": 2, "optimizer": "adamw8bit"}))
    per_block = 2 * 851_968 + 8 * 851_968 // 256  # every tensor is a multiple of 256 and has 4,096 elements or more
    assert found["optimizer states"] == per_block
    small = plan_of(TINY["llama"], {"name": "lora", "r": 4}, data={"max_length": 64}, train={"optimizer": "adamw8bit"})
    assert by_name(small)["optimizer states"] == 8 * small.job.num_trained


def test_offloaded_inputs_are_in_the_host():
    method = {"name": "lora", "r": 16, "target_modules": "linear"}
    train = {"micro_batch_rows": 4, "activation_checkpointing": "offload"}
    plan = plan_of(LLAMA_8B, method, train=train)
    # Four copies of the integers of 4,096 tokens, and of the self-check's, padded to a head chunk of 256; each rounded
    # up to a power of two.
    staging = 4 * 2**18 + 4 * 2**14
    embedding = 128256 * 4096 * 2
    rows = (32 + 2) * 4096 * 2  # of each token: block inputs, and embeddings in two slots
    assert plan.host_bytes == (4096 + 64) * rows + staging + 2**30
    assert 2**29 < embedding <= 2**30
    full = plan_of(LLAMA_8B, method, train=train | {"activation_checkpointing": "full"})
    assert full.host_bytes == staging
    assert full.phases["backward"] - plan.phases["backward"] == (32 - 2) * 4096 * 4096 * 2 + embedding
    # Both hold the embedding while they load; where it stays, a block's weights are there twice later.
    assert full.phases["loading"] == plan.phases["loading"] + by_name(full)["moved while loading"]
    assert by_name(full)["moved while loading"] == by_name(full)["block weights"] / 32
    quantized = {"path": "m", "quantization": "nf4"}
    nf4 = plan_of(LLAMA_8B, method, train=train | {"activation_checkpointing": "full"}, model=quantized)
    assert "moved while loading" not in by_name(nf4)
    tied = plan_of(LLAMA_1B, method, train=train)
    assert "embedding, norms, head" in by_name(tied)
    assert plan_of(LLAMA_8B, method, train=train | {"device": "cpu"}).host_bytes == 0


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


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4", "fp4"])
def test_quantized_layers_are_counted_to_the_byte(kind):
    layer = QuantLinear(torch.randn(24, 72), None, kind)
    assert quantized_bytes(kind, 24, 72) == sum(buffer.nbytes for buffer in layer.buffers())


@pytest.mark.parametrize("double", [True, False])
def test_stored_layers_are_counted_to_the_byte(double):
    layer = QuantLinear(torch.randn(24, 72), None, "nf4")
    buffers = {
        "codes": layer.codes,
        "absmax": layer.absmax,
        "nested_absmax": layer.nested_absmax,
        "offset": layer.offset,
    }
    if not double:
        buffers = {"codes": layer.codes, "absmax": torch.rand(27)}
    layer = QuantLinear.stored(buffers, torch.Size([24, 72]), None, "nf4", torch.float32)
    assert quantized_bytes("nf4", 24, 72, double) == sum(buffer.nbytes for buffer in layer.buffers())


def test_a_plan_follows_what_bitsandbytes_stored():
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings = {"model": {"path": "m", "quantization": "nf4"}}
    ours = by_name(plan_of(LLAMA_8B, **settings))
    double, single = (
        by_name(plan_of(LLAMA_8B | {"quantization_config": section | {"bnb_4bit_use_double_quant": value}}, **settings))
        for value in (True, False)
    )
    assert "weights being quantized" in ours
    assert "weights being quantized" not in double
    assert double["block weights"] == ours["block weights"]
    weights = sum(
        parameter.elements * parameter.copies
        for parameter in read_arch(LLAMA_8B).parameters
        if "proj" in parameter.name
    )
    assert single["block weights"] - double["block weights"] == pytest.approx(weights * 3 / 64, rel=0.01)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "glm", "bloom", "chatglm"])
def test_the_engine_over_quantized_weights(name, kind):
    config = settings(
        {"name": "lora", "r": 5, "target_modules": "linear"},
        model={"path": "m", "dtype": "bf16", "quantization": kind},
        data={"max_length": 60},
        train={"device": "cpu", "activation_checkpointing": "attention"},
    )
    found = by_name(plan_memory(read_arch(TINY[name]), config, "no data"))
    real = real_model(TINY[name], "bf16")
    for parameter in real.parameters():
        parameter.data.normal_()
    quantize_blocks(real, kind, torch.device("cpu"))
    model = applied(config.method, real, TINY[name]["model_type"])
    engine = EnginePath(model, TINY[name]["model_type"], "attention", 64, 60)
    layers = [module for module in real.modules() if isinstance(module, QuantLinear)]
    groups = [group for block in engine.blocks for group in block.groups.values()]
    stored = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    products = [group._product for group in groups]
    beside = sum(product.A_RK.nbytes + product.B_NR.nbytes for product in products)
    beside += sum(product._ones_K.nbytes for product in products if kind == "fp8")
    # On CPU the layers share the table of absmax codes; on a GPU each has its own.
    assert found["block weights"] == stored + beside
    assert found["dequantization scratch"] == engine._scratch.bytes
    engine.reserve(240)
    assert found["saved activations"] == engine._buffers.kept_bytes()
    assert found["working set"] == engine._buffers.shared_bytes()


@pytest.mark.parametrize("method", [{"name": "lora", "r": 5, "target_modules": "linear"}, {"name": "bitfit"}])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("qwen2", ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp"]),
        ("bloom", ["transformer.h.1"]),
        ("glm", ["gate_up_proj"]),
        ("qwen2", ["model.layers"]),
    ],
)
def test_layers_that_bitsandbytes_left_whole(name, skipped, kind, method):
    section = {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": skipped}
    config = settings(
        method,
        model={"path": "m", "dtype": "bf16", "quantization": kind},
        data={"max_length": 60},
        train={"device": "cpu"},
    )
    arch = read_arch(TINY[name] | {"quantization_config": section})
    found = by_name(plan_memory(arch, config, "no data"))
    real = real_model(TINY[name], "bf16")
    for parameter in real.parameters():
        parameter.data.normal_()
    kept = {
        layer: real.get_submodule(layer)
        for layer in block_linears(real)
        if any(f"{layer}.".startswith(f"{key}.") or layer.endswith(key) for key in skipped)
    }
    assert set(kept) == {f"{arch.block.format(number)}.{path}" for number, path in arch.whole} != set()
    quantize_blocks(real, kind, torch.device("cpu"))
    for layer, linear in kept.items():
        real.set_submodule(layer, linear)
    model = applied(config.method, real, TINY[name]["model_type"])
    engine = EnginePath(model, TINY[name]["model_type"], "elementwise", 64, 60)
    blocks = [[group._product for group in block.groups.values()] for block in engine.blocks]
    layers = [module for module in real.modules() if isinstance(module, QuantLinear)]
    stored = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    beside = [product for products in blocks for product in products if isinstance(product, Expanded)]
    stored += sum(product.A_RK.nbytes + product.B_NR.nbytes for product in beside)
    assert found["block weights"] == stored + storage_bytes([linear.weight for linear in kept.values()])
    assert found.get("dequantization scratch", 0) == engine._scratch.bytes
    fused = [product for products in blocks for product in products if isinstance(product, Fused)]
    made = [product._matrix.nbytes for product in fused if len(product._linears) > 1 or len(product.A_RK)]
    assert found.get("group being put together", 0) == max(made, default=0)
    on_gpu = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    moved = by_name(plan_memory(arch, on_gpu, "no data")).get("moved while loading", 0)
    assert moved == max(moving(products) for products in blocks)


def moving(products):
    """Bytes of what `engine.groups.settle` moves of a block."""
    held = []
    for product in products:
        product.move(lambda tensor: held.append(tensor) or tensor)
    return sum(tensor.nbytes for tensor in held)


def test_columns_of_a_whole_group_need_no_scratch():
    section = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["model.layers.1.self_attn"],
    }
    config = settings(
        {"name": "lora", "r": 5, "target_modules": ["layers.1.self_attn.k_proj"]},
        model={"path": "m", "dtype": "bf16", "quantization": "int8"},
        data={"max_length": 60},
        train={"device": "cpu"},
    )
    plan = plan_memory(read_arch(TINY["glm"] | {"quantization_config": section}), config, "no data")
    largest = max(outs * ins for outs, ins, _ in plan.job.shape.groups.values())
    assert plan.job.shape.lora[0] == 16
    assert by_name(plan)["dequantization scratch"] == 2 * largest


def test_the_plain_path_expands_no_whole_layer():
    skipped = ["q_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "down_proj"]
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skipped}
    plan = plan_of(LLAMA_8B | {"quantization_config": section}, model={"path": "m", "quantization": "int8"})
    assert by_name(plan)["dequantization scratch"] == 1024 * 4096 * 2


def test_segments_that_4_bit_weights_share():
    nf4 = {"path": "m", "quantization": "nf4"}
    llama_2 = LLAMA_8B | {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32_000}
    # Two matrices of 8 MiB in each segment of 20; of Llama 3.1 the four of a block fill one.
    assert shared_segments(plan_of(llama_2, model=nf4).job) == 32 * 2 * 4 * 2**20
    assert shared_segments(plan_of(LLAMA_8B, model=nf4).job) == 0
    plan = plan_of(llama_2, model=nf4)
    assert needed_bytes(plan) - plan.device_bytes == 38 * 2**21 + 20 * 2**20 + 2**28
    int8 = plan_of(llama_2, model=nf4 | {"quantization": "int8"})
    assert needed_bytes(int8) - int8.device_bytes == 38 * 2**21 + 20 * 2**20
    on_cpu = plan_of(llama_2, model=nf4, train={"device": "cpu"})
    assert needed_bytes(on_cpu) == on_cpu.peak_bytes


def test_a_group_stored_in_two_ways_takes_the_plain_path():
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["layers.3.mlp.up_proj"]}
    model = {"path": "m", "quantization": "int8"}
    plan = plan_of(LLAMA_8B | {"quantization_config": section}, model=model)
    assert plan.plain_reason == "projections of one input stored as int8 and none"
    assert plan_of(LLAMA_8B | {"quantization_config": section}).plain_reason is None, "nothing is quantized"
    one = 14336 * 4096 * 2 - quantized_bytes("int8", 14336, 4096)
    every = plan_of(LLAMA_8B, model=model, train={"micro_batch_rows": 2, "path": "plain"})
    assert by_name(plan)["block weights"] == by_name(every)["block weights"] + one
    assert by_name(plan)["dequantization scratch"] == by_name(every)["dequantization scratch"]


@pytest.mark.parametrize("skipped", [None, "lm_head", [], ["lm_head", "", 3, "(a+)+$", "1.mlp.up", "q_pro"]])
def test_names_that_mean_no_layer_of_a_block(skipped):
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skipped}
    assert not read_arch(LLAMA_8B | {"quantization_config": section}).whole


@pytest.mark.parametrize(("kind", "size"), [("int8", 2), ("nf4", 2), ("fp8", 1)])
def test_the_plain_path_expands_one_layer_at_a_time(kind, size):
    plan = plan_of(LLAMA_8B, model={"path": "m", "quantization": kind}, train={"path": "plain"})
    assert by_name(plan)["dequantization scratch"] == 14336 * 4096 * size
    assert "moved while loading" not in by_name(plan)
    assert not plan.job.shape.fp8


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 0.49, 0.51), ("fp8", 0.49, 0.51), ("nf4", 0.25, 0.27)])
def test_quantized_blocks_shrink_and_need_scratch(kind, least, most):
    job = plan_of(LLAMA_8B, {"name": "lora", "r": 16, "target_modules": "linear"}).job
    plain, quantized = ({part.name: part.bytes for part in parts(replace(job, quantization=q))} for q in ("none", kind))
    assert least < quantized["block weights"] / plain["block weights"] < most
    assert "dequantization scratch" not in plain
    scratch = 2 * 14336 * 4096 if kind == "fp8" else (2 * 14336 + 32) * (4096 + 32) * 2
    assert quantized["dequantization scratch"] == scratch
    block = quantized["block weights"] / 32
    assert quantized.get("moved while loading", 0) == (0 if kind == "nf4" else block)
    assert "group being put together" not in quantized.keys() | plain.keys(), "the block that moves is more"
    on_cpu = by_name(
        plan_of(
            LLAMA_8B,
            {"name": "lora", "r": 16, "target_modules": "linear"},
            train={"device": "cpu"},
            model={"path": "m", "quantization": kind},
        )
    )
    assert on_cpu.get("group being put together", 0) == (2 * 14336 * 4096 if kind == "fp8" else 0)
    assert "moved while loading" not in on_cpu
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


@pytest.mark.parametrize("ranks", [[8, 8], [5], [16, 16, 16], [17]])
def test_columns_are_the_engines(ranks):
    names = ["q_proj", "v_proj", "k_proj"][: len(ranks)]
    method = {"name": "lora", "r": ranks[0], "target_modules": names}
    assert lora_columns(read_arch(LLAMA_1B), settings(method))[0] == adapter_columns(ranks)


def test_blocks_below_the_first_adapter_keep_nothing():
    method = {"name": "lora", "r": 8, "target_modules": ["layers.10.self_attn.q_proj", "layers.12.mlp.up_proj"]}
    job = plan_of(LLAMA_1B, method).job
    columns = block_columns(job.arch, job.method)
    assert [i for i, found in enumerate(columns) if any(found)] == [10, 12]
    assert (columns[10], columns[12]) == ((16, 0, 0, 0), (0, 0, 16, 0))
    assert job.shape.lora == (16, 0, 16, 0)
    assert job.kept_blocks == 6


@pytest.mark.parametrize(
    ("given", "engine", "plain"),
    [
        (False, "elementwise", "elementwise"),
        (True, "full", "full"),
        ("none", "none", "elementwise"),
        ("attention", "attention", "full"),
    ],
)
def test_levels(given, engine, plain):
    config = settings(train={"activation_checkpointing": given})
    assert planned_level(config, engine=True) == engine
    assert planned_level(config, engine=False) == plain


def test_phases_are_sums_of_their_parts_and_the_peak_is_the_largest():
    plan = plan_of(LLAMA_1B)
    assert tuple(plan.phases) == PHASES
    for phase, size in plan.phases.items():
        assert size == sum(part.bytes for part in plan.parts if phase in part.phases)
    assert plan.peak_bytes == max(plan.phases.values()) == plan.phases[plan.peak_phase]
    assert plan.device_bytes == plan.peak_bytes + HOPPER.context_bytes + plan.host_bytes // 512
    assert plan.largest.bytes == max(part.bytes for part in plan.parts if plan.peak_phase in part.phases)
    assert all(isinstance(part.bytes, int) and part.bytes > 0 for part in plan.parts)
    assert len({part.name for part in plan.parts}) == len(plan.parts)


def test_llama_1b_stays_near_the_design():
    """docs/engine.md predicts 2.48 GB of weights and about 0.2 GB besides the saved activations."""
    plan = plan_of(LLAMA_1B)
    found = by_name(plan)
    assert found["embedding, norms, head"] + found["block weights"] == pytest.approx(2.48e9, rel=0.005)
    rest = plan.phases["backward"] - found["saved activations"] - found["cuBLAS workspaces"] - 2.48e9
    assert 0.1e9 < rest < 0.25e9


@pytest.mark.parametrize(
    ("config", "method", "train", "reason"),
    [
        (BLOOM_1B4 | {"hidden_dropout": 0.1}, {"name": "lora"}, {}, "hidden_dropout"),
        (BLOOM_1B4, {"name": "full"}, {}, "method.name=full; the engine trains adapters, biases and virtual tokens"),
        (LLAMA_1B, {"name": "full"}, {}, "method.name=full"),
        (LLAMA_1B, {"name": "ia3", "target_modules": "linear"}, {}, "IA3's factors on other layers"),
        (LLAMA_1B, {"name": "lora", "dora": True}, {}, "DoRA"),
        (LLAMA_1B, {"name": "lora", "modules_to_save": ["norm"]}, {}, "method.modules_to_save"),
        (LLAMA_1B, {"name": "lora"}, {"path": "plain"}, "train.path=plain"),
    ],
)
def test_the_plain_path_is_said_to_need_more(config, method, train, reason):
    plan = plan_of(config, method, train={"micro_batch_rows": 2, **train})
    assert reason in plan.plain_reason
    vocab = read_arch(config).vocab
    assert by_name(plan)["logits"] == 2 * 1024 * vocab * 2  # padding included
    assert not {"self-check: engine", "working set", "rotary tables"} & set(by_name(plan))
    assert plan.job.shape.lora == (0, 0, 0, 0)


def test_llm_int8_is_planned_on_the_plain_path_in_the_engine_s_words():
    plan = plan_of(LLAMA_1B, model={"path": "m", "quantization": "int8", "int8_compute": "llm_int8"})
    real = meta_model(TINY["llama"]).to_empty(device="cpu").requires_grad_(False)
    quantize_blocks(real, "int8", torch.device("cpu"))
    use_int8(real, "llm_int8", 6.0)
    with pytest.raises(Unsupported) as refused:
        block_spec(real, "llama")
    assert plan.plain_reason == str(refused.value) == "model.int8_compute=llm_int8"


@pytest.mark.parametrize(("targets", "width"), [("attention", 2048), ("linear", 8192)])
def test_dropout_adds_the_widest_dropped_input(targets, width):
    plans = [plan_of(LLAMA_1B, {"name": "lora", "target_modules": targets, "dropout": p}) for p in (0.1, 0.0)]
    assert plans[0].plain_reason is None
    added = by_name(plans[0])["working set"] - by_name(plans[1])["working set"]
    assert added == plans[0].job.capacity * width * 2
    changed = {name for name, size in by_name(plans[0]).items() if size != by_name(plans[1])[name]}
    assert changed == {"working set", "self-check: engine"}


def test_the_fast_path_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"train.path=fast, but the engine cannot run this: attention_dropout"):
        plan_of(BLOOM_1B4 | {"attention_dropout": 0.1}, train={"path": "fast"})


@pytest.mark.parametrize("name", TINY)
def test_the_engine_is_planned_where_it_runs(name):
    """The refusals of engine/spec.py, from config.json alone."""
    model = meta_model(TINY[name])
    try:
        block_spec(model.requires_grad_(False), TINY[name]["model_type"])
        refused = None
    except Unsupported as error:
        refused = str(error)
    assert (read_arch(TINY[name]).plain is None) == (refused is None)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding-window attention"),
        ({"model_type": "qwen2", "sliding_window": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, "sliding-window attention"),
        ({"model_type": "bloom"}, None),
        ({"model_type": "bloom", "attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "bloom", "hidden_dropout": 0.1}, "hidden_dropout"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm",
        ),
    ],
)
def test_what_keeps_a_model_off_the_engine(keys, reason):
    config = TINY["bloom" if keys.get("model_type") == "bloom" else "llama"] | keys
    assert read_arch(config).plain == reason
    model = meta_model(config).requires_grad_(False)
    if reason is None:
        assert block_spec(model, config["model_type"]) is SPECS[config["model_type"]]
    else:
        with pytest.raises(Unsupported, match=reason):
            block_spec(model, config["model_type"])


def test_on_cpu_there_is_no_context_and_fp32_is_the_default():
    plan = plan_of(LLAMA_1B, train={"device": "cpu"})
    assert plan.device_bytes == plan.peak_bytes
    assert plan.job.dtype_bytes == 4
    assert not {"cuBLAS workspaces", "gradients set aside", "table of adapter copies"} & set(by_name(plan))


@pytest.mark.parametrize(("device", "capacity"), [("cpu", 130), ("auto", 192)])
def test_buffers_are_rounded_up_on_a_gpu(device, capacity):
    plan = plan_memory(read_arch(LLAMA_1B), settings(train={"device": device}), Lengths((100, 30)))
    assert plan.job.capacity == capacity


@pytest.mark.parametrize(
    ("rows", "lengths", "batch", "packing", "alike"),
    [
        (2, Lengths((64,) * 4), 4, False, True),
        (2, Lengths((64,) * 5), 5, False, False),  # one row is left over
        (2, Lengths((64,) * 6), 4, False, False),  # a step of two rows is left over
        (2, Lengths((64, 63, 64, 64)), 4, False, False),
        (2, Lengths((64,) * 4, (64,)), 4, False, False),
        (2, Lengths((64,) * 4), 4, True, False),
        (2, "no data", 4, False, False),
    ],
)
def test_states_are_there_when_a_second_size_is_captured(rows, lengths, batch, packing, alike):
    train = {"global_batch_rows": batch} | ({} if packing else {"micro_batch_rows": rows})
    config = settings(data={"max_length": 64, "packing": packing}, train=train)
    plan = plan_memory(read_arch(LLAMA_1B), config, lengths)
    assert plan.job.step.alike == alike
    states, kept = by_name(plan)["optimizer states"], by_name(plan)["gradients set aside"]
    assert plan.phases["capture"] - plan.phases["forward"] == kept - (states if alike else 0)


def test_rows_longer_than_the_positions_are_refused():
    with pytest.raises(ConfigError, match=r"has 512 positions; set data\.max_length=512 or less"):
        plan_of(LLAMA_1B | {"max_position_embeddings": 512})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", H200),
        ("NVIDIA H100 80GB HBM3", HOPPER),
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
    assert math.isclose(row.workspace_bytes / 2**20, 8.125 if row is OLDER else 32)


@pytest.mark.parametrize(
    ("method", "blocks", "tokens"),
    [
        ({"name": "freeze", "num_layers": 3}, 3, 0),
        ({"name": "freeze", "num_layers": 0, "also": ["norm"]}, 0, 0),
        ({"name": "freeze", "patterns": ["*.layers.10.*"]}, 6, 0),
        ({"name": "prompt", "num_virtual_tokens": 20}, 16, 20),
        ({"name": "ptuning", "num_virtual_tokens": 7}, 16, 7),
        ({"name": "prefix", "num_virtual_tokens": 20}, 16, 0),
        ({"name": "ia3", "target_modules": ["layers.12.mlp.down_proj", "layers.14.self_attn.k_proj"]}, 4, 0),
        ({"name": "lora", "target_modules": ["layers.12.mlp.down_proj"], "modules_to_save": ["norm"]}, 4, 0),
        ({"name": "lora", "target_modules": ["layers.12.mlp.down_proj"], "modules_to_save": ["embed_tokens"]}, 16, 0),
    ],
)
def test_what_the_plain_path_keeps_at_least(method, blocks, tokens):
    """Blocks below the lowest trained one keep nothing; virtual tokens make every row longer."""
    job = plan_of(LLAMA_1B, method, train={"micro_batch_rows": 2, "path": "plain"}).job
    assert (job.kept_blocks, job.capacity) == (blocks, 2 * (1024 + tokens))


def test_advice_leaves_out_what_the_method_refuses():
    train = {"micro_batch_rows": 1, "path": "plain"}
    for method in ({"name": "prefix"}, {"name": "lora", "init": "pissa", "dora": False, "modules_to_save": ["norm"]}):
        config = settings(method, memory={"budget": 3}, train=train, data={"max_length": 1024})
        plan = plan_memory(read_arch(LLAMA_1B), config, "no data")
        with pytest.raises(PlanError) as caught:
            check_budget(plan, config, "no data")
        said = str(caught.value)
        assert ("activation_checkpointing" in said) == (method["name"] != "prefix")
        assert ("quantization" in said) == (method["name"] == "prefix")
