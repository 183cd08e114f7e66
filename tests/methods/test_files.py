"""What each method stores comes back bit-equal, opens in PEFT, merges: on every family."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fitune.errors import CheckpointError, ConfigError
from fitune.methods import METHODS
from fitune.methods.base import TRAINED, trainable
from methods.cases import FACTS, FAMILIES, KINDS, apply, base, logits, peft_model, possible, randomize

# Everything on the two families that differ most, with tied embeddings; what depends on names and shapes on the others.
SHAPED = ("lora linear", "whole head", "ia3", "bitfit", "prompt", "prefix")
CASES = [
    (family, kind)
    for family in FAMILIES
    for kind in (KINDS if family in ("llama tied", "bloom") else SHAPED)
    if possible(family, kind)
]
# The result is made from what is trained, by sums in another order.
ROUNDED = {"pissa", "olora", "prefix projection"}
HIDDEN = {*ROUNDED, "ptuning", "ptuning lstm"}
PEFTS = [(family, kind) for family, kind in CASES if KINDS[kind]["name"] not in ("full", "freeze", "bitfit")]
MERGED = [(family, kind) for family, kind in CASES if METHODS[KINDS[kind]["name"]].merge is not None]


def trained(folder, kind):
    """A method, and a model that it was applied to and whose parameters have moved."""
    model = apply(folder, kind)
    before = logits(model)
    randomize(model)
    assert not torch.equal(before, logits(model))
    return METHODS[KINDS[kind]["name"]], model


def close(found, expected, exactly):
    if exactly:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_saved_and_loaded_bit_equal(families, family, kind, tmp_path):
    method, model = trained(families[family], kind)
    after = logits(model)
    method.save(model, tmp_path, FACTS, to_resume=True)
    assert (tmp_path / TRAINED).is_file() == (kind in HIDDEN)
    fresh = apply(families[family], kind)
    method.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), after)
    for name, parameter in trainable(model).items():
        assert torch.equal(trainable(fresh)[name], parameter), name
    if method.folder == "adapter":
        opened = method.open(base(families[family]), tmp_path)
        close(logits(opened), after, kind not in ROUNDED)
        assert not trainable(opened)
    assert json.loads((tmp_path / "fitune.json").read_text()) == {"method": method.name, **FACTS}


@pytest.mark.parametrize(("family", "kind"), PEFTS)
def test_peft_opens_it_on_the_unchanged_base(families, family, kind, tmp_path):
    method, model = trained(families[family], kind)
    method.save(model, tmp_path, FACTS)
    assert not (tmp_path / TRAINED).exists()
    theirs = logits(peft_model(families[family], tmp_path))
    ours = logits(method.open(base(families[family]), tmp_path))
    stock = family != "bloom"  # our attention of BLOOM sums in another order than the stock one
    close(theirs, ours, stock)
    close(theirs, logits(model), stock and kind not in ROUNDED)


@pytest.mark.parametrize(("family", "kind"), MERGED)
def test_merged_answers_the_same(families, family, kind, tmp_path):
    method, model = trained(families[family], kind)
    expected = logits(model)
    method.save(model, tmp_path, FACTS)
    opened = method.open(base(families[family]), tmp_path) if method.folder == "adapter" else model
    merged = method.merge(opened)
    assert type(merged).__name__.endswith("ForCausalLM")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")  # tied weights are stored once
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5
    )


def test_virtual_tokens_merge_into_nothing():
    assert {name for name, method in METHODS.items() if method.merge is None} == {"prompt", "ptuning", "prefix"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_beside_a_16_bit_base_is_fp32(families, kind, dtype):
    model = apply(families["qwen2"], kind, dtype)
    own = {"full", "freeze", "freeze patterns", "bitfit"}
    low = torch.bfloat16 if dtype == "bf16" else torch.float16
    beside = {name: p.dtype for name, p in trainable(model).items() if kind not in own and "lm_head" not in name}
    assert {p.dtype for name, p in model.named_parameters() if name not in beside} == {low}
    copies = {name for name in beside if "modules_to_save" in name}
    assert {dtype for name, dtype in beside.items() if name not in copies} <= {torch.float32}
    assert {beside[name] for name in copies} <= {low}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prefix projection", "freeze"])
def test_wrong_files_are_refused(families, kind, tmp_path):
    method, model = trained(families["llama"], kind)
    method.save(model, tmp_path, FACTS, to_resume=True)
    other = apply(families["bloom"], kind)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        method.load(other, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        method.open(base(families["bloom"]), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        method.open(base(families["llama"]), tmp_path)


@pytest.mark.parametrize("kind", ["ia3", "prompt"])
@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "NEW"}', "{}"])
def test_a_damaged_configuration_is_refused(families, kind, text, tmp_path):
    method, model = trained(families["llama"], kind)
    method.save(model, tmp_path, FACTS)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="adapter_config.json: cannot be read"):
        method.open(base(families["llama"]), tmp_path)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_nothing_merges_into_quantized_weights(families, kind):
    model = apply(families["llama"], kind, quantization="int8")
    with pytest.raises(ConfigError, match="rounded away"):
        METHODS[KINDS[kind]["name"]].merge(model)
