"""Runs as they are found later: the base gone or odd, trained on raw text; exports that other tools load."""

import io
import json
import shutil
import sys
import warnings

import pytest
from safetensors import SafetensorError

import fitune
from fitune.config import build
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.chat import HELP, chat
from fitune.model import weights
from fitune.training import run
from tiny import make_model

INVALID = {"temperature": 0.7, "top_p": 0.9, "do_sample": False, "eos_token_id": [2, 5]}


def train(folder, base, rows, method):
    tree = {
        "model": {"path": str(base), "dtype": "fp32"},
        "method": {"name": method},
        "data": {"train": [str(rows)], "template": "tutorial", "max_length": 64},
        "train": {"max_steps": 1, "device": "cpu", "learning_rate": 1e-3},
        "output": {"dir": str(folder / f"run-{method}")},
    }
    run.train(build(tree), quiet=True)
    return folder / f"run-{method}"


@pytest.fixture
def base(tmp_path):
    """A base whose generation_config.json contradicts itself, as some published ones do."""
    folder = make_model(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps(INVALID))
    return folder


@pytest.fixture(scope="module")
def raw_run(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("raw")
    rows = folder / "texts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"a text {i}"}) for i in range(8)))
    return train(folder, tiny, rows, "lora")


def test_full_fine_tuning_needs_no_base(base, tmp_path, rows_file):
    folder = train(tmp_path, base, rows_file, "full")
    before = fitune.load(folder, device="cpu").generate("say 3", max_new_tokens=8)
    shutil.rmtree(base)
    assert fitune.load(folder, device="cpu").generate("say 3", max_new_tokens=8) == before
    target = fitune.export(folder, tmp_path / "out")
    assert fitune.load(target, device="cpu").generate("say 3", max_new_tokens=8) == before


def test_a_base_with_an_invalid_generation_config_is_exported(base, tmp_path, rows_file):
    folder = train(tmp_path, base, rows_file, "lora")
    target = fitune.export(folder, tmp_path / "out")
    written = json.loads((target / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"], written["bos_token_id"]) == ([2, 5], 0, 1)
    assert "temperature" not in written
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_exported_adapter_finds_its_base(base, tmp_path, rows_file, monkeypatch):
    import peft

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
    monkeypatch.chdir(tmp_path)
    folder = train(tmp_path, "base", rows_file, "lora")
    target = fitune.export(folder, tmp_path / "out", form="adapter")
    assert (target / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    monkeypatch.chdir("/")
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert peft.AutoPeftModelForCausalLM.from_pretrained(target) is not None


def test_a_full_disk_is_explained(raw_run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        fitune.export(raw_run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(raw_run, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"form is 'gguf'; allowed: merged, adapter"):
        fitune.export(raw_run, tmp_path / "out", form="gguf")
    with pytest.raises(ConfigError, match="leave dtype out"):
        fitune.export(raw_run, tmp_path / "out", form="adapter", dtype="bf16")
    with pytest.raises(ConfigError, match=r"device is 'gpu'; allowed: auto, cpu, cuda"):
        fitune.load(tiny, device="gpu")
    with pytest.raises(ConfigError, match=r"dtype is 'float16'; allowed: fp32, fp16, bf16"):
        fitune.load(tiny, dtype="float16")
    with pytest.raises(ConfigError, match=f"run it belongs to: {raw_run}"):
        fitune.load(raw_run / "adapter")


def test_a_run_on_text_continues_text(raw_run, tiny):
    model = fitune.load(raw_run, device="cpu")
    assert model.raw
    assert not fitune.load(tiny, device="cpu").raw
    assert model.prompt_ids("a text") == [*model.tokenizer.prefix_ids, *model.tokenizer.encode("a text")]
    assert model.prompt_ids("a text", raw=False) == fitune.load(tiny, device="cpu").prompt_ids("a text")
    answer = model.generate("a text", max_new_tokens=8)
    assert "".join(model.stream("a text", max_new_tokens=8)) == answer


def test_chat_continues_text(raw_run, monkeypatch, capsys):
    model = fitune.load(raw_run, device="cpu")
    monkeypatch.setattr("sys.stdin", io.StringIO("a text\na text\n"))
    chat(model, None, {"max_new_tokens": 8})
    assert capsys.readouterr().out == 2 * (model.generate("a text", max_new_tokens=8) + "\n")
    with pytest.raises(ConfigError, match="trained on text"):
        chat(model, "be brief", {})


def test_unknown_commands_get_help(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/rest\n/quit\n"))
    chat(fitune.load(tiny, device="cpu"), None, {})
    assert capsys.readouterr().out.splitlines() == [HELP, HELP]


def test_chat_outlives_a_prompt_that_is_too_long(tiny, monkeypatch, capsys):
    lines = iter(["x" * 300, "hi", "/quit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat(fitune.load(tiny, device="cpu"), None, {"max_new_tokens": 2})
    shown = capsys.readouterr()
    assert "256 positions" in shown.err
    assert "Traceback" not in shown.err
