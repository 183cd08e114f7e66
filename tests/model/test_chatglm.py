"""Original ChatGLM2/3 folders: equal to the formulas, never through Auto* classes, refused where they are not plain."""

import builtins
import json
import sys

import pytest
import torch
import transformers

from fitune.errors import ConfigError
from fitune.model.chatglm import glm_weights
from fitune.model.folder import inspect_folder
from fitune.model.load import load_base, read_tensors
from fitune.plan.arch import read_arch
from fitune.plan.chatglm import glm_config
from original_chatglm import CONFIG, make_weights, reference_logits, write_folder

CPU = torch.device("cpu")
IDS = torch.randint(0, 352, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_ratio": 50, "seq_length": 512},
        {"multi_query_attention": False, "layernorm_epsilon": 1e-2},
        {"multi_query_group_num": 1, "hidden_size": 48, "num_layers": 3},
    ],
    ids=lambda changes: " ".join(changes) or "as published",
)
def test_logits_are_those_of_the_formulas(tmp_path, form, changes):
    config = CONFIG | changes
    base = load_base(write_folder(tmp_path / "m", form=form, **changes), "fp32", CPU)
    expected = reference_logits(make_weights(config), config, IDS)
    assert expected.abs().max() > 1
    with torch.no_grad():
        assert (base.model(input_ids=IDS).logits - expected).abs().max() <= 1e-5
    assert (base.model_type, base.vocab_size) == ("glm", 352)
    assert type(base.model) is transformers.GlmForCausalLM
    assert not any(p.requires_grad for p in base.model.parameters())


def test_padding_on_the_left_changes_nothing(tmp_path):
    model = load_base(write_folder(tmp_path / "m"), "fp32", CPU).model
    mask = torch.ones_like(IDS)
    padded = torch.nn.functional.pad(IDS, (5, 0))
    mask = torch.nn.functional.pad(mask, (5, 0))
    with torch.no_grad():
        shifted = model(input_ids=padded, attention_mask=mask).logits[:, 5:]
        assert (shifted - model(input_ids=IDS).logits).abs().max() <= 1e-5


def test_names_go_there_and_back(tmp_path):
    weights = make_weights(CONFIG)
    mapped = glm_weights(weights, read_arch(CONFIG), tmp_path)
    back = {}
    outside = {"embed_tokens": "embedding.word_embeddings", "norm": "encoder.final_layernorm"}
    for name, tensor in mapped.items():
        parts = name.split(".")
        if parts[1] == "layers":
            block, end = f"transformer.encoder.layers.{parts[2]}", parts[-1]
            if parts[4] in ("q_proj", "k_proj", "v_proj"):
                back.setdefault(f"{block}.self_attention.query_key_value.{end}", {})[parts[4]] = tensor
                continue
            inner = {"o_proj": "self_attention.dense", "gate_up_proj": "mlp.dense_h_to_4h"}
            inner["down_proj"] = "mlp.dense_4h_to_h"
            key = parts[4] if parts[3] in ("mlp", "self_attn") else parts[3]
            back[f"{block}.{inner.get(key, key)}.{end}"] = tensor
        else:
            inside = outside[parts[1]] if parts[0] == "model" else "output_layer"
            back[f"transformer.{inside}.{parts[-1]}"] = tensor
    joined = {k: torch.cat([v[p] for p in ("q_proj", "k_proj", "v_proj")]) for k, v in back.items() if type(v) is dict}
    assert (back | joined).keys() == weights.keys()
    assert all(torch.equal((back | joined)[name], tensor) for name, tensor in weights.items())
    pointers = [tensor.untyped_storage().data_ptr() for tensor in mapped.values()]
    assert len(set(pointers)) == len(pointers), "safetensors would refuse to save them"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_load_bit_for_bit(tmp_path, dtype):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    folder = write_folder(tmp_path / "m", dtype=dtype)
    state = load_base(folder, name, CPU).model.state_dict()
    expected = glm_weights({k: v.to(dtype) for k, v in make_weights(CONFIG).items()}, read_arch(CONFIG), folder)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_like_a_converted_model(tmp_path, quantization):
    folder = write_folder(tmp_path / "m", ffn_hidden_size=64, hidden_size=64)
    load_base(folder, "fp32", CPU).model.save_pretrained(tmp_path / "glm")
    ours = load_base(folder, "fp32", CPU, quantization).model.state_dict()
    theirs = load_base(tmp_path / "glm", "fp32", CPU, quantization).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "chatglm3-6b-32k"])
def test_published_configurations(shared, name):
    original = json.loads((shared / "configs" / name / "config.json").read_text())
    config = glm_config(original)
    theirs = transformers.GlmConfig(**{key: value for key, value in config.items() if key != "model_type"})
    assert theirs.rms_norm_eps == 1e-5
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    theta = 500_000.0 if name == "chatglm3-6b-32k" else 10_000.0
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
    assert theirs.max_position_embeddings == original["seq_length"]
    assert (theirs.vocab_size, theirs.head_dim, theirs.num_key_value_heads) == (65024, 128, 2)
    with torch.device("meta"):
        model = transformers.GlmForCausalLM(theirs)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    assert model.model.embed_tokens.padding_idx == 0


def test_no_code_runs_and_nothing_is_asked(tmp_path, monkeypatch):
    """Given such a folder, an Auto* class reads an answer from standard input."""
    folder = write_folder(tmp_path / "m")

    def refuse(*_, **__):
        raise AssertionError("asked")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(sys, "stdin", None)
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    assert load_base(folder, "fp32", CPU).model_type == "glm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_bit": 4}, "`quantization_bit` is 4; give the plain 16-bit model"),
        ({"pre_seq_len": 128}, "`pre_seq_len` is 128"),
        ({"rmsnorm": False}, "`rmsnorm` is False; only ChatGLM models with True"),
        ({"post_layer_norm": False}, "`post_layer_norm` is False"),
        ({"apply_residual_connection_post_layernorm": True}, "`apply_residual_connection_post_layernorm` is True"),
        ({"add_bias_linear": True}, "`add_bias_linear` is True"),
        ({"fp32_residual_connection": True}, "`fp32_residual_connection` is True"),
        ({"hidden_dropout": 0.1}, "`hidden_dropout` is 0.1"),
        ({"padded_vocab_size": ...}, "`vocab_size` is missing"),
        ({"num_layers": 10**9}, "from 1 to 2,000"),
        ({"kv_channels": "16"}, "`head_dim` is '16'"),
        ({"multi_query_group_num": 3}, "4 attention heads cannot share 3"),
        ({"layernorm_epsilon": 0}, "`layernorm_epsilon` is 0; a positive number"),
        ({"rope_ratio": "50"}, "`rope_ratio` is '50'; a positive number"),
        ({"seq_length": "long"}, "`seq_length` is 'long'"),
        ({"tie_word_embeddings": "no"}, "`tie_word_embeddings` is 'no'"),
        ({"eos_token_id": [151329, 151336]}, "Of GLM-4 give the version for transformers, such as THUDM/glm-4-9b"),
        ({"position_encoding_2d": True}, "`inner_hidden_size` is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_variants_are_refused_before_weights_are_read(tmp_path, changes, message):
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not ...}))
    with pytest.raises(ConfigError, match=message):
        inspect_folder(folder)


def test_weights_that_are_not_chatglms(tmp_path):
    folder = write_folder(tmp_path / "m")
    file = folder / "pytorch_model-00002-of-00002.bin"
    weights = {name: tensor.clone() for name, tensor in read_tensors(file).items()}  # the file is written anew below
    torch.save(weights | {"transformer.prefix_encoder.embedding.weight": torch.ones(2)}, file)
    with pytest.raises(ConfigError, match=r"'transformer.prefix_encoder.embedding.weight' is no weight of ChatGLM2"):
        load_base(folder, "fp32", CPU)
    torch.save({k: v for k, v in weights.items() if "output_layer" not in k}, file)
    with pytest.raises(ConfigError, match=r"1 weight is missing \(lm_head.weight\)"):
        load_base(folder, "fp32", CPU)
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    torch.save(weights | {name: weights[name][:-1]}, file)
    with pytest.raises(ConfigError, match=r"query_key_value.weight has \[127, 32\] values; 128 rows are needed"):
        load_base(folder, "fp32", CPU)


def test_positions_limit_the_length_of_rows(tmp_path):
    assert inspect_folder(write_folder(tmp_path / "m")).config["max_position_embeddings"] == 256
