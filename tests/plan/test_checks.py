"""What cannot work is refused from config.json alone: `plan` and `train` say the same, and no weight is read."""

import json
import shutil

import pytest

from fitune.cli import main
from fitune.config import build
from fitune.engine.path import EnginePath
from fitune.engine.spec import Unsupported
from fitune.errors import ConfigError
from fitune.plan.arch import read_arch
from fitune.plan.checks import check_run, known_arch, plain_path_problem, plain_reason
from fitune.training import run
from methods.cases import KINDS, apply, make_family
from plan.shapes import TINY

PREFIX = {"name": "prefix"}
RECOMPUTED = "hands its keys and values to transformers in a cache"
REFUSED = [
    ({"name": "bitfit"}, {}, r"has none; use method\.name=lora"),
    *((PREFIX, {"train": {"activation_checkpointing": setting, "path": "plain"}}, RECOMPUTED)
      for setting in (True, "full", "attention", "offload")),
    *(({"name": name}, {"data": {"packing": True}, "train": {"path": "plain"}},
       f"method.name={name} puts virtual tokens in front of each sequence")
      for name in ("prompt", "ptuning", "prefix")),
    (PREFIX, {"data": {"max_length": 250}}, r"max_length \(250\) and method.num_virtual_tokens \(20\) together"),
    ({"name": "ia3"}, {"data": {"max_length": 257}}, r"has 256 positions; set data\.max_length=256 or less"),
    ({"name": "full"}, {"train": {"path": "fast"}}, "path=fast, but the engine cannot run this: method.name=full"),
    ({"name": "ia3", "target_modules": "linear"}, {"train": {"path": "fast"}}, "this: IA3's factors on other layers"),
    ({"name": "lora", "dora": True}, {"train": {"path": "fast"}}, "cannot run this: DoRA"),
    ({"name": "lora", "r": 40, "init": "olora"}, {}, "has only 32 singular values"),
    ({"name": "lora", "modules_to_save": ["up_proj"]}, {}, "linear layers of the blocks get adapters"),
    ({"name": "freeze", "num_layers": 3}, {}, "has 2 blocks"),
    ({"name": "freeze", "patterns": ["*q_proj*"]}, {"model": {"quantization": "int8"}}, r"\*\.self_attn\.q_proj"),
    ({"name": "ia3", "target_modules": ["query_key_value"]}, {}, "query_key_value is no linear layer of this model"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "sections", "message"), REFUSED)
def test_refused_before_a_weight_is_read(tiny, rows_file, tmp_path, capsys, method, sections, message):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    data = {"train": [str(rows_file)], "template": "tutorial", "max_length": 64, **sections.get("data", {})}
    tree = {
        "model": {"path": str(folder), **sections.get("model", {})},
        "method": method,
        "data": data,
        "train": {"device": "cpu", **sections.get("train", {})},
        "output": {"dir": str(tmp_path / "run")},
    }
    with pytest.raises(ConfigError, match=message) as caught:
        run.train(build(tree), quiet=True)
    assert not (tmp_path / "run").exists()
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    assert main(["plan", str(file)]) == 2
    assert str(caught.value) in capsys.readouterr().err


def test_architectures_that_cannot_be_planned_are_checked_as_far_as_known(tmp_path):
    assert known_arch({"model_type": "gpt2"}) is None
    config = build({"model": {"path": "m"}, "method": PREFIX, "train": {"activation_checkpointing": True}})
    with pytest.raises(ConfigError, match=RECOMPUTED):
        check_run(config, None, None)
    with pytest.raises(ConfigError, match="more than the 1030 positions"):
        check_run(build({"model": {"path": "m"}, "method": PREFIX}), None, 1030)
    check_run(build({"model": {"path": "m"}, "method": PREFIX}), None, 1044)


@pytest.mark.parametrize("setting", [False, "none", "elementwise"])
def test_a_prefix_may_keep_activations(setting):
    config = build({"model": {"path": "m"}, "method": PREFIX, "train": {"activation_checkpointing": setting}})
    assert plain_path_problem(config) is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("checks") / "llama", "llama")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bitfit"])
def test_the_engine_takes_the_methods_that_the_plan_says(llama, kind):
    config = build({"model": {"path": "m"}, "method": KINDS[kind]})
    try:
        EnginePath(apply(llama, kind), "llama", "elementwise", 64, 128)
        refused = False
    except Unsupported:
        refused = True
    assert (plain_reason(read_arch(TINY["llama"]), config) is not None) == refused
