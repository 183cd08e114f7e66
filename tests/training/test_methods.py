"""Whole runs of every method: they learn, resume bit-identically, are opened, evaluated, exported, continued."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fitune
from fitune.config import build
from fitune.errors import ConfigError
from fitune.training import run
from fitune.training.evaluate import evaluate_run
from tiny import make_model

CLOCK = {"seconds", "memory_bytes"}
RUNS = {
    "prompt": ("qwen2", {"name": "prompt", "num_virtual_tokens": 4}, 0.1),
    "ptuning": ("llama", {"name": "ptuning", "num_virtual_tokens": 4, "encoder": "lstm", "dropout": 0.1}, 0.03),
    "prefix": ("llama", {"name": "prefix", "num_virtual_tokens": 4}, 0.1),
    "prefix projection": ("bloom", {"name": "prefix", "num_virtual_tokens": 4, "projection": True}, 0.01),
    "ia3": ("bloom", {"name": "ia3"}, 0.03),
    "freeze": ("qwen2", {"name": "freeze", "num_layers": 1}, 0.003),
    "pissa": ("llama", {"name": "lora", "r": 4, "init": "pissa", "lora_plus_ratio": 4}, 0.003),
    "olora": ("bloom", {"name": "lora", "r": 4, "init": "olora", "dropout": 0.1}, 0.003),
    "dora": ("qwen2", {"name": "lora", "r": 4, "dora": True, "rslora": True}, 0.01),
    "whole": ("llama", {"name": "lora", "r": 4, "modules_to_save": ["lm_head", "norm"]}, 0.003),
}  # fmt: skip
MERGED = ["ia3", "freeze", "pissa", "olora", "dora", "whole"]


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.fixture(scope="module")
def make(tmp_path_factory, rows_file):
    """(base, method, ...) -> tree of a small run."""
    root = tmp_path_factory.mktemp("methods")
    bases = {kind: make_model(root / kind, kind) for kind in ("llama", "qwen2", "bloom")}

    def tree(kind, method, rate=0.01, name="run", **model):
        train = {"max_steps": 8, "global_batch_rows": 8, "micro_batch_rows": 3, "learning_rate": rate}
        return {
            "model": {"path": str(bases[kind]), "dtype": "fp32", **model},
            "method": method,
            "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
            "train": {**train, "save_every_steps": 4, "eval_every_steps": 4, "device": "cpu"},
            "output": {"dir": str(root / name)},
        }

    return tree


@pytest.fixture(scope="module", params=RUNS)
def finished(request, make):
    """(name, folder of a finished run)."""
    kind, method, rate = RUNS[request.param]
    tree = make(kind, method, rate, request.param)
    return request.param, run.train(build(tree), quiet=True).run


def test_it_learns(finished):
    name, folder = finished
    losses = [row["loss"] for row in metrics(folder) if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    said = (folder / "result.json").read_text()
    assert json.loads(said)["status"] == "done", name


def test_a_resumed_run_is_bit_identical(finished, tmp_path):
    _, whole = finished
    half = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "step_000008")
    shutil.rmtree(half / "adapter")
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(whole)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (half / "adapter" / file).read_bytes() == (whole / "adapter" / file).read_bytes()
    for file in ("adapter/adapter_model.safetensors", "adapter/trained.safetensors", "optimizer.safetensors"):
        if (whole / "checkpoints" / "step_000008" / file).is_file():
            found, expected = (load_file(at / "checkpoints" / "step_000008" / file) for at in (half, whole))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), file


def test_it_is_evaluated_and_answers_alike_in_batches_and_alone(finished):
    _, folder = finished
    stored = json.loads((folder / "result.json").read_text())
    assert evaluate_run(folder)["loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-5)
    model = fitune.load(folder, device="cpu")
    prompts = ["say 1", "say 2\nxxxx", "s"]
    answers = [model.generate(prompt, max_new_tokens=12) for prompt in prompts]
    assert model.generate_many(prompts, max_new_tokens=12) == answers
    assert "".join(model.stream(prompts[1], max_new_tokens=12)) == answers[1]


def test_exports(finished, tmp_path):
    name, folder = finished
    target = fitune.export(folder, tmp_path / "adapter", form="adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {f.name for f in target.iterdir()}
    if name in MERGED:
        merged = fitune.load(fitune.export(folder, tmp_path / "merged"), device="cpu")
        ours = fitune.load(folder, device="cpu")
        assert merged.generate("say 3", max_new_tokens=12) == ours.generate("say 3", max_new_tokens=12)
        return
    with pytest.raises(ConfigError, match=r"no weights of the model could hold them\. Export it with --form adapter"):
        fitune.export(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["prompt", "prefix", "ia3", "freeze", "pissa", "whole"])
def test_16_bit_bases(make, name, dtype):
    kind, method, rate = RUNS[name]
    folder = run.train(build(make(kind, method, rate, f"{name}-{dtype}", dtype=dtype)), quiet=True).run
    losses = [row["loss"] for row in metrics(folder) if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    stored = json.loads((folder / "result.json").read_text())
    assert evaluate_run(folder)["loss"] == pytest.approx(stored["best_eval_loss"], rel=2e-3)


def test_pissa_runs_on_the_engine(make, capsys):
    """The base's weights are changed before the engine reads them; what it trains are ordinary adapters."""
    losses = []
    for path in ("fast", "plain"):
        tree = make("llama", RUNS["pissa"][1], 0.003, f"pissa-{path}")
        tree["train"] |= {"path": path, "max_steps": 4}
        folder = run.train(build(tree), quiet=True).run
        losses.append([row["loss"] for row in metrics(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
