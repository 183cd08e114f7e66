"""Parameters from config.json alone: equal to transformers' own models in name, shape and sum."""

import json

import pytest

from fitune.errors import ConfigError
from fitune.model.families import FAMILIES
from fitune.plan.arch import read_arch
from fitune.plan.saves import GROUPS
from plan.shapes import BLOOM_1B4, CHATGLM1, CHATGLM3, LLAMA_1B, LLAMA_8B, LLAMA_13B, SIZES, TINY, meta_model, published


def expanded(arch):
    """name -> shape of every parameter."""
    return {p.name.format(copy): p.shape for p in arch.parameters for copy in range(p.copies)}


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_the_real_one(name):
    real = {key: tuple(p.shape) for key, p in meta_model(TINY[name]).named_parameters()}
    arch = read_arch(TINY[name])
    assert expanded(arch) == real
    assert arch.total == sum(p.numel() for p in meta_model(TINY[name]).parameters())


@pytest.mark.parametrize("name", TINY)
def test_a_saved_configuration_reads_the_same(name, tmp_path):
    """transformers writes all keys of its class; a user's file may have a few only."""
    meta_model(TINY[name]).config.save_pretrained(tmp_path)
    stored = read_arch(json.loads((tmp_path / "config.json").read_text()))
    assert expanded(stored) == expanded(read_arch(TINY[name]))


@pytest.mark.parametrize("name", TINY)
def test_targets_are_those_of_training(name):
    arch = read_arch(TINY[name])
    family = FAMILIES[TINY[name]["model_type"]]
    assert arch.targets == family.attention
    assert sorted(linear.name for linear in arch.linears) == sorted(family.linear)


@pytest.mark.parametrize("name", TINY)
def test_groups_have_the_sizes_of_a_block(name):
    arch = read_arch(TINY[name])
    groups = arch.block_shape().groups
    assert tuple(groups) == GROUPS
    for group, (outs, ins, _) in groups.items():
        members = [linear for linear in arch.linears if linear.group == group]
        assert sum(linear.outs for linear in members) == outs
        assert {linear.ins for linear in members} == {ins}


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (LLAMA_1B, 1_235_814_400),
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_13B, 13_015_864_320),
        (BLOOM_1B4, 1_303_111_680),
        (CHATGLM3, 6_243_584_000),
        (CHATGLM1, 6_173_286_400),  # 6,176,956,416 with the 3,670,016 of LoRA r=8, as PEFT printed it in 2023
    ],
)
def test_published_totals(config, total):
    assert read_arch(config).total == total


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("bloom-1b4-zh", 1_303_111_680),
        ("bloom-560m", 559_214_592),
        ("chatglm-6b", 6_173_286_400),
        ("chatglm2-6b", 6_243_584_000),
        ("chatglm3-6b", 6_243_584_000),
        ("chatglm3-6b-32k", 6_243_584_000),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-7b-chat", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen1.5-0.5b", 463_987_712),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b-instruct", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_published_files(shared, name, total):
    config = published(shared, name)
    arch = read_arch(config)
    assert arch.total == total
    if config["model_type"] != "chatglm":
        real = {key: tuple(p.shape) for key, p in meta_model(config).named_parameters()}
        assert expanded(arch) == real


def test_the_original_chatglm_is_the_converted_glm():
    glm = {
        "model_type": "glm",
        "hidden_size": 4096,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 13696,
        "vocab_size": 65024,
        "attention_bias": True,
    }
    arch = read_arch(CHATGLM3)
    assert arch.family == "glm"
    assert expanded(arch) == expanded(read_arch(glm))
    assert arch.rotary == 64


def test_one_key_group_per_head_without_multi_query_attention():
    config = CHATGLM3 | {"multi_query_attention": False}
    assert read_arch(config).kv_heads == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "perceptron"}, "'perceptron' cannot be planned; known: bloom, chatglm, glm, llama, mistral"),
        ({}, "None"),
        ({"model_type": "llama"}, "`hidden_size` is missing"),
        ({"model_type": "llama", **SIZES, "vocab_size": "many"}, "`vocab_size` is 'many'; a whole number from 1"),
        ({"model_type": "llama", **SIZES, "vocab_size": True}, "`vocab_size` is True"),
        ({"model_type": "llama", **SIZES, "num_hidden_layers": 10**9}, "from 1 to 2,000"),
        ({"model_type": "llama", **SIZES, "hidden_size": 10**5000}, "too large to show"),
        ({"model_type": "llama", **SIZES, "num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"model_type": "llama", **SIZES, "mlp_bias": 1}, "`mlp_bias` is 1; true or false"),
        (CHATGLM3 | {"add_bias_linear": True}, "`add_bias_linear` is True"),
        (CHATGLM3 | {"quantization_bit": 4}, "`quantization_bit` is 4; give the plain"),
        (CHATGLM3 | {"pre_seq_len": 128}, "`pre_seq_len` is 128"),
    ],
)
def test_what_cannot_be_counted_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        read_arch(config)
