"""Where training starts: PiSSA and OLoRA on exact parts of the weights, virtual tokens on real ones."""

import pytest
import torch

from fitune.config import build
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.methods import METHODS, adapters
from fitune.methods.base import trainable
from fitune.methods.prompts import start_ids
from fitune.model.load import load_base
from methods.cases import CPU, FACTS, IDS, KINDS, apply, base, logits, randomize, section
from tiny import make_model


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize(("family", "dtype", "tolerance"), [("llama", "fp32", 1e-6), ("bloom", "bf16", 4e-3)])
def test_nothing_changes_at_the_start(families, kind, family, dtype, tolerance):
    """R + s B0 A0 is the weight, to the rounding of the base's dtype."""
    model, weights = apply(families[family], kind, dtype), dict(base(families[family], dtype).model.named_modules())
    for name, layer in layers(model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole = layer.get_base_layer().weight.float() + layer.scaling["default"] * B @ A
        expected = weights[name.removeprefix("base_model.model.")].weight.float()
        assert (whole - expected).norm() <= tolerance * expected.norm()
        assert (layer.get_base_layer().weight.float() - expected).norm() > 0.05 * expected.norm()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_pissa_takes_the_largest_singular_values(families):
    """Even random weights, whose singular values fall slowly, leave as little as the exact decomposition does."""
    model, weights = apply(families["llama"], "pissa"), dict(base(families["llama"]).model.named_modules())
    for name, layer in layers(model).items():
        weight = weights[name.removeprefix("base_model.model.")].weight
        U, S, V = torch.linalg.svd(weight)
        left = (weight - U[:, :4] * S[:4] @ V[:4]).norm()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (weight - layer.scaling["default"] * B @ A).norm() <= 1.0001 * left
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-5)  # shared out evenly


def test_olora_takes_what_peft_takes(families):
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        init_lora_weights="olora",
    )
    theirs = adapters.wrap(base(families["llama"]).model, settings)
    for name, layer in layers(apply(families["llama"], "olora")).items():
        other = layers(theirs)[name]
        torch.testing.assert_close(layer.get_base_layer().weight, other.get_base_layer().weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_resumed_start_is_the_stored_one(families, kind, tmp_path):
    """Another machine may find the same part with other rounding, or other signs."""
    method, model = METHODS["lora"], apply(families["llama"], kind)
    randomize(model)
    expected = logits(model)
    method.save(model, tmp_path, FACTS, to_resume=True)
    fresh = apply(families["llama"], kind)
    with torch.no_grad():
        for layer in layers(fresh).values():  # as if the decomposition had come out differently
            before = layer.scaling["default"] * layer.initial_B @ layer.initial_A
            layer.initial_A[0] += 0.1
            layer.get_base_layer().weight += before - layer.scaling["default"] * layer.initial_B @ layer.initial_A
    method.load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-6)
    method.save(fresh, tmp_path, FACTS)
    torch.testing.assert_close(logits(method.open(base(families["llama"]), tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_a_rank_above_the_weights_is_refused(families):
    config = build({"model": {"path": "m"}, "method": {"name": "lora", "init": "pissa", "r": 33}}).method
    with pytest.raises(ConfigError, match=r"v_proj has only 32 singular values.* set method\.r=32 or less"):
        METHODS["lora"].apply(base(families["llama"]), config)


@pytest.fixture
def with_bos(tmp_path):
    """A tokenizer that begins every text with <bos>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    folder = make_model(tmp_path / "bos")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_ids_of_a_start(with_bos, name):
    tokenizer = Tokenizer.load(with_bos)

    def ids(**keys):
        torch.manual_seed(0)
        return start_ids(tokenizer, build({"model": {"path": "m"}, "method": {"name": name, **keys}}).method).tolist()

    text = tokenizer.encode("in verse")
    assert ids(init="text", init_text="in verse", num_virtual_tokens=9) == [1, *text]
    assert ids(init="text", init_text="in verse", num_virtual_tokens=20) == ([1, *text] * 3)[:20]
    drawn = ids(num_virtual_tokens=50)
    assert drawn[0] == 1
    assert len(set(drawn)) > 20
    assert not set(drawn[1:]) & {0, 1, 2, 3}, "special tokens are not drawn"
    assert ids(num_virtual_tokens=50) == drawn
    with pytest.raises(ConfigError, match=r"has 9 tokens, .* set method\.num_virtual_tokens=9 or shorten"):
        ids(init="text", init_text="in verse", num_virtual_tokens=8)


def test_prompts_start_as_embeddings(families):
    model = apply(families["llama"], "prompt text")
    tokenizer = Tokenizer.load(families["llama"])
    ids = start_ids(tokenizer, section("prompt text"))
    expected = base(families["llama"]).model.get_input_embeddings().weight[ids]
    assert torch.equal(next(iter(trainable(model).values())), expected)
    random = build({"model": {"path": "m"}, "method": {**KINDS["prompt"], "init": "random"}}).method
    model = METHODS["prompt"].apply(base(families["llama"]), random)
    assert next(iter(trainable(model).values())).std() > 10 * expected.std()


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "bloom"])
def test_a_prefix_starts_as_the_text_itself(families, family):
    """The model sees the keys and values that the text in front of the row would have given."""
    model = apply(families[family], "prefix text")
    ids = start_ids(Tokenizer.load(families[family]), section("prefix text")).expand(2, -1)
    with torch.no_grad():
        expected = load_base(families[family], "fp32", CPU).model(torch.cat([ids, IDS], 1)).logits[:, ids.shape[1] :]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
