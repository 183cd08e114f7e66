"""Trainable parameters by formula: equal to the real methods, and to published numbers."""

import warnings

import pytest

from fitune.config import build
from fitune.config.load import METHODS as SECTIONS
from fitune.errors import ConfigError
from fitune.methods import METHODS
from fitune.model.load import Base, count_parameters
from fitune.plan.arch import read_arch
from fitune.plan.params import adapted, count, ia3, p_tuning, prefix_tuning, prompt_tuning, trainable
from plan.shapes import BLOOM_1B4, CHATGLM1, CHATGLM3, LLAMA_1B, LLAMA_13B, TINY, meta_model


def method(name="lora", **keys):
    return build({"model": {"path": "m"}, "method": {"name": name, **keys}}).method


def real(config, section):
    """(trainable, total) of the real model, and the sizes of its trainable tensors."""
    base = Base(meta_model(config).requires_grad_(False), None, config["model_type"], 128, "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = METHODS[section.name].apply(base, section)
    return count_parameters(model), sorted(p.numel() for p in model.parameters() if p.requires_grad)


def has_bias(name):
    return any(parameter.name.endswith("bias") for parameter in read_arch(TINY[name]).parameters)


CASES = [
    *((name, {"name": "lora", "target_modules": which}) for name in TINY for which in ("attention", "linear")),
    *((name, {"name": "full"}) for name in TINY),
    *((name, {"name": "bitfit"}) for name in TINY if has_bias(name)),
    ("llama", {"name": "lora", "r": 3, "target_modules": ["self_attn.k_proj", "down_proj"]}),
    ("llama", {"name": "lora", "r": 3, "target_modules": ["layers.1.self_attn.q_proj", "v_proj"]}),
    ("bloom", {"name": "lora", "target_modules": ["dense"]}),
    ("glm", {"name": "lora", "target_modules": ["gate_up_proj", "mlp.gate_up_proj"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "section"), CASES, ids=[f"{name}: {list(s.values())}" for name, s in CASES])
def test_formulas_are_the_real_methods(name, section):
    arch, section = read_arch(TINY[name]), method(**section)
    (trained, total), sizes = real(TINY[name], section)
    counted = count(arch, section)
    assert (counted.trainable, counted.total) == (trained, total)
    assert sorted(t.elements for t in trainable(arch, section) for _ in range(t.copies)) == sizes


def test_every_method_has_a_formula():
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
    ],
)
def test_published_numbers(config, section, trained, total):
    counted = count(read_arch(config), method(**section))
    assert (counted.trainable, counted.total) == (trained, total)


def test_percent():
    assert f"{count(read_arch(LLAMA_1B), method()).percent:.4f}" == "0.0689"
    assert f"{count(read_arch(BLOOM_1B4), method('bitfit')).percent:.4f}" == "0.0418"


def test_published_numbers_of_the_other_methods():
    bloom = read_arch(BLOOM_1B4)
    assert ia3(bloom, ["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]) == 344_064
    assert prompt_tuning(bloom, 10) == 20_480
    assert p_tuning(bloom, 10, 1024) == 5_267_456
    assert prefix_tuning(bloom, 10, projection=False) == 983_040
    with_projection = prefix_tuning(bloom, 10, projection=True)
    assert with_projection == 205_641_728
    assert bloom.total + with_projection == 1_508_753_408


def peft_count(config, settings):
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = peft.get_peft_model(meta_model(config), settings)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "llama wide heads", "qwen2", "glm", "bloom"])
def test_the_other_formulas_are_pefts(name):
    import peft

    config, arch = TINY[name], read_arch(TINY[name])
    ff = "dense_4h_to_h" if name == "bloom" else "down_proj"
    targets = ["query_key_value", ff] if name == "bloom" else ["k_proj", "v_proj", ff]
    settings = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[ff])
    assert peft_count(config, settings) == ia3(arch, targets, [ff])
    assert ia3(arch, targets, []) == sum(linear.outs * len(n) for linear, n in adapted(arch, targets))
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    assert peft_count(config, peft.PromptTuningConfig(**common)) == prompt_tuning(arch, 5)
    settings = peft.PromptEncoderConfig(**common, encoder_hidden_size=24)
    assert peft_count(config, settings) == p_tuning(arch, 5, 24)
    assert peft_count(config, peft.PrefixTuningConfig(**common)) == prefix_tuning(arch, 5, projection=False)
    settings = peft.PrefixTuningConfig(**common, prefix_projection=True)
    assert peft_count(config, settings) == prefix_tuning(arch, 5, projection=True)
    settings = peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=24)
    assert peft_count(config, settings) == prefix_tuning(arch, 5, projection=True, encoder_hidden=24)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            "q_prj is no linear layer of this model; allowed: attention, linear, down_proj",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is no linear"),
        ({"target_modules": ["layers.2.self_attn.q_proj"]}, "layers.2"),
        ({"name": "bitfit"}, r"this llama model has none; use method\.name=lora"),
    ],
)
def test_what_training_refuses_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        count(read_arch(TINY["llama"]), method(**section))
