"""Whole runs on a tiny model: what they leave behind, how they stop, resume, refuse, survive bad numbers."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from fitune.config import build
from fitune.errors import CheckpointError, ConfigError, DivergedError, Interrupted, OutOfMemoryError
from fitune.training import loop, path, run
from fitune.training.path import PlainPath
from tiny import make_rows

CLOCK = {"seconds", "memory_bytes"}


def metrics(folder, kind="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows if row["kind"] == kind]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def go(tree, **changes):
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return run.train(build(tree), quiet=True)


def test_a_run_leaves_everything_behind(tree, tmp_path):
    result = go(tree)
    folder = tmp_path / "run"
    assert result.step == 6
    assert result.run == folder
    names = {file.name for file in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "samples.json",
        "result.json",
        "report.html",
        "adapter",
        "checkpoints",
    }
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics(folder, "eval")] == [0, 3, 6]
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"]
    assert result.best_eval_loss < result.first_eval_loss
    stored = json.loads((folder / "result.json").read_text())
    assert stored["status"] == "done"
    assert torch.__version__.startswith(stored["versions"]["torch"].partition("+")[0])
    samples = json.loads((folder / "samples.json").read_text())
    assert samples
    assert all(set(s) >= {"prompt", "reference", "before", "after"} for s in samples)
    kept = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert len(kept) <= 3
    assert kept[-1] == "step_000006"


def test_two_runs_are_bit_identical(tree, tmp_path):
    go(tree, method__dropout=0.2)
    go(tree, output__dir=str(tmp_path / "again"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "again")


def test_both_paths_take_the_same_steps(tree, tmp_path):
    """Several updates of several micro steps, an evaluation between them: losses and gradient norms of every update."""
    steps = {}
    for name in ("plain", "fast"):
        tree["output"]["dir"] = str(tmp_path / name)
        go(tree, train__path=name, train__micro_batch_rows=1, train__max_grad_norm=0.5)
        steps[name] = metrics(tmp_path / name)
    for key in ("loss", "grad_norm"):
        plain, fast = ([row[key] for row in steps[name]] for name in ("plain", "fast"))
        assert fast == pytest.approx(plain, rel=1e-4)
    assert metrics(tmp_path / "fast", "eval")[-1]["loss"] == pytest.approx(
        metrics(tmp_path / "plain", "eval")[-1]["loss"], rel=1e-4
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_repeats_the_fast_path_s_dropout(tree, tmp_path, recompute):
    tree["method"]["target_modules"] = "linear"
    go(tree, method__dropout=0.2, train__path="fast", train__activation_checkpointing=recompute)
    whole = tmp_path / "run"
    half = shutil.copytree(whole, tmp_path / "half")
    for step in (half / "checkpoints").iterdir():
        if step.name > "step_000004":
            shutil.rmtree(step)
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(whole)
    assert metrics(half, "eval") == metrics(whole, "eval")
    assert adapter(half) == adapter(whole)
    go(tree, method__dropout=0.0, output__dir=str(tmp_path / "without"))
    assert metrics(tmp_path / "without") != metrics(whole)


def test_cutting_a_step_into_micro_batches_changes_nothing(tree, tmp_path):
    """8 = 8x1 = 4x2 = packed, to rounding."""
    curves = []
    for i, change in enumerate(
        [
            {"train__micro_batch_rows": 8},
            {"train__micro_batch_rows": 1},
            {"train__micro_batch_rows": 3},
            {"train__micro_batch_rows": None, "train__micro_batch_tokens": 100, "data__packing": True},
        ]
    ):
        go(tree, train__global_batch_rows=8, output__dir=str(tmp_path / str(i)), **change)
        curves.append([row["loss"] for row in metrics(tmp_path / str(i))])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "method", "path"),
    [("tiny_qwen", "full", "plain"), ("tiny_qwen", "bitfit", "fast"), ("tiny_bloom", "bitfit", "fast")],
)
def test_other_methods_run_and_resume(tree, tmp_path, request, family, method, path):
    tree["method"] = {"name": method}
    tree["model"] = {"path": str(request.getfixturevalue(family)), "dtype": "bf16"}
    go(tree, train__path=path)
    whole = tmp_path / "run"
    half = shutil.copytree(whole, tmp_path / "half")
    for step in (half / "checkpoints").iterdir():
        if step.name > "step_000004":
            shutil.rmtree(step)
    run.resume(half, quiet=True)
    assert metrics(half) == metrics(whole)
    folder, file = ("model", "model.safetensors") if method == "full" else ("adapter", "adapter_model.safetensors")
    one, two = (load_file(f / folder / file) for f in (whole, half))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_saves_and_the_resumed_run_is_the_same(tree, tmp_path, monkeypatch):
    tree["train"]["path"] = "plain"  # which is patched below
    go(tree, output__dir=str(tmp_path / "whole"))
    real = PlainPath.loss_and_grad
    calls = []

    def stopping(self, batch, scale):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, scale)

    with monkeypatch.context() as patch:
        patch.setattr(path.PlainPath, "loss_and_grad", stopping)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 3 of 6.*fitune resume"):
            go(tree, output__dir=str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    run.resume(tmp_path / "run", quiet=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "run", "eval") == metrics(tmp_path / "whole", "eval")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_the_best_held_out_step_is_published(tree, tmp_path):
    """A rate that ruins the model after the first evaluation: the last step is not the best."""
    result = go(
        tree, train__learning_rate=3.0, train__max_steps=9, train__schedule="constant", train__eval_every_steps=1
    )
    evals = {row["step"]: row["loss"] for row in metrics(result.run, "eval") if row["step"]}
    best = min(evals, key=evals.get)
    assert result.best_step == best < 9
    stored = result.run / "checkpoints" / f"step_{best:06d}" / "adapter" / "adapter_model.safetensors"
    assert stored.read_bytes() == adapter(result.run)


def poison(monkeypatch, bad, value="loss"):
    """Make the named calls of loss_and_grad return NaN, or put one NaN into one gradient."""
    real = PlainPath.loss_and_grad

    def poisoned(self, batch, scale):
        loss = real(self, batch, scale)
        if not bad(batch):
            return loss
        if value == "loss":
            return loss * float("nan")
        next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(path.PlainPath, "loss_and_grad", poisoned)


@pytest.mark.parametrize("value", ["loss", "gradient"])
def test_a_bad_row_is_named_and_its_step_not_applied(tree, tmp_path, monkeypatch, rows_file, value):
    tree["train"]["path"] = "plain"  # which is patched below
    poison(monkeypatch, lambda batch: f"{rows_file}:5" in batch.sources, value)
    result = go(tree, data__eval=None)  # 24 rows in 6 steps of 4: each row once
    skipped = metrics(result.run, "skipped")
    assert len(skipped) == 1
    assert all(row["rows"] == [f"{rows_file}:5"] for row in skipped)
    assert skipped[0]["reason"] == f"non-finite {value}"
    assert len(metrics(result.run)) + len(skipped) == 6
    assert all(
        torch.isfinite(t).all() for t in load_file(result.run / "adapter" / "adapter_model.safetensors").values()
    )


def test_repeated_bad_steps_stop_the_run(tree, tmp_path, monkeypatch):
    tree["train"]["path"] = "plain"  # which is patched below
    seen = []
    poison(monkeypatch, lambda batch: seen.append(1) or len(seen) > 4)
    with pytest.raises(DivergedError, match=r"3 steps in a row.*Lower train.learning_rate"):
        go(tree)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "diverged"
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(file).values() if t.is_floating_point())


def test_an_applied_change_takes_effect(tree, tmp_path):
    go(tree, train__schedule="constant")
    result = run.resume(tmp_path / "run", ["train.max_steps=8", "train.learning_rate=0.005"], quiet=True)
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run")]
    assert rates == [0.01] * 6 + [0.005] * 2
    assert result.step == 8
    assert "learning_rate: 0.005" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "override",
    ["method.r=8", "train.seed=1", "train.global_batch_rows=8", "data.max_length=32", "train.optimizer_dtype=bf16"],
)
def test_a_change_that_makes_another_run_is_refused(tree, tmp_path, override):
    go(tree)
    with pytest.raises(ConfigError, match=f"cannot be resumed with {override.partition('=')[0]}"):
        run.resume(tmp_path / "run", [override], quiet=True)


def test_changed_data_is_refused(tree, tmp_path):
    tree["data"]["train"] = [str(make_rows(tmp_path / "own.jsonl"))]
    go(tree)
    make_rows(tmp_path / "own.jsonl", 20)
    with pytest.raises(CheckpointError, match="the data .* changed"):
        run.resume(tmp_path / "run", ["train.max_steps=8"], quiet=True)


def test_another_base_is_refused(tree, tmp_path, tiny):
    from tiny import make_model

    tree["model"]["path"] = str(shutil.copytree(tiny, tmp_path / "base"))
    go(tree)
    shutil.rmtree(tmp_path / "base")
    make_model(tmp_path / "base", seed=1)
    with pytest.raises(CheckpointError, match="the base model's weights changed"):
        run.resume(tmp_path / "run", ["train.max_steps=8"], quiet=True)


def test_a_changed_base_configuration_is_noticed(tree, tmp_path, tiny):
    tree["model"]["path"] = str(shutil.copytree(tiny, tmp_path / "base"))
    go(tree)
    file = tmp_path / "base" / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"use_cache": False, "transformers_version": "4.40.0"}))
    run.resume(tmp_path / "run", ["train.max_steps=7"], quiet=True)
    file.write_text(json.dumps(before | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"config.json changed .*\(rms_norm_eps: 1e-0\d -> 0.001\)"):
        run.resume(tmp_path / "run", ["train.max_steps=8"], quiet=True)


def test_a_damaged_newest_checkpoint_falls_back(tree, tmp_path):
    go(tree, output__dir=str(tmp_path / "whole"))
    go(tree, output__dir=str(tmp_path / "run"))
    newest = tmp_path / "run" / "checkpoints" / "step_000006" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    run.resume(tmp_path / "run", quiet=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_an_existing_run_is_not_overwritten(tree, tmp_path):
    go(tree)
    before = adapter(tmp_path / "run")
    with pytest.raises(ConfigError, match="fitune resume"):
        go(tree)
    assert adapter(tmp_path / "run") == before
    run.train(build(tree), quiet=True, replace=True)


def test_a_run_without_checkpoint_starts_over(tree, tmp_path):
    go(tree, output__dir=str(tmp_path / "whole"))
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "adapter")
    run.resume(folder, quiet=True)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_out_of_memory_says_what_to_do(tree, monkeypatch):
    tree["train"]["path"] = "plain"  # which is patched below

    def full(self, batch, scale):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(path.PlainPath, "loss_and_grad", full)
    with pytest.raises(
        OutOfMemoryError, match=r"halve train.micro_batch_rows \(now 2.*activation_checkpointing=true.*fitune resume"
    ):
        go(tree)


def test_out_of_memory_while_loading(tree, tmp_path, monkeypatch):
    def full(folder, dtype, device, quantization):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(run, "load_base", full)
    with pytest.raises(
        OutOfMemoryError, match=r"while loading the model: CUDA out of memory.*raise memory.budget \(now 3 GB"
    ):
        run.train(build(tree | {"memory": {"budget": 3}}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_during_a_save_does_not_stop_training(tree, tmp_path, monkeypatch):
    real, calls = loop.save, []

    def failing(session, state):
        calls.append(state.step)
        if state.step == 2:
            raise CheckpointError("no space left on disk")
        real(session, state)

    monkeypatch.setattr(loop, "save", failing)
    assert go(tree).step == 6
    assert calls[:2] == [2, 3]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_on_cpu_learns_like_fp32(tree, tmp_path, dtype):
    """20 steps with padded batches and pad = eos: the tutorial's fp16 trap."""
    tokenizer = tmp_path / "base"
    shutil.copytree(tree["model"]["path"], tokenizer)
    file = tokenizer / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<eos>"}))
    losses = {}
    for name in ("fp32", dtype):
        tree["model"] = {"path": str(tokenizer), "dtype": name}
        go(tree, train__max_steps=20, train__eval_every_steps=20, output__dir=str(tmp_path / name))
        losses[name] = metrics(tmp_path / name, "eval")[-1]["loss"]
    assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.02)
    assert metrics(tmp_path / dtype, "skipped") == []


def test_activation_checkpointing_changes_nothing(tree, tmp_path):
    go(tree, method__dropout=0.1, output__dir=str(tmp_path / "a"))
    go(tree, train__activation_checkpointing=True, output__dir=str(tmp_path / "b"))
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_packing_is_refused_for_a_model_that_mixes_documents(tree, tmp_path):
    from tiny import make_model

    tree["model"]["path"] = str(make_model(tmp_path / "mpt", "mpt"))
    tree["train"]["micro_batch_rows"] = None
    with pytest.raises(ConfigError, match="lets packed rows see each other"):
        go(tree, data__packing=True, method__target_modules="linear")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__train": []}, "data.train is not set"),
        ({"data__max_length": 1000}, "this model has 256 positions"),
        ({"train__device": "cuda"}, "no CUDA device"),
        ({"model__path": "/none"}, "no such folder"),
    ],
)
def test_refusals_before_anything_is_written(tree, tmp_path, change, message):
    if "train__device" in change and torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(ConfigError, match=message):
        go(tree, **change)
    assert not (tmp_path / "run").exists()
