"""The command line: what it prints, what it refuses, and how it ends."""

import json

import pytest
import torch

from fitune import cli
from fitune.errors import ConfigError


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("words", "says"),
    [(["train"], "required: CONFIG\n"), (["plan", "my.yaml", "--lr", "1"], "settings are written section.key=value")],
)
def test_what_argparse_refuses(capsys, words, says):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("generate /none --prompt a", "run or model"),
        ("data rows.jsonl --model /none", "--model"),
        ("convert /none /to", "model"),
    ],
)
def test_what_is_not_there_has_the_name_it_was_given_by(capsys, words, name):
    code, _, error = run(capsys, *words.split())
    assert code == 2
    assert error.startswith(f"fitune: {name} '/none': no such folder")


def test_several_answers_are_told_apart(tiny, capsys):
    common = ("generate", tiny, "--max-new-tokens", 2, "--prompt", "one")
    _, alone, _ = run(capsys, *common)
    assert "> one" not in alone
    _, both, _ = run(capsys, *common, "--prompt", "two")
    assert both.startswith("> one\n")
    assert "\n\n> two\n" in both
    _, lines, _ = run(capsys, *common, "--prompt", "two", "--json")
    assert [json.loads(line)["prompt"] for line in lines.splitlines()] == ["one", "two"]


def test_a_system_message_and_raw_change_the_prompt(tiny, capsys, monkeypatch):
    from fitune.infer.load import Loaded

    asked = []
    monkeypatch.setattr(Loaded, "generate_many", lambda _, prompts, raw, **__: asked.append((prompts, raw)) or ["x"])
    run(capsys, "generate", tiny, "--prompt", "a", "--system", "be brief", "--repetition-penalty", 1.2)
    run(capsys, "generate", tiny, "--prompt", "a", "--raw")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    assert asked == [([turns], None), (["a"], True)]
    code, _, error = run(capsys, "generate", tiny, "--prompt", "a", "--raw", "--system", "b")
    assert code == 2
    assert "--system" in error


@pytest.mark.parametrize("value", ["nan", "-1", "1e-7", "inf"])
def test_a_bad_temperature_is_refused(tiny, capsys, value):
    code, _, error = run(capsys, "generate", tiny, "--prompt", "a", f"--temperature={value}")
    assert code == 2
    assert "--temperature" in error


@pytest.mark.parametrize("key", ["train", "data.eval"])
def test_data_files_are_no_setting(tiny, rows_file, capsys, key):
    code, _, error = run(capsys, "data", rows_file, "--model", tiny, "--set", f"{key}=other.jsonl")
    assert code == 2
    assert "the files are given on the command line" in error


@pytest.mark.parametrize("value", ["[" * 5000, "[1", "{a: b: c}"])
def test_a_setting_that_is_no_yaml_is_refused(tiny, rows_file, capsys, value):
    code, _, error = run(capsys, "data", rows_file, "--model", tiny, "--set", f"format={value}")
    assert code == 2
    assert "is no YAML" in error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()])
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_out_of_memory_is_explained(tiny, capsys, monkeypatch, error, command):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("fitune.infer.load.load", load)
    code, _, shown = run(capsys, command, tiny, *(["--prompt", "a"] if command == "generate" else []))
    assert code == 4
    assert "out of memory" in shown
    assert "Traceback" not in shown


def test_other_errors_are_not_hidden(tiny, monkeypatch):
    def load(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("fitune.infer.load.load", load)
    with pytest.raises(ZeroDivisionError):
        cli.main(["chat", str(tiny)])


def test_export_says_what_an_adapter_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "fitune's own for bitfit and freeze" in " ".join(capsys.readouterr().out.split())


def test_chat_with_an_adapter_folder_says_what_to_do(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, error = run(capsys, "chat", tmp_path)
    assert code == ConfigError.exit_code
    assert "is an adapter" in error
    assert "fitune export RUN" in error
