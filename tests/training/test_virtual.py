"""Runs with virtual tokens and IA3 on the engine: checked at the start, packed, recomputed, resumed bit by bit."""

import pytest
import torch
from safetensors.torch import load_file

from fitune.config import build
from fitune.engine import factors, virtual
from fitune.errors import ConfigError, FituneError
from fitune.training import run

METHODS = {
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "ptuning": {
        "name": "ptuning",
        "num_virtual_tokens": 3,
        "encoder": "lstm",
        "encoder_hidden_size": 16,
        "dropout": 0.2,
    },
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prefix projection": {"name": "prefix", "num_virtual_tokens": 3, "projection": True, "encoder_hidden_size": 16},
}
VIRTUAL = list(METHODS)
METHODS["ia3"] = {"name": "ia3"}


def train(tree, quiet=True, **changes):
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return run.train(build(tree), quiet=quiet)


def published(result):
    return load_file(result.run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["tiny", "tiny_qwen", "tiny_bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_the_self_check_passes_and_says_so(tree, method, family, request, capsys):
    tree["model"]["path"], tree["method"] = str(request.getfixturevalue(family)), METHODS[method]
    train(tree, train__max_steps=1, train__path="fast", quiet=False)
    assert "fast path" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_the_run_is_that_of_the_plain_path(tree, method):
    """Losses of a run without dropout, whose masks the paths draw for each document or for all."""
    tree["method"] = {key: value for key, value in METHODS[method].items() if key != "dropout"}
    losses = []
    for path in ("fast", "plain"):
        result = train(tree, train__path=path, output__dir=f"{tree['output']['dir']}-{path}")
        losses.append((result.first_eval_loss, result.best_eval_loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["ptuning", "prefix", "ia3"])
def test_a_resumed_run_is_the_same_bit_by_bit(tree, method):
    tree["method"] = METHODS[method]
    whole = train(tree, train__path="fast", train__schedule="constant")
    tree["output"]["dir"] += "-stopped"
    half = train(tree, train__max_steps=2)
    resumed = run.resume(half.run, ["train.max_steps=6"], quiet=True)
    assert resumed.step == whole.step == 6
    expected, found = published(whole), published(resumed)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_packed_and_recomputed(tree, method):
    """What the plain path refuses: several documents in a sequence, a prefix in blocks that are computed again."""
    tree["method"] = METHODS[method]
    results = [train(tree, train__max_steps=3)]
    del tree["train"]["micro_batch_rows"]
    for level in ("full", "offload"):
        tree["output"]["dir"] += level
        results.append(train(tree, data__packing=True, train__activation_checkpointing=level))
    for result in results[1:]:
        assert result.best_eval_loss == pytest.approx(results[0].best_eval_loss, rel=1e-5)
    tree["output"]["dir"] += "plain"
    with pytest.raises(ConfigError, match=r"activation_checkpointing is|data\.packing is true"):
        train(tree, train__path="plain")


WRONG = {
    "place_rows": lambda real: lambda table, first, out: real(table * 1.5, first, out),
    "take_rows": lambda real: lambda x, first, into: (real(x, first, into), into.mul_(0.5)),
}


@pytest.mark.parametrize("kernel", WRONG)
@pytest.mark.parametrize("method", VIRTUAL)
def test_a_wrong_kernel_is_refused(tree, monkeypatch, method, kernel):
    tree["method"] = METHODS[method]
    if METHODS[method]["name"] != "prefix" and kernel == "place_rows":
        pytest.skip("blocks of the self-check get rows from the plain path; the loss sees it in trained models")
    monkeypatch.setattr(virtual, kernel, WRONG[kernel](getattr(virtual, kernel)))
    with pytest.raises(FituneError, match="the fast path disagrees with the plain path"):
        train(tree, train__max_steps=1)


def test_wrong_factors_are_refused(tree, monkeypatch):
    tree["method"] = METHODS["ia3"]
    real = factors.add_column_sums
    with monkeypatch.context() as patch:
        patch.setattr(factors, "add_column_sums", lambda x, scale, into, times_TN: real(x, scale, into))
        with pytest.raises(FituneError, match=r"disagrees with the plain path.*ia3_l"):
            train(tree, train__max_steps=1)
    monkeypatch.setattr(factors.Factors, "scale", lambda self, y, out: out.copy_(y))
    with pytest.raises(FituneError, match="disagrees with the plain path"):
        train(tree, train__max_steps=1)


def test_factors_elsewhere_take_the_plain_path(tree, capsys):
    tree["method"] = {"name": "ia3", "target_modules": "linear"}
    train(tree, train__max_steps=1, quiet=False)
    assert "plain path: IA3's factors on other layers" in " ".join(capsys.readouterr().err.split())
    tree["output"]["dir"] += "-fast"
    with pytest.raises(ConfigError, match="train.path=fast, but the engine cannot run this: IA3's factors on other"):
        train(tree, train__path="fast")
