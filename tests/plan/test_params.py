"""Trainable parameters by formula: equal to the real methods, and to published numbers."""

import warnings

import pytest

from fitune.config import build
from fitune.config.load import METHODS as SECTIONS
from fitune.errors import ConfigError
from fitune.methods import METHODS
from fitune.model.load import Base, count_parameters
from fitune.plan.arch import read_arch
from fitune.plan.params import FORMULAS, count, trainable
from plan.shapes import BLOOM_1B4, CHATGLM1, CHATGLM3, LLAMA_1B, LLAMA_13B, TINY, meta_model


def method(name="lora", **keys):
    return build({"model": {"path": "m"}, "method": {"name": name, **keys}}).method


def real(config, section, tokenizer):
    """(trainable, total) of the real model, and the sizes of its trainable tensors."""
    base = Base(meta_model(config).requires_grad_(False), tokenizer, config["model_type"], 128, "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = METHODS[section.name].apply(base, section)
    return count_parameters(model), sorted(p.numel() for p in model.parameters() if p.requires_grad)


def has_bias(name):
    return any(parameter.name.endswith("bias") for parameter in read_arch(TINY[name]).parameters)


FAMILIES = ["llama", "llama tied", "llama wide heads", "qwen2", "qwen3", "glm", "bloom", "bloom untied"]
# On meta weights nothing can be drawn from a vocabulary or decomposed.
EVERYWHERE = [
    {"name": "freeze", "num_layers": 1},
    {"name": "freeze", "num_layers": 0, "also": ["embedding", "norm"]},
    {"name": "freeze", "num_layers": 2, "patterns": ["*norm*"], "also": ["head"]},
    {"name": "prompt", "num_virtual_tokens": 5, "init": "random"},
    {"name": "ptuning", "num_virtual_tokens": 5},
    {"name": "ptuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24},
    {"name": "ptuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24, "encoder": "lstm"},
    {"name": "prefix", "num_virtual_tokens": 5, "init": "random"},
    {"name": "prefix", "num_virtual_tokens": 5, "projection": True},
    {"name": "prefix", "num_virtual_tokens": 5, "projection": True, "encoder_hidden_size": 24},
    {"name": "ia3"},
    {"name": "ia3", "target_modules": "linear"},
    {"name": "ia3", "target_modules": "attention"},
    {"name": "ia3", "feedforward_modules": []},
    {"name": "lora", "dora": True, "target_modules": "linear"},
    {"name": "lora", "modules_to_save": ["lm_head"]},
    {"name": "lora", "new_tokens": ["<a>", "<b>", "<c>"]},
]
CASES = [
    *((name, {"name": "lora", "target_modules": which}) for name in TINY for which in ("attention", "linear")),
    *((name, {"name": "full"}) for name in TINY),
    *((name, {"name": "bitfit"}) for name in TINY if has_bias(name)),
    *((name, section) for name in FAMILIES for section in EVERYWHERE),
    ("llama", {"name": "lora", "r": 3, "target_modules": ["self_attn.k_proj", "down_proj"]}),
    ("llama", {"name": "lora", "r": 3, "target_modules": ["layers.1.self_attn.q_proj", "v_proj"]}),
    ("bloom", {"name": "lora", "target_modules": ["dense"]}),
    ("glm", {"name": "lora", "target_modules": ["gate_up_proj", "mlp.gate_up_proj"]}),
    ("llama", {"name": "lora", "modules_to_save": ["embed_tokens", "lm_head", "norm", "layers.1.input_layernorm"]}),
    ("llama tied", {"name": "lora", "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    ("qwen3", {"name": "lora", "modules_to_save": ["q_norm", "self_attn.q_norm"]}),
    ("bloom", {"name": "lora", "modules_to_save": ["word_embeddings", "ln_f"]}),
    ("llama", {"name": "freeze", "num_layers": 1, "patterns": ["model.layers.*.mlp.*", "model.layers.0.*norm*"]}),
    ("qwen2", {"name": "freeze", "patterns": ["*.bias"]}),
    ("llama", {"name": "ia3", "target_modules": ["layers.1.mlp.down_proj", "v_proj"], "feedforward_modules": "v_proj"}),
    ("llama", {"name": "ia3", "target_modules": ["mlp.down_proj", "o_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "section"), CASES, ids=[f"{name}: {list(s.values())}" for name, s in CASES])
def test_formulas_are_the_real_methods(name, section, tiny):
    arch, section = read_arch(TINY[name]), method(**section)
    (trained, total), sizes = real(TINY[name], section, tiny)
    counted = count(arch, section)
    assert (counted.trainable, counted.total) == (trained, total)
    assert sorted(t.elements for t in trainable(arch, section) for _ in range(t.copies)) == sizes


def test_every_method_has_a_formula():
    assert set(FORMULAS) == set(SECTIONS) == set(METHODS)
    for name in SECTIONS:
        assert count(read_arch(TINY["qwen2"]), method(name)).trainable > 0


@pytest.mark.parametrize(
    ("config", "section", "trained", "total"),
    [
        (LLAMA_1B, {"r": 8, "target_modules": ["q_proj", "v_proj"]}, 851_968, 1_236_666_368),
        (LLAMA_13B, {"r": 8}, 6_553_600, 13_022_417_920),
        (BLOOM_1B4, {"r": 8}, 1_572_864, 1_304_684_544),
        (BLOOM_1B4, {"name": "bitfit"}, 544_768, 1_303_111_680),
        (CHATGLM3, {"name": "full"}, 6_243_584_000, 6_243_584_000),
        (CHATGLM3, {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}, 3_784_704, 6_247_368_704),
        (CHATGLM3, {"r": 8}, 2_809_856, 6_246_393_856),
        (CHATGLM3, {"r": 8, "target_modules": "linear"}, 16_658_432, 6_260_242_432),
        (CHATGLM3, {"name": "bitfit"}, 129_024, 6_243_584_000),
        (CHATGLM1, {"r": 8}, 3_670_016, 6_176_956_416),
        (BLOOM_1B4, {"name": "prompt", "num_virtual_tokens": 10}, 20_480, 1_303_132_160),
        (
            BLOOM_1B4,
            {"name": "ptuning", "num_virtual_tokens": 10, "encoder_hidden_size": 1024},
            5_267_456,
            1_308_379_136,
        ),
        (BLOOM_1B4, {"name": "prefix", "num_virtual_tokens": 10}, 983_040, 1_304_094_720),
        (BLOOM_1B4, {"name": "prefix", "num_virtual_tokens": 10, "projection": True}, 205_641_728, 1_508_753_408),
        (BLOOM_1B4, {"name": "ia3"}, 344_064, 1_303_455_744),
    ],
)
def test_published_numbers(config, section, trained, total):
    counted = count(read_arch(config), method(**section))
    assert (counted.trainable, counted.total) == (trained, total)


def test_percent():
    assert f"{count(read_arch(LLAMA_1B), method()).percent:.4f}" == "0.0689"
    assert f"{count(read_arch(BLOOM_1B4), method('bitfit')).percent:.4f}" == "0.0418"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            "q_prj is no linear layer of this model; allowed: attention, linear, down_proj",
        ),
        ({"name": "ia3", "target_modules": ["q_prj"]}, "q_prj is no linear layer of this model"),
        ({"name": "ia3", "feedforward_modules": ["q_proj"]}, r"q_proj is not among method\.target_modules \(k_proj"),
        (
            {"modules_to_save": ["q_proj"]},
            "q_proj is no module .* allowed: embed_tokens, input_layernorm, lm_head, norm",
        ),
        ({"modules_to_save": ["mlp"]}, "mlp is no module of this model that can be trained whole"),
        ({"r": 33, "init": "pissa"}, r"self_attn\.v_proj has only 32 singular values"),
        ({"name": "freeze", "num_layers": 3}, r"has 2 blocks; set method\.num_layers=2 or less"),
        ({"name": "freeze", "patterns": ["*.bias"]}, r"\*\.bias matches no parameter .* model\.embed_tokens\.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is no linear"),
        ({"target_modules": ["layers.2.self_attn.q_proj"]}, "layers.2"),
        ({"name": "bitfit"}, r"this llama model has none; use method\.name=lora"),
    ],
)
def test_what_training_refuses_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        count(read_arch(TINY["llama"]), method(**section))
