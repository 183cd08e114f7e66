"""New tokens: texts that become one id, with rows that are trained, stored, exported and found again."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fitune
from fitune.config import build
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from fitune.methods import METHODS
from fitune.model.load import load_base
from fitune.training import run
from fitune.training.evaluate import evaluate_run
from tiny import make_model

TEXTS = ("春山", "<verse>")
FIRST = 118  # tokens that the tiny tokenizer has
MANY = tuple(f"<{number}>" for number in range(20))  # more than the model has rows to spare


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_model(root / kind, kind) for kind in ("llama", "qwen2", "bloom")}


@pytest.fixture(
    scope="module", params=[("llama", TEXTS), ("qwen2", TEXTS), ("bloom", TEXTS + MANY), ("llama", TEXTS + MANY)]
)
def finished(request, bases, rows_file, tmp_path_factory):
    """(base folder, new tokens, run folder)."""
    kind, texts = request.param
    folder = tmp_path_factory.mktemp("tokens") / "run"
    train = {
        "max_steps": 8,
        "global_batch_rows": 8,
        "learning_rate": 0.01,
        "save_every_steps": 4,
        "eval_every_steps": 4,
    }
    tree = {
        "model": {"path": str(bases[kind]), "dtype": "fp32"},
        "method": {"name": "lora", "r": 2, "new_tokens": list(texts)},
        "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
        "train": {**train, "device": "cpu"},
        "output": {"dir": str(folder)},
    }
    return bases[kind], texts, run.train(build(tree), quiet=True).run


def test_texts_become_one_id(bases):
    plain, with_new = Tokenizer.load(bases["llama"]), Tokenizer.load(bases["llama"], TEXTS)
    assert len(plain.encode("a春山b<verse>")) == 4 + 7
    assert with_new.encode("a春山b<verse>") == [*plain.encode("a"), FIRST, *plain.encode("b"), FIRST + 1]
    assert with_new.decode(with_new.encode("a春山b<verse>")) == "a春山b<verse>"
    assert with_new.vocab_size == plain.vocab_size + 2
    assert with_new.hash != plain.hash
    with pytest.raises(ConfigError, match=r"'a' is a token .* already"):
        Tokenizer.load(bases["llama"], ["a"])


def test_texts_that_can_be_no_token(bases, tmp_path):
    with pytest.raises(ConfigError, match=r"method\.new_tokens.*surrogates not allowed"):
        build({"model": {"path": "m"}, "method": {"name": "lora", "new_tokens": ["\ud800"]}})
    folder = shutil.copytree(bases["llama"], tmp_path / "m")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["unk_token"] = None
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"drops '龙' from a text"):
        Tokenizer.load(folder, ["龙"])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_rows_begin_as_the_mean_of_what_the_text_was(bases, kind):
    config = build({"model": {"path": "m"}, "method": {"name": "lora", "new_tokens": list(TEXTS)}}).method
    before = load_base(bases[kind], "fp32", torch.device("cpu")).model
    model = METHODS["lora"].apply(load_base(bases[kind], "fp32", torch.device("cpu")), config).get_base_model()
    ids = Tokenizer.load(bases[kind]).encode("春山")
    for old, new in zip(
        (before.get_input_embeddings(), before.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        torch.testing.assert_close(new.weight[FIRST], old.weight[ids].mean(0))
        assert torch.equal(new.weight[:FIRST], old.weight[:FIRST])


def test_only_the_new_rows_are_trained(finished):
    base, texts, folder = finished
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in stored.items() if "lora_" not in name}
    tied = "llama" not in str(base)
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(len(texts), 64)}
    assert len(rows) == (1 if tied else 2)
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [row["loss"] for row in losses if row["kind"] == "eval"]
    assert evals[-1] < evals[0]


def test_a_resumed_run_is_bit_identical(finished, tmp_path):
    _, _, whole = finished
    half = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "step_000008")
    run.resume(half, quiet=True)
    file = "adapter/adapter_model.safetensors"
    assert (half / file).read_bytes() == (whole / file).read_bytes()


def test_opened_evaluated_exported(finished, tmp_path):
    _, texts, folder = finished
    stored = json.loads((folder / "result.json").read_text())
    assert evaluate_run(folder)["loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-5)
    model = fitune.load(folder, device="cpu")
    assert model.tokenizer.encode("春山") == [FIRST]
    answer = model.generate("say 3", max_new_tokens=12)
    target = fitune.export(folder, tmp_path / "merged")
    merged = fitune.load(target, device="cpu")
    assert merged.tokenizer.encode("春山<verse>") == [FIRST, FIRST + 1]
    assert merged.generate("say 3", max_new_tokens=12) == answer
    theirs = AutoTokenizer.from_pretrained(target)
    assert theirs("春山<verse>", add_special_tokens=False)["input_ids"] == [FIRST, FIRST + 1]
    assert AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight.shape[0] == max(
        128, FIRST + len(texts)
    )


def test_peft_opens_the_adapter_once_there_are_rows(finished, tmp_path):
    import peft

    base, texts, folder = finished
    target = fitune.export(folder, tmp_path / "adapter", form="adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    if FIRST + len(texts) > 128:
        model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(target)), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        theirs = peft.PeftModel.from_pretrained(model, target)
    ids = torch.tensor([[5, FIRST, 20, FIRST + 1, 7]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (theirs, fitune.load(folder, device="cpu").model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # BLOOM's attention is another one here


def test_the_next_run_has_them_too(finished, rows_file, tmp_path):
    base, texts, folder = finished
    tree = {
        "model": {"path": str(base), "dtype": "fp32"},
        "method": {"name": "lora", "adapter": str(folder)},
        "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
        "train": {"max_steps": 1, "device": "cpu"},
        "output": {"dir": str(tmp_path / "next")},
    }
    second = run.train(build(tree), quiet=True).run
    ends, begins = (json.loads((at / "result.json").read_text()) for at in (folder, second))
    assert begins["first_eval_loss"] == pytest.approx(ends["last_eval_loss"], rel=1e-5)
    assert fitune.load(second, device="cpu").tokenizer.new_tokens == texts


def test_whole_embeddings_and_some_of_their_rows_exclude_each_other(bases):
    method = {"name": "lora", "new_tokens": list(TEXTS), "modules_to_save": ["lm_head"]}
    config = build({"model": {"path": "m"}, "method": method}).method
    with pytest.raises(ConfigError, match=r"trains some rows of .*, and method\.modules_to_save all of it"):
        METHODS["lora"].apply(load_base(bases["llama"], "fp32", torch.device("cpu")), config)
