"""What merging changes, measured on runs of the embedded model on quantized bases."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fitune
from fitune.cli import main
from fitune.config import build
from fitune.errors import ConfigError, DataError
from fitune.model.load import load_base
from fitune.training import merge_report, run
from fitune.training.evaluate import evaluate_run

ROWS = 12


@pytest.fixture(scope="module")
def demo(tmp_path_factory, pytestconfig):
    """The first rows of the demo."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 40), ("heldout", ROWS)):
        lines = (pytestconfig.rootpath / "examples" / "demo" / f"{name}.jsonl").read_text("utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["int8", "nf4"])
def finished(request, tmp_path_factory, demo):
    """(quantization, a run of the embedded model of a few steps)."""
    tree = {
        "model": {"path": "embedded", "dtype": "fp32", "quantization": request.param},
        "method": {"name": "lora", "r": 8, "target_modules": "linear"},
        "data": {"train": str(demo / "train.jsonl"), "eval": [str(demo / "heldout.jsonl")], "max_length": 128},
        "train": {
            "max_steps": 4,
            "global_batch_rows": 4,
            "micro_batch_rows": 4,
            "learning_rate": 4e-3,
            "device": "cpu",
        },
        "output": {"dir": str(tmp_path_factory.mktemp("runs") / request.param)},
    }
    return request.param, run.train(build(tree), quiet=True).run


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny, rows_file):
    """A run of a tiny model on a base in nf4."""
    tree = {
        "model": {"path": str(tiny), "dtype": "fp32", "quantization": "nf4"},
        "method": {"name": "lora", "r": 4, "target_modules": "linear"},
        "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
        "train": {"max_steps": 6, "global_batch_rows": 4, "learning_rate": 1e-2, "device": "cpu"},
        "output": {"dir": str(tmp_path_factory.mktemp("runs") / "small")},
    }
    return run.train(build(tree), quiet=True).run


@pytest.fixture(scope="module")
def rows(small):
    loaded = fitune.load(small, device="cpu")
    return merge_report.held_out_rows(small, loaded.config, loaded.tokenizer, ())


def test_three_models_are_compared(finished, tmp_path, capsys):
    quantization, folder = finished
    assert main(["export", str(folder), "--to", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["rows"] == ROWS
    assert f"{ROWS} held-out rows, {report['supervised_tokens']:,} supervised tokens" in printed
    models = report["models"]
    assert [model["what"] for model in models] == [
        f"adapter on the base in {quantization}, as trained",
        "merged, bf16",
        f"merged, quantized to {quantization} again",
    ]
    assert all(model["what"] in printed for model in models)
    assert models[0]["kl"] == models[0]["changed"] == 0
    assert models[0]["loss"] == pytest.approx(evaluate_run(folder)["loss"], rel=1e-5)
    for model in models[1:]:
        assert model["kl"] > 0
        assert abs(model["loss"] - models[0]["loss"]) < 10 * math.sqrt(model["kl"])
    # Four bits round much more than eight.
    least, most = {"int8": (1e-6, 2e-3), "nf4": (3e-3, 1.0)}[quantization]
    assert all(least < model["kl"] < most for model in models[1:])
    assert report["warnings"] == [line.removeprefix("warning: ") for line in printed.splitlines() if "warning" in line]
    assert not report["warnings"] or quantization == "nf4"


def test_the_numbers_are_those_of_the_formulas(small, rows, tmp_path):
    target = fitune.export(small, tmp_path / "out")
    one = fitune.load(small, device="cpu").model
    two = load_base(target, "fp32", torch.device("cpu"), "nf4").model
    model = merge_report.measure(small, target, rows).models[-1]
    loss = kl = changed = tokens = 0
    for row in rows:  # one by one, without padding
        ids = torch.tensor([list(row.input_ids)])
        learn = torch.tensor(list(row.learn[1:]), dtype=torch.bool)
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1][learn].double().softmax(-1) for m in (one, two))
        loss -= q.gather(1, ids[0, 1:][learn][:, None]).log().sum().item()
        kl += (p * (p / q).log()).sum().item()
        changed += (p.argmax(-1) != q.argmax(-1)).sum().item()
        tokens += int(learn.sum())
    assert model.loss == pytest.approx(loss / tokens, rel=1e-5)
    assert model.kl == pytest.approx(kl / tokens, rel=1e-2, abs=2e-7)
    assert model.changed == pytest.approx(changed / tokens, abs=1e-9)


def test_a_damaged_merge_is_noticed(small, rows, tmp_path):
    """The measurement looks at the folder that was written."""
    target = fitune.export(small, tmp_path / "out")
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] *= -1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    report = merge_report.measure(small, target, rows)
    assert report.models[1].loss > report.models[0].loss + merge_report.LOSS_LIMIT
    assert report.warnings[0].startswith("merged, fp32: rounding hurts, the loss rises by ")
    assert "serve the adapter on the base in nf4" in report.warnings[0]


def test_other_answers_are_warned_of_even_at_the_same_loss():
    first, *rest = (merge_report.Measured("as trained", 2.0, 0.0, 0.0, "cpu"),
                    merge_report.Measured("merged, bf16", 1.99, 0.03, 0.1, "cpu"),
                    merge_report.Measured("again", 2.005, 0.01, 0.1, "cpu"))  # fmt: skip
    (warning,) = merge_report._warnings([first, *rest], "nf4")
    assert warning.startswith("merged, bf16: answers will differ from the run's (KL divergence 0.0300 nats a token")
    assert warning.endswith(
        "by -0.0100 only; serve the adapter on the base in nf4, or train on model.quantization=none"
    )
    (warning,) = merge_report._warnings([first, rest[0]], "none")  # training on another base would change nothing
    assert warning.endswith("only; export it with --dtype fp32, or serve what was trained as it is")


def test_other_rows_no_rows_and_no_measurement(small, tmp_path, rows_file, capsys):
    where = str(tmp_path / "out")
    assert main(["export", str(small), "--to", where, "--data", str(rows_file)]) == 0
    assert "24 held-out rows" in capsys.readouterr().out
    shutil.rmtree(where)
    assert main(["export", str(small), "--to", where, "--no-measure"]) == 0
    assert capsys.readouterr().out == f"written: {where}\n"
    assert not (tmp_path / "out" / "merge_report.json").exists()
    shutil.rmtree(where)
    for options in (["--no-measure"], ["--form", "adapter"]):
        assert main(["export", str(small), "--to", where, "--data", "x.jsonl", *options]) == 2
        assert "nothing will be measured; leave it out" in capsys.readouterr().err
    with pytest.raises(DataError, match="does not exist"):
        merge_report.export_and_measure(small, tmp_path / "out", (str(tmp_path / "none.jsonl"),))
    assert not (tmp_path / "out").exists()


def test_a_full_precision_run_is_its_own_merge(tree, tmp_path, capsys):
    folder = run.train(build(tree), quiet=True).run
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    models = json.loads((tmp_path / "out" / "merge_report.json").read_text())["models"]
    assert [model["what"] for model in models] == ["adapter on the base in fp32, as trained", "merged, fp32"]
    assert abs(models[1]["kl"]) < 1e-6
    assert models[1]["changed"] == 0
    assert models[1]["loss"] == pytest.approx(evaluate_run(folder)["loss"], rel=1e-6)


def test_a_run_without_held_out_rows_says_so(tree, tmp_path, capsys):
    tree["data"]["eval"] = None
    folder = run.train(build(tree), quiet=True).run
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    written, why = capsys.readouterr().out.splitlines()
    assert written == f"written: {tmp_path / 'out'}"
    assert why.startswith("not measured: ")
    assert why.endswith("has no held-out rows (data.eval is not set); give files: --data FILE")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        merge_report.export_and_measure(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a run folder"):
        merge_report.export_and_measure(tmp_path / "none", tmp_path / "new")


def test_no_more_rows_than_logits_fit(small, rows, monkeypatch, tmp_path):
    target = fitune.export(small, tmp_path / "out")
    two = rows[0].num_supervised + rows[1].num_supervised
    monkeypatch.setattr(merge_report, "MAX_LOGITS", 128 * two)
    assert merge_report.measure(small, target, rows).rows == 2
    monkeypatch.setattr(merge_report, "MAX_LOGITS", 1)
    assert merge_report.measure(small, target, rows).rows == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_too_large_for_the_gpu_is_measured_on_cpu(small, rows, monkeypatch, tmp_path):
    target, load_base = fitune.export(small, tmp_path / "out"), merge_report.load_base

    def full(folder, dtype, device, quantization):
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        return load_base(folder, dtype, device, quantization)

    monkeypatch.setattr(merge_report, "load_base", full)
    models = merge_report.measure(small, target, rows).models
    assert [model.device.split(":")[0] for model in models] == ["cuda", "cpu", "cpu"]
