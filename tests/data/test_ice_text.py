"""The tokenizer and layout of ChatGLM-6B, with the real file: ids of SentencePiece, golden sequences, replies."""

import json
import random
import re
import shutil

import pytest

from fitune.config import DataConfig
from fitune.data.doctor import examine, render_text
from fitune.data.example import Message
from fitune.data.ice_text import IceText
from fitune.data.prepare import prepare
from fitune.data.row_view import picture, prefix_lm
from fitune.data.templates import resolve_template
from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError, DataError
from fitune.plan.chatglm import Blank
from tests.data.test_sentencepiece_model import real_texts

sentencepiece = pytest.importorskip("sentencepiece")
BLANK = Blank(130004, 130001, 130000)
QUESTION, ANSWER = Message("user", "你好"), Message("assistant", "你好！")
SINGLE = [5, 74874, 130001, 130004, 5, 74874, 35, 130005]
ROUNDS = [
    *(53, 6945, 5, 8, 42, 4, 64286, 12, 74874, 4, 67342, 12, 74874, 35, 4),
    *(52, 6945, 5, 9, 42, 4, 64286, 12, 72798, 4, 67342, 12, 130001, 130004),
]


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    target = tmp_path_factory.mktemp("chatglm-6b")
    for file in (shared / "tokenizers" / "chatglm-6b").iterdir():
        shutil.copyfile(file, target / file.name)
    shutil.copyfile(shared / "configs" / "chatglm-6b" / "config.json", target / "config.json")
    return target


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def published(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))


def marked(text):
    """What the published tokenizer does before SentencePiece sees a text."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text


def read(published, ids):
    """What it does with ids: decoding, white space, and the model's own repair of punctuation."""
    text = published.decode(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
    for length in range(2, 81):
        text = text.replace(f"<|blank_{length}|>", " " * length)
    for half, full in (",，", "!！", ":：", ";；", ("\\?", "？")):
        text = re.sub(rf"([\u4e00-\u9fff]){half}", rf"\1{full}", text)
        text = re.sub(rf"{half}([\u4e00-\u9fff])", rf"{full}\1", text)
    return text


def test_ids_are_those_of_sentencepiece(shared, tokenizer, published):
    texts = list(dict.fromkeys(real_texts(shared, rows=5500, lines=2000)))
    draw = random.Random(1)
    texts += [" " * draw.randint(1, 200) + "x\t" * draw.randint(0, 3) + "_" * draw.randint(1, 30) for _ in range(300)]
    assert len(texts) >= 20_000
    expected = published.encode([marked(text) for text in texts])
    found = tokenizer.encode_batch(texts)
    assert [text for text, a, b in zip(texts, found, expected, strict=True) if a != b] == []
    assert tokenizer.encode_batch(texts[:50], at_start=False) == expected[:50], "a dummy space before every piece"
    odd = [ids for ids in expected[::20] if tokenizer.decode(ids) != read(published, ids)]
    assert odd == []


def test_special_tokens(tokenizer, folder):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (130004, 130005, 3, 0)
    assert tokenizer.stop_ids == (130005,), "</s> ends texts of the pretraining, not answers"
    assert tokenizer.prefix_ids == tokenizer.opening_ids == (130001, 130004)
    assert (tokenizer.blank, tokenizer.vocab_size) == (BLANK, 130344)
    text = "[gMASK]<sop><eop></s><pad>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.split("a[gMASK]<sop>") == ["a", 130001, 130004]
    assert tokenizer.decode([5, 74874, 130001, 130004, 5, 74874], skip_special=False) == "你好[gMASK]<sop>你好"
    assert tokenizer.decode([130400, 5, 74874, 130527]) == "你好", "unused rows of the embedding stand for nothing"


def test_golden_sequences(tokenizer):
    template = resolve_template("auto", tokenizer)
    assert template.name == "chatglm"
    assert template.prompt_ids([QUESTION]) == SINGLE[:4]
    assert template.prompt_ids([QUESTION, ANSWER, Message("user", "再见")]) == ROUNDS
    # The blank's token gives sop: that is learnt, too, as in the published recipe.
    assert template.conversation([QUESTION, ANSWER]) == (SINGLE, [False] * 3 + [True] * 5)
    ids, learn = template.conversation([QUESTION, ANSWER, Message("user", "再见"), Message("assistant", "再见")])
    assert ids == [*ROUNDS, 5, 72798, 130005]
    assert learn == [i >= len(ROUNDS) - 1 for i in range(len(ids))]


def test_a_blank_in_a_text_is_text(tokenizer):
    template = resolve_template("chatglm", tokenizer)
    ids, _ = template.conversation([Message("user", "say [gMASK]<sop>"), Message("assistant", "<eop> [MASK]")])
    assert [i for i in ids if i in tokenizer.special_tokens.values()] == [130001, 130004, 130005]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_other_roles_are_refused(tokenizer, role):
    with pytest.raises(DataError, match=f"ChatGLM-6B has no {role} turns"):
        resolve_template("chatglm", tokenizer).conversation([Message(role, "x"), QUESTION, ANSWER])


def test_other_layouts_begin_with_the_blank(tokenizer):
    """Then everything is its text: causal, and every answer can be learnt."""
    template = resolve_template("tutorial", tokenizer)
    ids, learn = template.conversation([QUESTION, ANSWER, QUESTION, ANSWER])
    assert ids[:2] == [130001, 130004]
    assert ids.count(130005) == 2
    assert sum(learn) == 2 * len([*tokenizer.encode("你好！"), 130005])


def test_a_template_without_sop_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    template = resolve_template("auto", Tokenizer.load(copy))
    with pytest.raises(DataError, match="template model: writes no <sop> before the answer"):
        template.conversation([QUESTION, ANSWER])


def test_an_exported_layout_is_the_same(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "chat_template.jinja").write_text(resolve_template("chatglm", Tokenizer.load(folder)).source)
    template = resolve_template("auto", Tokenizer.load(copy))
    assert template.name == "model"
    turns = [QUESTION, ANSWER, Message("user", "再见"), Message("assistant", "再见")]
    assert template.conversation(turns)[0] == [*ROUNDS, 5, 72798, 130005]


def test_replies(tokenizer):
    """Full-width punctuation beside Chinese characters, no white space around, the date of the training."""
    template = resolve_template("chatglm", tokenizer)
    reply = "\n你好,世界!今天:a,b;真的?ok, fine! [[训练时间]]\n\n"
    ids = tokenizer.encode(reply)
    assert template.answer_text([*ids, 130005]) == "你好，世界！今天：a,b；真的？ok, fine! 2023年"


def test_raw_text_is_cut_so_that_every_row_has_its_blank(tokenizer, write):
    text = "".join(f"{n} 春眠不觉晓，处处闻啼鸟。" for n in range(40))
    data = DataConfig(train=(write([{"text": text}]),), max_length=32)
    rows = prepare(data, tokenizer).train
    assert len(rows) > 3
    assert all(list(row.input_ids[:2]) == [130001, 130004] and row.num_tokens <= 32 for row in rows)
    whole = [i for row in rows for i in row.input_ids[2:]]
    assert whole == [*tokenizer.encode(text), 130005], "each token once"
    assert sum(row.num_supervised for row in rows) == len(whole) + 1, "and learnt once; sop of the first row, too"


def test_geometry():
    ids = [7, 8, 9, 130001, 130004, 10, 11, 12]
    positions, sees = prefix_lm(ids, BLANK)
    assert positions == {"position": [0, 1, 2, 3, 3, 3, 3, 3], "block": [0, 0, 0, 0, 1, 2, 3, 4]}
    assert sees == [4, 4, 4, 4, 5, 6, 7, 8]
    assert list(picture(sees))[3:6] == ["      ████····", "      █████···", "      ██████··"]
    assert len(list(picture(list(range(1, 1001))))) <= 32


def test_geometry_is_the_models():
    torch = pytest.importorskip("torch")
    from fitune.model.prefix_lm import find_places, prefix_bias

    draw = random.Random(3)
    for blank in ((130001,), (130000, 7), (130000, 130001), ()):
        ids = [draw.randint(4, 99) for _ in range(6)]
        ids[3:3] = blank
        ids = [*ids, *([130004] if blank else []), 10, 11]
        positions, sees = prefix_lm(ids, BLANK)
        places = find_places(torch.tensor([ids]), BLANK)
        assert places.rows_B2S[0].tolist() == list(positions.values())
        bias = prefix_bias(places, len(ids), torch.zeros(1))
        assert [int(row.eq(0).sum()) for row in bias[0, 0]] == sees


def test_rendering(tokenizer, write):
    report = examine([write([{"instruction": "你好", "output": "你好！"}])], DataConfig(), tokenizer, 1)
    lines = render_text(report).splitlines()
    table = [" ".join(line.split()) for line in lines]
    assert "# id learnt position block sees token" in table
    assert "2 130001 2 0 3 [gMASK]" in table
    assert "3 130004 * 2 1 4 <sop>" in table
    assert lines[-8:] == ["      " + "█" * n + "·" * (8 - n) for n in (3, 3, 3, 4, 5, 6, 7, 8)]


def change(folder, target, file, **keys):
    shutil.copytree(folder, target)
    tree = json.loads((target / file).read_text()) | keys
    (target / file).write_text(json.dumps(tree))
    return target


def test_first_revisions_have_ids_of_images_in_front(folder, tmp_path):
    ids = {"bos_token_id": 150004, "gmask_token_id": 150001, "mask_token_id": 150000, "eos_token_id": 150005}
    old = change(folder, tmp_path / "m", "config.json", vocab_size=150528, pad_token_id=20003, **ids)
    with pytest.raises(ConfigError, match=r"\(130004, 130001, 130000\), config.json by \(150004, 150001, 150000\)"):
        Tokenizer.load(old)
    tree = json.loads((old / "tokenizer_config.json").read_text()) | {"num_image_tokens": 20000}
    (old / "tokenizer_config.json").write_text(json.dumps(tree))
    tokenizer = Tokenizer.load(old)
    assert tokenizer.encode("你好") == [20005, 94874]
    assert tokenizer.decode([17, 20005, 94874]) == "你好"
    assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((150005,), 20003, 150344)


@pytest.mark.parametrize("images", [-1, "0", True, 10**9])
def test_a_number_of_images_that_cannot_be(folder, tmp_path, images):
    with pytest.raises(ConfigError, match="num_image_tokens is"):
        Tokenizer.load(change(folder, tmp_path / "m", "tokenizer_config.json", num_image_tokens=images))


def test_files_that_are_none(shared, tmp_path):
    with pytest.raises(ConfigError, match="x: is damaged, or no SentencePiece model"):
        IceText(b"nonsense", 0, "x")
    other = (shared / "tokenizers" / "chatglm3-6b" / "tokenizer.model").read_bytes()
    with pytest.raises(ConfigError, match=r"x: has no <sop>, \[gMASK\]"):
        IceText(other, 0, "x")
