"""Runs that are stopped, moved, continued or damaged in awkward moments."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fitune
from fitune.config import RunConfig, build
from fitune.errors import CheckpointError, ConfigError, DataError, Interrupted
from fitune.training import evaluate, loop, optim, path, run
from fitune.training.path import PlainPath
from tiny import make_model, make_rows

CLOCK = {"seconds", "memory_bytes"}


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def go(tree, **train):
    tree["train"] |= train
    return run.train(build(tree), quiet=True)


@pytest.mark.parametrize("moment", [1, 2, 5, 7])
def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(tree, tmp_path, monkeypatch, moment):
    """The 1st to 3rd batches are the evaluation before step 1, the 5th and 7th later ones."""
    tree["train"]["path"] = "plain"  # which is patched below
    tree["output"]["dir"] = str(tmp_path / "whole")
    go(tree)
    tree["output"]["dir"] = str(tmp_path / "run")
    real, calls = PlainPath.loss, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(path.PlainPath, "loss", stopping)
        with pytest.raises(Interrupted):
            go(tree)
    run.resume(tmp_path / "run", quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_reader_that_goes_away_does_not_end_the_run(tree, tmp_path):
    """`fitune train ... | head -1`; nothing is shown any more, and the run is as it would have been."""
    file = tmp_path / "run.yaml"
    tree["train"]["max_steps"] = 200
    file.write_text(json.dumps(tree))
    source = str(Path(run.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source, "FORCE_COLOR": "1"}
    command = [sys.executable, "-m", "fitune", "train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    for line in process.stdout:
        if line.startswith(b"step "):
            break
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    assert rows_of(tmp_path / "run")[-1]["step"] == 200


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes(tree, tmp_path, monkeypatch, ignored):
    """SIGHUP saves and stops; under nohup it is not even noticed."""
    real, calls = optim.MasterOptimizer.step, []

    def stopping(self, rate):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return real(self, rate)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(optim.MasterOptimizer, "step", stopping)
            if ignored:
                go(tree)
            else:
                with pytest.raises(Interrupted, match="stopped by SIGHUP after step 3 of 6"):
                    go(tree)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_best_step_that_could_not_be_saved_is_not_published(tree, tmp_path, monkeypatch):
    real = loop.save

    def failing(session, state):
        if state.step == 1:
            raise CheckpointError("disk: full")
        real(session, state)

    monkeypatch.setattr(loop, "save", failing)
    result = go(tree, learning_rate=3.0, schedule="constant", eval_every_steps=1)
    evals = {row["step"]: row["loss"] for row in rows_of(result.run) if row["kind"] == "eval" and row["step"]}
    assert min(evals, key=evals.get) == 1, "the test needs its best step to be the lost one"
    assert result.best_step > 1
    assert (result.run / "checkpoints" / f"step_{result.best_step:06d}").is_dir()


def test_a_damaged_best_step_is_not_published(tree, tmp_path):
    result = go(tree, learning_rate=3.0, schedule="constant", max_steps=8, eval_every_steps=1, save_every_steps=1)
    assert result.best_step < 8
    best = result.run / "checkpoints" / f"step_{result.best_step:06d}"
    weights = best / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    again = run.resume(result.run, ["train.keep_checkpoints=3"], quiet=True)
    assert again.best_step == 8
    assert "adapter_model.safetensors" in (result.run / "log.txt").read_text()
    last = result.run / "checkpoints" / "step_000008" / "adapter" / "adapter_model.safetensors"
    assert adapter(result.run) == last.read_bytes()


def test_a_setting_given_before_the_first_checkpoint_is_recorded(tree, tmp_path):
    go(tree)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "adapter")
    run.resume(tmp_path / "run", ["method.r=8"], quiet=True)
    assert "r: 8" in (tmp_path / "run" / "config.yaml").read_text()
    fitune.load(tmp_path / "run", device="cpu")


def test_resuming_a_finished_run_changes_nothing(tree, tmp_path):
    result = go(tree)
    before = {file: file.read_bytes() for file in result.run.rglob("*") if file.is_file() and file.name != "log.txt"}
    again = run.resume(result.run, quiet=True)
    assert again == result
    after = {file: file.read_bytes() for file in result.run.rglob("*") if file.is_file() and file.name != "log.txt"}
    assert {f: b for f, b in after.items() if f.name != "run.lock"} == {
        f: b for f, b in before.items() if f.name != "run.lock"
    }


@pytest.mark.parametrize(
    ("override", "message"), [("train.max_steps=3", "is at step 6, but"), ("output.dir=elsewhere", "stays where it is")]
)
def test_settings_that_cannot_be_applied_are_refused(tree, override, message):
    result = go(tree)
    with pytest.raises(ConfigError, match=message):
        run.resume(result.run, [override], quiet=True)


def test_a_run_opens_from_any_folder_and_after_a_move(tree, tmp_path, monkeypatch, tiny):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(tiny, work / "model")
    make_rows(work / "rows.jsonl")
    monkeypatch.chdir(work)
    tree["model"]["path"], tree["data"]["train"], tree["output"]["dir"] = "model", ["rows.jsonl"], "runs/a"
    go(tree)
    monkeypatch.chdir(tmp_path)
    moved = shutil.move(work / "runs" / "a", tmp_path / "moved")
    assert run.resume(moved, ["train.max_steps=8"], quiet=True).step == 8
    assert fitune.load(moved, device="cpu").config.output.dir == str(tmp_path / "moved")
    assert evaluate.evaluate_run(moved)["rows"] > 0
    shutil.move(work / "rows.jsonl", tmp_path / "elsewhere.jsonl")
    assert run.resume(moved, ["train.max_steps=9", f"data.train={tmp_path}/elsewhere.jsonl"], quiet=True).step == 9


def test_evaluating_changed_data_is_refused(tree, tmp_path):
    tree["data"]["train"] = [str(make_rows(tmp_path / "own.jsonl"))]
    result = go(tree)
    make_rows(tmp_path / "own.jsonl", 30)
    with pytest.raises(DataError, match="the data files changed since training"):
        evaluate.evaluate_run(result.run)


def test_raw_text_with_a_template_that_cannot_be_is_refused_before_training(tree, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": "say " * i}) + "\n" for i in range(2, 12)))
    tree["data"] = {"train": [str(file)], "template": "chatml", "max_length": 64}
    with pytest.raises(ConfigError, match="special tokens"):
        go(tree)
    assert not (tmp_path / "run").exists()


def test_a_nan_loss_does_not_cost_the_loss_scale(tree, tmp_path, monkeypatch, rows_file):
    tree["train"]["path"] = "plain"  # which is patched below
    real = PlainPath.loss_and_grad

    def poisoned(self, batch, scale):
        loss = real(self, batch, scale)
        return loss * float("nan") if f"{rows_file}:5" in batch.sources else loss

    monkeypatch.setattr(path.PlainPath, "loss_and_grad", poisoned)
    tree["model"]["dtype"], tree["data"]["eval"] = "fp16", None
    result = go(tree)
    scales = [row["loss_scale"] for row in rows_of(result.run) if row["kind"] == "train"]
    assert scales == [65536.0] * 5


def test_a_run_gives_the_process_back_as_it_was(tree):
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    try:
        result = go(tree)
        run.resume(result.run, ["train.max_steps=7"], quiet=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == threads
    finally:
        torch.use_deterministic_algorithms(False)


def test_python_takes_mappings_and_bare_configurations(tree, tmp_path):
    result = fitune.train(tree, ["train.max_steps=2"], quiet=True)
    assert result.step == 2
    bare = RunConfig.model_validate(tree | {"output": {"dir": str(tmp_path / "bare")}, "train": {"max_steps": 1}})
    assert fitune.train(bare, quiet=True).step == 1
    with pytest.raises(ConfigError, match="section.key=value"):
        fitune.train(tree, ["nonsense"], quiet=True)


def test_a_positional_model_shorter_than_a_sample_trains(tree, tmp_path):
    """Learned positions end; prompt and answer of a sample must fit them."""
    tree["model"]["path"] = str(make_model(tmp_path / "gpt2", "gpt2"))
    tree["method"]["target_modules"] = ["c_fc"]
    tree["data"] |= {"max_length": 256}
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        assert go(tree).step == 6


def test_a_full_run_stands_alone_and_stops(tree, tmp_path, tiny):
    """Its model/ folder answers in plain transformers, and through fitune when the base is gone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree["model"]["path"] = str(shutil.copytree(tiny, tmp_path / "base"))
    tree["method"] = {"name": "full"}
    result = go(tree, max_steps=80, learning_rate=5e-3, eval_every_steps=80, save_every_steps=80, global_batch_rows=8)
    shutil.rmtree(tmp_path / "base")
    answer = fitune.load(result.run, device="cpu").generate("say 3", max_new_tokens=40)
    model = AutoModelForCausalLM.from_pretrained(result.run / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.run / "model")
    assert model.config.use_cache
    turns = [{"role": "user", "content": "say 3"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(out, skip_special_tokens=True) == answer
