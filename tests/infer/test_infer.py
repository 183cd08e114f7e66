"""Generation, loading, chat, export: what leaves fitune answers the same elsewhere, and stops."""

import io
import json
import shutil
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fitune
from fitune.config import build
from fitune.errors import CheckpointError, ConfigError
from fitune.infer.chat import chat
from fitune.infer.generate import Sampling, generate
from fitune.training import run
from fitune.training.evaluate import evaluate_run
from tiny import make_model


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny, rows_file):
    """A tiny model that has learnt the rows by full fine-tuning; the base of the adapter below."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    run.train(configuration(tiny, rows_file, folder, {"name": "full"}, 120), quiet=True)
    return folder / "model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, taught, rows_file):
    """A LoRA run on it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    method = {"name": "lora", "r": 8, "target_modules": "linear"}
    run.train(configuration(taught, rows_file, folder, method, 40), quiet=True)
    return folder


def configuration(base, rows_file, folder, method, steps):
    train = {"max_steps": steps, "global_batch_rows": 8, "micro_batch_rows": 8, "learning_rate": 5e-3}
    return build(
        {
            "model": {"path": str(base), "dtype": "fp32"},
            "method": method,
            "data": {"train": [str(rows_file)], "eval": 0.2, "template": "tutorial", "max_length": 64},
            "train": {**train, "eval_every_steps": steps // 2, "save_every_steps": steps, "device": "cpu"},
            "output": {"dir": str(folder)},
        }
    )


def test_answers_stop_by_themselves(trained):
    model = fitune.load(trained, device="cpu")
    ids = [model.prompt_ids("say 3"), model.prompt_ids("say 5\nxx")]
    answers = generate(model.model, ids, model.tokenizer.stop_ids, Sampling(max_new_tokens=60))
    assert all(answer.stopped for answer in answers)
    assert all("春山" in model.tokenizer.decode(answer.ids) for answer in answers)


def test_a_batch_answers_like_single_prompts(trained):
    model = fitune.load(trained, device="cpu")
    prompts = ["say 1", "say 2\nxxxx", "say 4\nx"]
    assert model.generate_many(prompts, max_new_tokens=30) == [model.generate(p, max_new_tokens=30) for p in prompts]


def test_a_stream_is_the_answer_in_pieces(trained):
    model = fitune.load(trained, device="cpu")
    pieces = list(model.stream("say 3", max_new_tokens=30))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate("say 3", max_new_tokens=30)


def test_sampling_is_seeded(trained):
    model = fitune.load(trained, device="cpu")
    first, second = (model.generate("say 3", temperature=2.0, seed=5, max_new_tokens=20) for _ in range(2))
    assert first == second
    assert model.generate("say 3", temperature=2.0, seed=6, max_new_tokens=20) != first


def test_chat_keeps_the_conversation(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("say 3\n\n/reset\nsay 3\n/quit\n"))
    chat(fitune.load(trained, device="cpu"), None, {"max_new_tokens": 20})
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_exported_folders_answer_and_stop_in_plain_transformers(trained, tmp_path, taught, form):
    target = fitune.export(trained, tmp_path / "out", form=form)
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(target)
    else:
        import peft

        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(taught), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    turns = [{"role": "user", "content": "say 3"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ours = fitune.load(trained, device="cpu")
    assert ids["input_ids"][0].tolist() == ours.prompt_ids("say 3")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)[0][ids["input_ids"].shape[1] :].tolist()
    assert out[-1] == tokenizer.eos_token_id
    assert len(out) < 40
    assert tokenizer.decode(out, skip_special_tokens=True) == ours.generate("say 3", max_new_tokens=40)
    if form == "merged":
        stops = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
        assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_a_merged_export_is_a_base_for_the_next_run(trained, tmp_path):
    target = fitune.export(trained, tmp_path / "out")
    again = fitune.load(target, device="cpu")
    assert again.generate("say 3", max_new_tokens=40) == fitune.load(trained, device="cpu").generate(
        "say 3", max_new_tokens=40
    )


def test_export_does_not_overwrite(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        fitune.export(trained, tmp_path / "out")
    with pytest.raises(ConfigError, match="not a run folder"):
        fitune.export(fitune.load(trained).base.folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_eval_gives_the_held_out_loss_of_the_best_step(trained):
    stored = json.loads((trained / "result.json").read_text())
    assert evaluate_run(trained)["loss"] == pytest.approx(stored["best_eval_loss"], rel=1e-5)


def test_eval_of_other_files(trained, rows_file):
    assert evaluate_run(trained, (str(rows_file),))["rows"] == 24


def test_an_adapter_on_another_base_is_refused(trained, tmp_path, taught):
    folder = shutil.copytree(trained, tmp_path / "run")
    other = make_model(tmp_path / "other", seed=1)
    config = (folder / "config.yaml").read_text().replace(str(taught), str(other))
    (folder / "config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        fitune.load(folder)


def test_an_unfinished_run_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    with pytest.raises(ConfigError, match=r"has no result yet.*fitune resume"):
        fitune.load(folder)


def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_read(tiny, tmp_path):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        fitune.load(tmp_path)


def test_generation_leaves_training_mode_alone(trained):
    model = fitune.load(trained, device="cpu").model
    model.train()
    generate(model, [[5, 6]], [2], Sampling(max_new_tokens=2))
    assert model.training
    assert torch.is_grad_enabled()
