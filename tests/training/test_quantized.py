"""Runs on a quantized base: they learn, resume, answer and are evaluated on it, and are exported into the full one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fitune
from fitune.config import build
from fitune.errors import ConfigError
from fitune.model.quantize import QUANTIZATIONS, QuantLinear
from fitune.training import run
from fitune.training.evaluate import evaluate_run

CLOCK = {"seconds", "memory_bytes"}


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def quantized(model):
    return [module.quantization for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.fixture(scope="module", params=[(q, path) for q in QUANTIZATIONS for path in ("plain", "auto")], ids="-".join)
def finished(request, tmp_path_factory, tiny, rows_file):
    """(quantization, folder of a finished run)."""
    quantization, path = request.param
    folder = tmp_path_factory.mktemp("quantized") / "run"
    train = {"max_steps": 6, "global_batch_rows": 4, "micro_batch_rows": 2, "learning_rate": 1e-2}
    tree = {
        "model": {"path": str(tiny), "dtype": "fp32", "quantization": quantization},
        "method": {"name": "lora", "r": 4, "target_modules": "linear"},
        "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
        "train": {**train, "save_every_steps": 2, "eval_every_steps": 3, "device": "cpu", "path": path},
        "output": {"dir": str(folder)},
    }
    run.train(build(tree), quiet=True)
    return quantization, folder


def test_it_learns_and_counts_the_weights_it_stands_for(finished, tiny):
    _, folder = finished
    losses = [row["loss"] for row in metrics(folder) if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    stored = json.loads((folder / "result.json").read_text())
    plain = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert stored["total_parameters"] == plain + stored["trainable_parameters"]


def test_a_resumed_run_is_bit_identical(finished, tmp_path):
    _, whole = finished
    half = shutil.copytree(whole, tmp_path / "half")
    for step in (half / "checkpoints").iterdir():
        if step.name > "step_000004":
            shutil.rmtree(step)
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(whole)
    file = "adapter/adapter_model.safetensors"
    assert (half / file).read_bytes() == (whole / file).read_bytes()


def test_it_cannot_be_resumed_in_another_quantization(finished, tmp_path):
    quantization, folder = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = "int8" if quantization != "int8" else "none"
    with pytest.raises(ConfigError, match=f"cannot be resumed with model.quantization: '{quantization}' -> '{other}'"):
        run.resume(copy, [f"model.quantization={other}"], quiet=True)


def test_it_answers_and_is_evaluated_on_the_same_base(finished):
    quantization, folder = finished
    loaded = fitune.load(folder, device="cpu")
    assert quantized(loaded.model) == [quantization] * 14
    assert loaded.generate("say 3", max_new_tokens=5) is not None
    stored = json.loads((folder / "result.json").read_text())
    assert evaluate_run(folder)["loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-5)


def test_it_is_merged_into_the_full_base(finished, tmp_path, tiny):
    _, folder = finished
    target = fitune.export(folder, tmp_path / "merged")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    merged, base = load_file(target / "model.safetensors"), load_file(tiny / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = base[f"{name}.weight"] + 16 / 4 * B @ A
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    again = fitune.load(target, device="cpu")
    assert not quantized(again.model)
    ours = fitune.load(folder, device="cpu", quantization="none")
    assert not quantized(ours.model)
    assert again.generate("say 3", max_new_tokens=9) == ours.generate("say 3", max_new_tokens=9)


def test_bitfit_trains_full_precision_biases(tree, tmp_path, tiny_qwen):
    tree["model"] = {"path": str(tiny_qwen), "dtype": "fp32", "quantization": "nf4"}
    tree["method"] = {"name": "bitfit"}
    run.train(build(tree), quiet=True)
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    target = fitune.export(tmp_path / "run", tmp_path / "merged")
    merged, base = load_file(target / "model.safetensors"), load_file(tiny_qwen / "model.safetensors")
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in base if name.endswith("bias")}


def test_full_is_refused(tree):
    tree["model"]["quantization"] = "int8"
    tree["method"] = {"name": "full"}
    with pytest.raises(
        ConfigError, match=r"full trains every weight.* Set model\.quantization=none or method\.name=lora"
    ):
        build(tree)


def test_a_bare_model_can_be_opened_quantized(tiny):
    assert quantized(fitune.load(tiny, device="cpu", quantization="fp4").model) == ["fp4"] * 14
    assert not quantized(fitune.load(tiny, device="cpu").model)
    with pytest.raises(ConfigError, match="quantization is 'int4'; allowed: none, int8, nf4, fp4, fp8"):
        fitune.load(tiny, quantization="int4")


def test_llm_int8_trains_and_answers_on_the_plain_path(tree, tmp_path, capsys):
    tree["model"] |= {"quantization": "int8", "int8_compute": "llm_int8", "int8_threshold": 2.0}
    tree["data"]["packing"] = True
    del tree["train"]["micro_batch_rows"]
    run.train(build(tree))
    assert "plain path: model.int8_compute=llm_int8" in " ".join(capsys.readouterr().err.split())
    rows = metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    loaded = fitune.load(tmp_path / "run", device="cpu")
    layers = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    assert {(layer.compute, layer.threshold) for layer in layers} == {("llm_int8", 2.0)}
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert evaluate_run(tmp_path / "run")["loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-5)
    tree["train"]["path"] = "fast"
    with pytest.raises(ConfigError, match="the engine cannot run this: model.int8_compute=llm_int8"):
        run.train(build(tree), quiet=True, replace=True)


def test_emulated_fp8_is_said(tree, capsys):
    tree["model"]["quantization"] = "fp8"
    run.train(build(tree))
    said = " ".join(capsys.readouterr().err.split())
    assert "blocks in fp8 on cpu" in said
    assert "fp8 is emulated in 14 of 14 layers" in said
