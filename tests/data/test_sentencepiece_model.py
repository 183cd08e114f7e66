"""A tokenizer.model read without the sentencepiece library gives the ids that the library gives."""

import gzip
import json
import random
from itertools import islice

import pytest
import tokenizers

from fitune.data.sentencepiece_model import read_model, tokenizer_json
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError
from original_chatglm import NORMALIZER, TRAINER, field, sentencepiece_file

ODD = [
    *("", " ", "  ", "a", " a ", "people", "sophisticated", "people sophisticated", "sop eop", "[gMASK]sop<|user|>"),
    *("▁", "a▁b ▁", "\n", "\t\t", "\r\n", "\0\1", "</s>", "<unk> <s>", "<0x0A>", "１２３４", "12345 67", "ﬁ ½ Ⅳ"),
    *(
        "🙂👨‍👩‍👧",
        "مرحبا بالعالم",
        "नमस्ते",
        "𠮷野家",
        "e\u0301 é",
        "\u200b\ufeff",
        "你好，世界！",
        "訓練",
        "def f(x):\n    return x\t# ok",
    ),
]


def real_texts(shared, rows: int, lines: int) -> list[str]:
    """Instructions, inputs and answers in two languages, poems, prose, the odd ones, and random characters."""
    texts = list(ODD)
    for name in ("alpaca/alpaca_en_52k", "alpaca/alpaca_zh_translated_hikariming", "pretrain/chinese_poetry_tang"):
        with gzip.open(shared / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            for line in islice(stream, rows):
                texts += [text for text in json.loads(line).values() if isinstance(text, str) and text]
    for name in ("wikitext2_valid.txt", "tinyshakespeare.txt"):
        with (shared / "pretrain" / name).open(encoding="utf-8") as stream:
            texts += islice(stream, lines)
    draw = random.Random(0)
    ranges = [(32, 127), (0x4E00, 0x9FFF), (0x3000, 0x30FF), (0x400, 0x4FF), (0x1F300, 0x1F6FF), (0, 32)]
    for _ in range(lines):
        low, high = draw.choice(ranges)
        texts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 40))))
    return texts


def mismatches(file, texts) -> tuple[list[str], list[str]]:
    """Texts of which the ids, and those of which the text made of the ids, differ from SentencePiece's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(read_model(file.read_bytes(), file.name), {}).decode())
    ours.encode_special_tokens = True
    expected = theirs.encode(texts)
    found = [encoding.ids for encoding in ours.encode_batch_fast(texts, add_special_tokens=False)]
    encoded = [text for text, a, b in zip(texts, found, expected, strict=True) if a != b]
    decoded = ours.decode_batch(expected, skip_special_tokens=False)
    back = [text for text, a, b in zip(texts, decoded, theirs.decode(expected), strict=True) if a != b]
    return encoded, back


@pytest.mark.parametrize("name", ["chatglm3-6b", "llama2"])
def test_same_ids_and_texts_as_sentencepiece(shared, name):
    texts = real_texts(shared, rows=400, lines=400)
    assert len(texts) > 3000
    assert mismatches(shared / "tokenizers" / name / "tokenizer.model", texts) == ([], [])


@pytest.mark.slow
def test_same_ids_as_sentencepiece_on_many_texts(shared):
    texts = real_texts(shared, rows=2000, lines=2000)
    assert len(texts) > 20_000
    assert mismatches(shared / "tokenizers" / "chatglm3-6b" / "tokenizer.model", texts) == ([], [])


def test_a_file_made_in_code_is_read_as_the_library_reads_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file())
    assert mismatches(tmp_path / "tokenizer.model", [*ODD, "say 你好 春山春 saysay"]) == ([], [])
    model = read_model(sentencepiece_file(), "m")
    assert [(p.text, p.kind) for p in model.pieces[:4]] == [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x00>", 6)]
    assert model.unsupported is None


def test_special_tokens_follow_the_vocabulary_and_stand_first():
    model = read_model(sentencepiece_file(), "m")
    special = {"[gMASK]": len(model.pieces), "<sop>": len(model.pieces) + 1}
    made = tokenizers.Tokenizer.from_str(tokenizer_json(model, special, ("[gMASK]", "<sop>")).decode())
    assert made.encode("say").ids == [*special.values(), *made.encode("say", add_special_tokens=False).ids]
    assert made.token_to_id("<sop>") == special["<sop>"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (sentencepiece_file(trainer=TRAINER | {3: 1}), "it is no BPE model"),
        (sentencepiece_file(trainer={35: 1}), "it is no BPE model"),
        (sentencepiece_file(trainer={3: 2}), "it has no byte fallback"),
        (sentencepiece_file(trainer=TRAINER | {24: 1}), "it treats spaces"),
        (sentencepiece_file(normalizer=NORMALIZER | {2: b"map"}), "it rewrites characters"),
        (sentencepiece_file(normalizer=NORMALIZER | {3: 0}), "it treats spaces"),
        (sentencepiece_file(normalizer={1: b"identity"}), "it treats spaces"),
        (sentencepiece_file(extra=[("<user>", 0.0, 4)]), "it has user-defined"),
        (sentencepiece_file(extra=[("<unk2>", 0.0, 2)]), "it has not one unknown piece"),
        (sentencepiece_file(extra=[("x" * 300, -99.0, 1)]), "it has pieces of more than 256"),
    ],
)
def test_what_would_give_other_ids_is_named(content, reason):
    assert reason in read_model(content, "m").unsupported


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"not a model at all",
        b"\x80" * 20,
        sentencepiece_file()[:-3],
        sentencepiece_file()[:100],
        sentencepiece_file(extra=[("a", 0.0, 1)]),
        field(1, field(1, 5)),
        field(1, field(1, b"\xff\xfe")),
        field(1, field(2, b"x")),
        field(1, field(3, b"x")),
        field(1, 7),
        field(2, 7) + field(1, field(1, b"a")),
        b"\x0b",
    ],
)
def test_damaged_files_are_refused(content):
    with pytest.raises(ConfigError, match="m: is damaged, or no SentencePiece model .*; download it again"):
        read_model(content, "m")


def test_a_llama_2_folder_needs_no_library(shared, tmp_path, monkeypatch):
    import sys

    for file in (shared / "tokenizers" / "llama2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.prefix_ids, tokenizer.eos_id) == (32000, (1,), 2)
    assert tokenizer.encode("你是助手</s>") == [29871, 30919, 30392, 31931, 30880, 829, 29879, 29958]


def test_other_models_are_left_to_transformers(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(trainer={3: 1, 35: 1}))
    with pytest.raises((ConfigError, ImportError), match="only tokenizer.model, which transformers could not convert"):
        Tokenizer.load(tmp_path)
