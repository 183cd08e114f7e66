"""Each method: what it trains, what it stores, that it comes back bit-equal, merges, refuses."""

import json
import warnings

import pytest
import torch

from fitune.config import build
from fitune.errors import CheckpointError, ConfigError
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import load_base
from tiny import make_model

CPU = torch.device("cpu")
FACTS = {"base_model": "tiny", "base_fingerprint": "abc"}
IDS = torch.tensor([[5, 9, 20, 33, 7, 2]])


def apply(folder, method="lora", dtype="fp32", **keys):
    config = build({"model": {"path": str(folder)}, "method": {"name": method, **keys}}).method
    torch.manual_seed(0)
    return METHODS[method].apply(load_base(folder, dtype, CPU), config)


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    [
        ("tiny", "lora", "fp32"),
        ("tiny", "lora", "bf16"),
        ("tiny", "full", "fp32"),
        ("tiny_qwen", "full", "bf16"),
        ("tiny_qwen", "bitfit", "fp32"),
        ("tiny_qwen", "bitfit", "fp16"),
        ("tiny_qwen", "lora", "fp32"),
    ],
)
def test_saved_and_loaded_bit_equal(family, method, dtype, request, tmp_path):
    folder = request.getfixturevalue(family)
    model = apply(folder, method, dtype)
    before = logits(model)
    randomize(model)
    after = logits(model)
    assert not torch.equal(before, after)
    METHODS[method].save(model, tmp_path, FACTS)
    fresh = apply(folder, method, dtype)
    METHODS[method].load(fresh, tmp_path)
    assert torch.equal(logits(fresh), after)
    assert json.loads((tmp_path / "fitune.json").read_text()) == {"method": method, **FACTS}


def test_lora_is_fp32_on_a_16_bit_base(tiny):
    model = apply(tiny, dtype="bf16")
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_lora_files_are_pefts(tiny, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = apply(tiny, r=4, alpha=8, target_modules="linear")
    randomize(model)
    METHODS["lora"].save(model, tmp_path, FACTS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    assert torch.equal(logits(theirs), logits(model))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["task_type"], stored["peft_type"], stored["r"]) == ("CAUSAL_LM", "LORA", 4)
    assert stored["lora_alpha"] == 8
    assert stored["inference_mode"] is True


def test_merged_lora_answers_the_same(tiny):
    model = apply(tiny)
    randomize(model)
    expected = logits(model)
    merged = METHODS["lora"].merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_counts(tiny, tiny_qwen):
    assert sum(p.numel() for p in trainable(apply(tiny, r=4)).values()) == 2 * 4 * ((64 + 64) + (64 + 32))
    assert sum(p.numel() for p in trainable(apply(tiny_qwen, "bitfit")).values()) == 2 * (64 + 32 + 32)


def test_bitfit_without_biases_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"this llama model has none; use method\.name=lora"):
        apply(tiny, "bitfit")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "q_prj is no linear layer of this model; allowed: attention, linear, down_proj"),
        (["lm_head"], "lm_head"),
    ],
)
def test_unknown_targets_are_refused(tiny, targets, message):
    with pytest.raises(ConfigError, match=message):
        apply(tiny, target_modules=targets)


def test_an_unknown_architecture_needs_names(tmp_path):
    folder = make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ConfigError, match="attention layers of 'gpt2' models are not known"):
        apply(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that Conv1D is transposed
        assert trainable(apply(folder, target_modules="linear"))


def test_wrong_files_are_refused(tiny, tmp_path):
    METHODS["lora"].save(apply(tiny, r=4), tmp_path, FACTS)
    with pytest.raises(CheckpointError, match=r"does not fit .* stored \[4, 64\], needed \[8, 64\]"):
        METHODS["lora"].load(apply(tiny, r=8), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        METHODS["lora"].load(apply(tiny, r=4), tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        METHODS["lora"].load(apply(tiny, r=4), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_never_stored(tiny, tmp_path, value):
    model = apply(tiny)
    with torch.no_grad():
        next(iter(trainable(model).values())).view(-1)[3] = value
    with pytest.raises(CheckpointError, match="not finite"):
        METHODS["lora"].save(model, tmp_path, FACTS)
    assert not list(tmp_path.iterdir())
