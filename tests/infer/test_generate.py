"""Generation by itself: closing a stream, the end of the positions, sampling values, pieces of text."""

import json
import math
import subprocess
import sys
import threading

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import fitune
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError
from fitune.infer import generate as module
from fitune.infer.generate import Sampling, generate, stream
from fitune.infer.load import _pieces
from tiny import make_model


def test_closing_a_stream_ends_the_generation(tiny):
    model = fitune.load(tiny, device="cpu").model
    model.train()
    before = threading.active_count()
    ids = stream(model, [5, 6], [2], Sampling(max_new_tokens=250, temperature=5.0, seed=1))
    next(ids)
    assert threading.active_count() == before + 1
    ids.close()
    assert threading.active_count() == before
    assert model.training


def test_a_process_may_end_with_a_stream_open(tiny):
    code = (
        "import fitune, sys\n"
        f"pieces = fitune.load({str(tiny)!r}, device='cpu').stream('a', max_new_tokens=240, temperature=5.0, seed=1)\n"
        "print(len(next(pieces)) > 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "True\n"
    assert "terminate called" not in ended.stderr


def test_errors_of_the_worker_are_raised_where_the_stream_is_read(tiny, monkeypatch):
    model = fitune.load(tiny, device="cpu")

    def fail(*_):
        raise ZeroDivisionError("here")

    monkeypatch.setattr(module, "_settings", fail)
    with pytest.raises(ZeroDivisionError, match="here"):
        list(model.stream("say 3"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_end_with_the_positions(tmp_path, kind):
    model = fitune.load(make_model(tmp_path / "model", kind), device="cpu").model
    sampling = Sampling(max_new_tokens=20)
    prompts = [[5] * 250, [6] * 10, [7] * 255]
    lengths = [len(answer.ids) for answer in generate(model, prompts, [127], sampling)]
    assert lengths == [6, 20, 1]
    assert len(list(stream(model, prompts[0], [127], sampling))) == 6
    for ask in (lambda p: generate(model, [p], [127], sampling), lambda p: stream(model, p, [127], sampling)):
        with pytest.raises(DataError, match=r"prompt has 256 tokens.*256 positions"):
            ask([5] * 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("temperature", math.nan),
        ("temperature", -1),
        ("temperature", 1e-6),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
    ],
)
def test_sampling_values_are_checked(name, value):
    with pytest.raises(ConfigError, match=rf"{name} .* is .*; allowed: "):
        Sampling(**{name: value})


def test_what_is_no_conversation_is_refused(tiny):
    model = fitune.load(tiny, device="cpu")
    with pytest.raises(ConfigError, match=r"unknown argument max_tokens; allowed: max_new_tokens, temperature"):
        model.generate("a", max_tokens=3)
    with pytest.raises(ConfigError, match="unknown argument max_tokens"):
        model.stream("a", max_tokens=3)
    with pytest.raises(ConfigError, match="conversation is empty"):
        model.generate([])
    with pytest.raises(ConfigError, match="message 1: `content` is None"):
        model.generate([{"role": "user"}])
    with pytest.raises(ConfigError, match="message 1: `role` is None"):
        model.generate([{"content": "a"}])
    with pytest.raises(ConfigError, match="message 1 is 'role'"):
        model.generate({"role": "user", "content": "a"})


def test_raw_prompts_have_no_template(tiny):
    model = fitune.load(tiny, device="cpu")
    assert model.prompt_ids("say", raw=True) == [*model.tokenizer.prefix_ids, *model.tokenizer.encode("say")]
    assert model.prompt_ids("say") != model.prompt_ids("say", raw=True)
    with pytest.raises(ConfigError, match="raw text has none"):
        model.generate([{"role": "user", "content": "a"}], raw=True)
    with pytest.raises(ConfigError, match="prompt is empty"):
        model.generate("", raw=True)


def sentencepiece_like(folder):
    """A tokenizer whose words carry their space in front, which its decoder strips from the first one."""
    byte_tokens = {f"<0x{byte:02X}>": 7 + byte for byte in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "▁cat": 4, "s": 5, "▁": 6, **byte_tokens}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.load(folder)


def test_pieces_keep_spaces_and_whole_characters(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    ids = [3, 4, 5, 6, *(7 + byte for byte in "春".encode()), 3, 7 + 0xE6]
    pieces = list(_pieces((i for i in ids), tokenizer.decode, tokenizer.unsettled))
    assert pieces == ["the", " cat", "s", " ", "春", " the", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(ids)
