"""Continue from an adapter: of fitune, of PEFT; its settings are taken, what it stored is where training begins."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fitune
from fitune.cli import main
from fitune.config import build
from fitune.errors import CheckpointError, ConfigError
from fitune.methods import METHODS
from fitune.model.adapter import with_adapter
from fitune.model.load import CONVERTED, fingerprint, load_base
from fitune.plan.arch import read_arch
from fitune.training import run
from plan.shapes import TINY

FIRST = {
    "lora": {"name": "lora", "r": 3, "alpha": 5, "target_modules": ["k_proj", "down_proj"], "rslora": True},
    "pissa": {"name": "lora", "r": 4, "init": "pissa"},
    "whole": {"name": "lora", "r": 2, "modules_to_save": ["norm"], "dora": True},
    "ia3": {"name": "ia3", "target_modules": ["o_proj", "down_proj"]},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3, "projection": True},
    "freeze": {"name": "freeze", "patterns": ["*.mlp.*"], "also": ["norm"]},
}
NEXT = {"pissa": "lora", "whole": "lora", "ptuning": "prompt"}


@pytest.fixture(params=FIRST)
def first(request, tree, tmp_path):
    """(name, its run folder)."""
    tree["method"], tree["train"]["max_steps"], tree["output"] = (
        FIRST[request.param],
        2,
        {"dir": str(tmp_path / "first")},
    )
    run.train(build(tree), quiet=True)
    return request.param, tmp_path / "first"


def test_a_run_goes_on_from_another_one(first, tree, tmp_path, capsys):
    name, folder = first
    tree["method"] = {"name": NEXT.get(name, name), "adapter": str(folder)}
    tree["train"]["max_steps"], tree["output"] = 4, {"dir": str(tmp_path / "second")}
    second = run.train(build(tree)).run
    assert f"the run began with the adapter in {folder / 'adapter'}" in " ".join(capsys.readouterr().err.split())
    ends, begins = (json.loads((at / "result.json").read_text()) for at in (folder, second))
    assert begins["first_eval_loss"] == pytest.approx(ends["last_eval_loss"], rel=1e-5)
    one, two = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (folder, second))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    shutil.rmtree(folder)  # whoever opens or resumes the run does not need where it began
    assert fitune.load(second, device="cpu").generate("say 3", max_new_tokens=4) is not None
    shutil.rmtree(second / "checkpoints" / "step_000004")
    run.resume(second, quiet=True)
    again = load_file(second / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], two[key]) for key in two)


def test_the_plan_counts_what_the_adapter_has(tree, tmp_path, tiny, capsys):
    tree["method"], tree["train"]["max_steps"] = FIRST["lora"], 1
    folder = run.train(build(tree), quiet=True).run
    file = tmp_path / "next.yaml"
    file.write_text(f"model: {{path: {tiny}}}\nmethod: {{name: lora, adapter: {folder}}}\n")
    assert main(["params", str(file)]) == 0
    assert f"trains {2 * 3 * (64 + 32 + 96 + 64):,} of" in capsys.readouterr().out


def peft_adapter(base, folder, settings):
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        torch.manual_seed(3)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model


def test_pefts_own_adapters_are_continued(tree, tmp_path, tiny):
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, lora_dropout=0.5, target_modules="all-linear")
    peft_adapter(tiny, tmp_path / "peft", settings)
    tree["method"] = {"name": "lora", "adapter": str(tmp_path / "peft"), "dropout": 0.0, "target_modules": "linear"}
    arch = read_arch(json.loads((tiny / "config.json").read_text()))
    config = with_adapter(build(tree), arch).method
    assert (config.r, config.alpha, config.dropout, config.rslora) == (2, 6, 0.0, False)
    assert len(config.target_modules) == 14, "PEFT names every layer of every block"
    tree["train"] |= {"learning_rate": 1e-12, "max_steps": 1}
    folder = run.train(build(tree), quiet=True).run
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": r".*\.1\..*q_proj"}, "has a pattern for target_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, r"`layers_to_transform`: \[1\]"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "`bias`: 'all'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}}, "`alpha_pattern`"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "started as 'pissa', which changed the weights"),
    ],
)  # fmt: skip
def test_adapters_that_do_other_things_are_refused(tree, tmp_path, tiny, settings, message):
    import peft

    peft_adapter(tiny, tmp_path / "peft", peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    tree["method"] = {"name": "lora", "adapter": str(tmp_path / "peft")}
    with pytest.raises(ConfigError, match=message):
        with_adapter(build(tree), None)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_names_are_compared_by_what_they_name(tree, tmp_path, tiny, name):
    import peft

    if name == "lora":
        targets = ["q_proj", "v_proj"]
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, modules_to_save=["model.norm"])
    else:
        targets = ["k_proj", "v_proj", "down_proj"]
        settings = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=targets[-1:])
    peft_adapter(tiny, tmp_path / "peft", settings)
    arch = read_arch(json.loads((tiny / "config.json").read_text()))
    keyword = {"lora": "attention", "ia3": "default"}[name]
    tree["method"] = {"name": name, "adapter": str(tmp_path / "peft"), "target_modules": keyword}
    if name == "lora":
        tree["method"]["modules_to_save"] = ["norm"]
    assert set(with_adapter(build(tree), arch).method.target_modules) == set(targets)
    tree["method"]["target_modules"] = ["q_proj"]
    with pytest.raises(ConfigError, match=r"target_modules is \('q_proj',\), but the adapter"):
        with_adapter(build(tree), arch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules_to_save": ["norm"]}, r"modules_to_save is \('norm',\), but the adapter in .* has \(\)"),
        ({"new_tokens": ["<verse>"]}, r"new_tokens is \('<verse>',\), but the adapter in .* has \(\)"),
        ({"rslora": True}, "rslora is True, but the adapter in .* has False"),
        ({"alpha": 16}, "alpha is 16.0, but the adapter in .* has 8"),
    ],
)
def test_what_an_adapter_does_not_say_is_off(tree, tmp_path, given, message):
    """As in files of early releases of PEFT."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").touch()
    tree["method"] = {"name": "lora", "adapter": str(tmp_path), **given}
    with pytest.raises(ConfigError, match=message):
        with_adapter(build(tree), read_arch(TINY["llama"]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_that_was_trained_apart_is_refused(tree, tmp_path, tiny_qwen, names):
    import peft

    peft_adapter(tiny_qwen, tmp_path / "peft", peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=names))
    tree["method"] = {"name": "lora", "adapter": str(tmp_path / "peft")}
    arch = read_arch(json.loads((tiny_qwen / "config.json").read_text()))
    with pytest.raises(ConfigError, match=f"has a {names[0]} of its own, but embedding and head of this model are one"):
        with_adapter(build(tree), arch)
    if len(names) > 1:  # an architecture that is not known: found in the file
        config = with_adapter(build(tree), None).method
        model = METHODS["lora"].apply(load_base(tiny_qwen, "fp32", torch.device("cpu")), config)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differ, but in this model they are one"):
            METHODS["lora"].load(model, tmp_path / "peft")


def test_the_same_parameters_in_other_words(tree, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "FREEZE"}')
    (tmp_path / "adapter_model.safetensors").touch()
    recorded = {"num_layers": None, "patterns": [], "also": ["head", "norm"]}
    (tmp_path / "fitune.json").write_text(json.dumps({"settings": recorded}))
    tree["method"] = {"name": "freeze", "adapter": str(tmp_path), "num_layers": 2, "also": ["norm", "head"]}
    assert with_adapter(build(tree), None).method.num_blocks == 2
    tree["method"]["num_layers"] = 1
    with pytest.raises(ConfigError, match="num_layers is 1, but the adapter in .* has 2"):
        with_adapter(build(tree), None)


def test_a_converted_base_is_the_base(tree, tmp_path, tiny):
    tree["train"]["max_steps"] = 1
    tree["method"]["adapter"] = str(run.train(build(tree), quiet=True).run)
    same = shutil.copytree(tiny, tmp_path / "converted")
    tensors = load_file(tiny / "model.safetensors")
    save_file(tensors, same / "model.safetensors", metadata={"format": "pt", "written": "again"})
    tree["model"]["path"], tree["output"] = str(same), {"dir": str(tmp_path / "next")}
    with pytest.raises(CheckpointError, match="trained on other weights"):
        run.train(build(tree), quiet=True)
    facts = {
        f"{key}fingerprint": fingerprint(at, ("model.safetensors",)) for key, at in (("", same), ("source_", tiny))
    }
    (same / CONVERTED).write_text(json.dumps(facts))
    run.train(build(tree), quiet=True)


def test_a_damaged_adapter_is_found_before_the_model_is_read(tree, tmp_path, monkeypatch):
    tree["train"]["max_steps"] = 1
    folder = run.train(build(tree), quiet=True).run
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    tree["method"]["adapter"], tree["output"] = str(folder), {"dir": str(tmp_path / "next")}
    monkeypatch.setattr(run, "load_base", lambda *_: pytest.fail("read the model"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        run.train(build(tree), quiet=True)
    (folder / "adapter" / "fitune.json").write_text('{"settings": null}')
    with pytest.raises(CheckpointError, match="`settings` is no JSON object"):
        run.train(build(tree), quiet=True)


def test_a_network_cannot_be_continued(tree, tmp_path):
    tree["method"] = FIRST["ptuning"]
    tree["train"]["max_steps"] = 1
    folder = run.train(build(tree), quiet=True).run
    tree["method"] = {"name": "ptuning", "adapter": str(folder)}
    with pytest.raises(ConfigError, match=r"not the network that made them\. Use method\.name=prompt"):
        with_adapter(build(tree), None)
