"""ChatGLM-6B from its published files to a trained, resumed, reloaded and exported model that answers."""

import builtins
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import fitune
from fitune.config import build
from fitune.data.batches import micro_batches
from fitune.data.prepare import prepare
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, Interrupted
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.folder import inspect_folder
from fitune.model.load import load_base, read_tensors
from fitune.plan.arch import read_arch
from fitune.training import run
from fitune.training.path import PlainPath
from original_chatglm_v1 import logits, random_weights, write_folder

pytest.importorskip("sentencepiece")
CPU = torch.device("cpu")
PROMPT = "你好，请介绍一下自己"


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("v1") / "chatglm-6b", shared)


@pytest.fixture(scope="module")
def sizes(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(sizes):
    made = random_weights(sizes)
    return made | {"lm_head.weight": made["transformer.word_embeddings.weight"]}


@pytest.fixture(scope="module")
def rows(shared, tmp_path_factory):
    """Short real rows, one of them with a history."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with (shared / "alpaca" / "alpaca_gpt4_zh_demo1000.jsonl").open(encoding="utf-8") as stream:
        all_rows = [json.loads(line) for line in stream]
    asked = [[row["instruction"] + row["input"], row["output"]] for row in all_rows]
    asked = [texts for texts in asked if sum(map(len, texts)) < 32][:9]
    roles = ("user", "assistant") * 2
    talks = [list(zip(roles, turns, strict=False)) for turns in [*asked, ["你好", "你好！", "再见", "再见！"]]]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in talks]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def tree(folder, rows, target, **method):
    return {
        "model": {"path": str(folder), "dtype": "fp32"},
        "method": {"name": "lora", "r": 4} | method,
        "data": {"train": [str(rows)], "eval": 0.2, "max_length": 40},
        "train": {
            "max_steps": 3,
            "global_batch_rows": 3,
            "micro_batch_rows": 2,
            "learning_rate": 1e-2,
            "save_every_steps": 2,
            "eval_every_steps": 3,
            "device": "cpu",
            "path": "plain",
        },
        "output": {"dir": str(target)},
    }


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_published_folder_loads_without_its_code(shared, tmp_path, weights, sizes, form, monkeypatch):
    """Given such a folder, an Auto* class reads an answer from standard input."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    base = load_base(write_folder(tmp_path / "m", shared, form), "fp32", CPU)
    assert (base.model_type, base.vocab_size) == ("chatglm", 130528)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.lm_head.weight is base.model.transformer.word_embeddings.weight, "equal in the files: tied"
    ids = [5, 74874, 130001, 130004, 5, 74874, 35, 130005]
    expected = logits(weights, ids, sizes)
    assert (base.model(torch.tensor([ids])).logits[0] - expected).abs().max() <= 1e-5
    assert sum(p.numel() for p in base.model.parameters()) == read_arch(sizes).total


def test_heads_that_differ_stay_apart(shared, tmp_path):
    folder = write_folder(tmp_path / "m", shared, vocab_size=130400)
    for file in folder.glob("*.bin"):
        tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][5, 5] += 1
            torch.save(tensors, file)
    model = load_base(folder, "fp32", CPU).model
    head, embedding = model.lm_head.weight, model.transformer.word_embeddings.weight
    assert (head - embedding)[5, 5] == pytest.approx(1, abs=1e-5)
    assert (head != embedding).sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_bit": 8}, "`quantization_bit` is 8; give the plain 16-bit model"),
        ({"pre_seq_len": 128}, "`pre_seq_len` is 128"),
        ({"position_encoding_2d": False}, "`position_encoding_2d` is not true"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"num_layers": 10**6}, "`num_layers` is 1000000"),
        ({"inner_hidden_size": None}, "`inner_hidden_size`"),
        ({"hidden_size": 36}, "hidden_size 36 makes no 2 heads"),
    ],
)
def test_variants_are_refused_before_weights_are_read(tmp_path, sizes, changes, message):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
    with pytest.raises(ConfigError, match=message):
        inspect_folder(tmp_path)


def test_missing_and_surplus_weights(shared, tmp_path):
    folder = write_folder(tmp_path / "m", shared, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    for num_layers, kind in (
        (3, r"missing \(transformer.layers.2"),
        (1, r"not in .* describes \(transformer.layers.1"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"num_layers": num_layers}))
        with pytest.raises(ConfigError, match=rf"12 weights are {kind}.attention.dense.bias"):
            load_base(folder, "fp32", CPU)


def test_parameters_of_the_published_model(shared):
    """The count that PEFT prints for it, head and embedding being one."""
    from fitune.model.chatglm_v1 import ChatGLMForConditionalGeneration, read_config

    config = json.loads((shared / "configs" / "chatglm-6b" / "config.json").read_text())
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(read_config(config))
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    arch = read_arch(config)
    planned = {p.name.format(n): p.shape for p in arch.parameters for n in range(p.copies)}
    assert planned == named
    assert sum(p.numel() for p in model.parameters()) == arch.total == 6_173_286_400


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", "none"), ("bitfit", "none"), ("lora", "int8"), ("lora", "nf4")]
)
def test_training(folder, rows, tmp_path, method, quantization):
    """The loss falls; the run resumes where it was stopped, reloads bit for bit, and answers."""
    settings = tree(folder, rows, tmp_path / "run", **({"name": method} if method != "lora" else {}))
    if method == "bitfit":
        del settings["method"]["r"]
    settings["model"]["quantization"] = quantization
    result = run.train(build(settings), quiet=True)
    assert result.best_eval_loss < result.first_eval_loss
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert all("before" in sample and "after" in sample for sample in samples)
    loaded = fitune.load(tmp_path / "run", device="cpu")
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    state = METHODS[method].state(loaded.model)
    assert all(
        torch.equal(state.get(name, dict(loaded.model.named_parameters()).get(name)), t) for name, t in stored.items()
    )
    assert loaded.template.name == "chatglm"
    one, two = loaded.generate_many([PROMPT, "再见"], max_new_tokens=6)
    assert [one, two] == [loaded.generate(PROMPT, max_new_tokens=6), loaded.generate("再见", max_new_tokens=6)]
    assert "".join(loaded.stream(PROMPT, max_new_tokens=6)) == one


def test_a_stopped_run_resumes_to_the_same_weights(folder, rows, tmp_path, monkeypatch):
    whole = run.train(build(tree(folder, rows, tmp_path / "a")), quiet=True)
    real, calls = PlainPath.loss_and_grad, []

    def stopping(self, batch, scale):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, scale)

    with monkeypatch.context() as patch:
        patch.setattr(PlainPath, "loss_and_grad", stopping)
        with pytest.raises(Interrupted, match="after step 2 of 3"):
            run.train(build(tree(folder, rows, tmp_path / "b")), quiet=True)
    resumed = run.resume(tmp_path / "b", quiet=True)
    assert (resumed.step, resumed.best_eval_loss) == (whole.step, whole.best_eval_loss)
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_batches_equal_single_rows(folder, rows, packing, checkpointing):
    """Loss and gradients of padded and packed micro batches, recomputed or not, are those of one row at a time."""
    settings = tree(folder, rows, "unused", target_modules="linear")
    settings["data"] |= {"packing": packing, "eval": None}
    del settings["train"]["micro_batch_rows"]
    settings["train"] |= {"micro_batch_tokens": 130} if packing else {"micro_batch_rows": 3}
    config = build(settings)
    dataset = prepare(config.data, Tokenizer.load(folder)).train[:6]
    found = {}
    for alone in (True, False):
        torch.manual_seed(0)
        model = METHODS["lora"].apply(load_base(folder, "fp32", CPU), config.method)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.normal_(std=0.1)
        path = PlainPath(model, CPU, checkpointing and not alone)
        groups = [[row] for row in dataset] if alone else [dataset]
        batches = [batch for group in groups for batch in micro_batches(group, config.data, config.train, 3)]
        loss = sum(path.loss_and_grad(batch, 0.01).item() for batch in batches)
        found[alone] = loss, {name: p.grad for name, p in trainable(model).items()}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, expected in found[True][1].items():
        assert (found[False][1][name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_packed_training(folder, rows, tmp_path):
    settings = tree(folder, rows, tmp_path / "run")
    settings["data"]["packing"] = True
    del settings["train"]["micro_batch_rows"]
    result = run.train(build(settings), quiet=True)
    assert result.best_eval_loss < result.first_eval_loss


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_exports_keep_the_published_layout(folder, rows, tmp_path, sizes, method):
    """Names and keys of the original, so that its own code loads the folder; so does fitune, bit for bit."""
    settings = tree(folder, rows, tmp_path / "run")
    settings["method"] = {"name": method}
    settings["train"] |= {"max_steps": 1, "learning_rate": 1e-3}
    run.train(build(settings), quiet=True)
    target = fitune.export(tmp_path / "run", tmp_path / "out")
    config = json.loads((target / "config.json").read_text())
    written = {"architectures", "transformers_version", "torch_dtype", "_name_or_path"}
    kept = sizes.keys() - written
    assert {key: config.get(key) for key in kept} == {key: sizes[key] for key in kept}
    stored = load_file(target / "model.safetensors")
    assert stored.keys() | {"lm_head.weight"} == random_weights(sizes).keys()
    assert (target / "ice_text.model").read_bytes() == (folder / "ice_text.model").read_bytes()
    loaded, exported = fitune.load(tmp_path / "run", device="cpu"), fitune.load(target, device="cpu")
    assert exported.prompt_ids(PROMPT) == loaded.prompt_ids(PROMPT)
    assert exported.generate(PROMPT, max_new_tokens=8) == loaded.generate(PROMPT, max_new_tokens=8)


def test_rows_longer_than_the_model_are_refused(folder, rows, tmp_path):
    settings = tree(folder, rows, tmp_path / "run")
    settings["data"]["max_length"] = 4096
    with pytest.raises(ConfigError, match="data.max_length is 4096, but this model has 2048 positions"):
        run.train(build(settings), quiet=True)
