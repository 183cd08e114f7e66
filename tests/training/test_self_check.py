"""The self-check lets a right engine pass and refuses a wrong one before anything is trained."""

from array import array
from dataclasses import replace

import pytest
import torch

from engine_models import make, make_rows
from fitune.config import build
from fitune.data.prepare import Row
from fitune.engine import block, groups
from fitune.engine.path import EnginePath
from fitune.errors import FituneError
from fitune.training import run, self_check


def train(tree, quiet=True, **changes):
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return run.train(build(tree), quiet=quiet)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_right_engine_passes_and_says_how_close_it_is(tree, dtype, capsys):
    train(tree, model__dtype=dtype, train__max_steps=1, quiet=False)
    printed = " ".join(capsys.readouterr().err.split())
    assert "fast path: llama block, keeps `elementwise`; equals the plain path on" in printed


WRONG = {
    "swiglu": lambda real: lambda *args: (real(*args), args[1].mul_(1.2)),
    "swiglu_backward": lambda real: lambda *args: (real(*args), args[2][:, ::2].mul_(0.7)),
    "rotate": lambda real: lambda x, rotary, positions, heads, out: None,
    "attention_backward": lambda real: lambda *args: (real(*args), args[5].k_Tgd.neg_()),
    "norm_backward": lambda real: lambda dy, x, norm, rstd, mean, d, y: real(dy, x, norm, rstd, mean, d.mul_(0.9), y),
    "rotate_backward": lambda real: lambda x, rotary, positions, heads, out: None,
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_refused(tree, monkeypatch, kernel, dtype):
    tree["model"]["path"] = "embedded"  # trained weights: what a block does is not lost in the residual
    tree["method"]["target_modules"] = "linear"
    monkeypatch.setattr(block, kernel, WRONG[kernel](getattr(block, kernel)))
    with pytest.raises(FituneError, match="the fast path disagrees with the plain path") as error:
        train(tree, model__dtype=dtype, train__max_steps=1)
    assert error.value.exit_code == 1
    assert not (run.Path(tree["output"]["dir"])).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bloom"])
def test_rows_in_which_queries_and_keys_learn_nothing(kind, dtype):
    """Equal or few tokens: the softmax passes no gradient on, and both paths have only rounding there."""
    model, model_type = make(kind, dtype=dtype)
    engine = EnginePath(model, model_type, "elementwise", 64, 128)
    rows = [Row(array("i", [5] * length), bytes([0]) + bytes([1]) * (length - 1), "x") for length in (8, 40)]
    rows += [replace(make_rows([2], seed=seed)[0], learn=bytes([0, 1])) for seed in range(12)]
    for row in rows:
        assert "equals the plain path" in self_check.self_check(model, engine, row)


WRONG_BLOOM = {
    "gelu": lambda real: lambda x, out: (real(x, out), out.mul_(1.2)),
    "gelu_backward": lambda real: lambda d, x, dx, act: (real(d, x, dx, act), dx[:, ::2].mul_(0.7)),
    "attention": lambda real: lambda qkv, scoring, out, lse: real(qkv, replace(scoring, slopes_h=None), out, lse),
    "norm_backward": WRONG["norm_backward"],
}


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_bloom_passes_and_a_wrong_kernel_is_refused(tree, tiny_bloom, monkeypatch, method, capsys):
    tree["model"]["path"] = str(tiny_bloom)
    tree["method"] = {"name": "lora", "r": 4, "target_modules": "linear"} if method == "lora" else {"name": method}
    train(tree, train__max_steps=1, quiet=False)
    assert "fast path: bloom block" in capsys.readouterr().err
    tree["output"]["dir"] += "-wrong"
    for kernel, wrong in WRONG_BLOOM.items():
        with monkeypatch.context() as patch:
            patch.setattr(block, kernel, wrong(getattr(block, kernel)))
            with pytest.raises(FituneError, match="the fast path disagrees with the plain path"):
                train(tree)


def forget_prefix(real):
    def attention(qkv, scoring, out, lse):
        documents = scoring.documents
        real(qkv, replace(scoring, documents=replace(documents, until_T=documents.start_T)), out, lse)

    return attention


WRONG_CHATGLM = {
    "attention": forget_prefix,
    "rotate": lambda real: (
        lambda x, rotary, positions, heads, out: real(x, rotary, positions[:1].expand(2, -1), heads, out)
    ),
    "norm_backward": lambda real: lambda dy, x, norm, *rest: real(dy, x, replace(norm, carried=7.0), *rest),
}


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chatglm_passes_and_a_wrong_kernel_is_refused(monkeypatch, method, dtype):
    """The tokens that are compared hold the end of the prefix, wherever in the row it is."""
    model, model_type = make("chatglm", dtype=dtype, name=method)
    engine = EnginePath(model, model_type, "full", 256, 256)
    (row,) = make_rows([900])
    row = replace(row, learn=bytes(450) + bytes([1]) * 450)
    assert "equals the plain path on 256 tokens" in self_check.self_check(model, engine, row)
    for kernel, wrong in WRONG_CHATGLM.items():
        with monkeypatch.context() as patch:
            patch.setattr(block, kernel, wrong(getattr(block, kernel)))
            with pytest.raises(FituneError, match="the fast path disagrees with the plain path"):
                self_check.self_check(model, engine, row)


@pytest.mark.parametrize("module", [block, groups])
def test_wrong_sums_over_tokens_are_refused(tree, tiny_bloom, monkeypatch, module):
    tree["model"]["path"] = str(tiny_bloom)
    tree["method"] = {"name": "bitfit"}
    real = module.add_column_sums
    monkeypatch.setattr(module, "add_column_sums", lambda x, scale, into: real(x[:-1], scale, into))
    with pytest.raises(FituneError, match=r"the fast path disagrees with the plain path.*bias in block"):
        train(tree)


def test_dropout_is_checked_without_a_mask_and_masks_by_themselves(tree, monkeypatch, capsys):
    tree["method"] |= {"dropout": 0.2}
    train(tree, train__max_steps=1, quiet=False)
    assert "fast path" in capsys.readouterr().err
    tree["output"]["dir"] += "-wrong"
    with monkeypatch.context() as patch:
        patch.setattr(groups, "drop_add", lambda x, mask, into: None)
        with pytest.raises(FituneError, match="the fast path disagrees with the plain path"):
            train(tree)
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "drop", lambda x, mask, out: out.copy_(x))
        with pytest.raises(FituneError, match="on this machine: what dropout keeps differs by"):
            train(tree)


def test_the_adapters_are_as_before(tree):
    """B is zero again, so the first loss is that of the untrained model."""
    fast = train(tree, train__max_steps=2)
    plain = train(tree, train__path="plain", output__dir=tree["output"]["dir"] + "-plain", train__max_steps=2)
    assert fast.first_eval_loss == pytest.approx(plain.first_eval_loss, rel=1e-6)


def test_nothing_is_left_behind(tree):
    torch.manual_seed(0)
    train(tree, train__max_steps=1)
    assert torch.is_grad_enabled()
