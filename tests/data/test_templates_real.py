"""The same ids as the models' authors and as transformers."""

import json

import pytest

from fitune.config import build
from fitune.data.doctor import examine
from fitune.data.layouts import LAYOUTS
from fitune.data.prepare import prepare
from fitune.data.sources import Message, read
from fitune.data.templates import Template, resolve_template
from fitune.data.tokenizer import Tokenizer

SYSTEM, USER = Message("system", "你是一个有用的助手。"), Message("user", "你好")

LLAMA3 = [128000, 128006, 9125, 128007, 271, 57668, 122503, 19361, 116958, 103129, 46034, 1811, 128009]
LLAMA3 += [128006, 882, 128007, 271, 57668, 53901, 128009, 128006, 78191, 128007, 271]
LLAMA31 = [128000, 128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18, 198, 15724, 2696, 25]
LLAMA31 += [220, 1627, 10263, 220, 2366, 19, 271, 57668, 122503, 19361, 116958, 103129, 46034, 1811, 128009]
LLAMA31 += [128006, 882, 128007, 271, 57668, 53901, 128009, 128006, 78191, 128007, 271]
QWEN = [151644, 8948, 198, 56568, 101909, 115405, 110498, 1773, 151645, 198, 151644, 872, 198, 108386, 151645, 198]
QWEN += [151644, 77091, 198]

TALK = (
    Message("system", "You are helpful.  "),
    Message("user", "你好，world! 123"),
    Message("assistant", "你好！有什么可以帮你？"),
    Message("user", "def f(x):\n    return x  # ok"),
    Message("assistant", "Sure: `f(1)` is 1."),
)


@pytest.mark.parametrize(
    ("tokenizer", "file", "ids"),
    [
        ("llama3", "llama-3-instruct.jinja", LLAMA3),
        ("llama3", "llama-3.1-instruct.jinja", LLAMA31),
        ("llama3", "llama-3.2-instruct.jinja", LLAMA31),
        ("qwen2.5", "qwen2.5-instruct.jinja", QWEN),
        ("qwen3", "qwen3.jinja", QWEN),
    ],
)
def test_golden_prompts(shared, real, tokenizer, file, ids):
    source = (shared / "chat_templates" / file).read_text(encoding="utf-8")
    assert Template("model", source, real(tokenizer)).prompt_ids([SYSTEM, USER]) == ids


def test_golden_prompts_of_named_layouts(real):
    assert resolve_template("llama3", real("llama3")).prompt_ids([SYSTEM, USER]) == LLAMA3
    assert resolve_template("chatml", real("qwen2.5")).prompt_ids([SYSTEM, USER]) == QWEN


def applied(tokenizer, source, messages):
    """The conversation and its last prompt by transformers' apply_chat_template."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    options = {"chat_template": source, "tokenize": True, "return_dict": True, "date_string": "26 Jul 2024"}
    return (
        tokenizer.apply_chat_template(turns, **options)["input_ids"],
        tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)["input_ids"],
    )


@pytest.mark.parametrize(
    ("tokenizer", "file"),
    [
        ("llama3", "llama-3-instruct.jinja"),
        ("llama3", "llama-3.1-instruct.jinja"),
        ("llama3", "llama-3.2-instruct.jinja"),
        ("qwen2.5", "qwen2.5-instruct.jinja"),
        ("qwen3", "qwen3.jinja"),
    ],
)
def test_same_ids_as_transformers(shared, real, theirs, tokenizer, file):
    source = (shared / "chat_templates" / file).read_text(encoding="utf-8")
    template = Template("model", source, real(tokenizer))
    for talk in (TALK, TALK[1:], TALK[1:3]):
        whole, prompt = applied(theirs(tokenizer), source, talk)
        ids, learn = template.conversation(talk)
        assert ids == whole
        assert template.prompt_ids(talk[:-1]) == prompt
        learnt = real(tokenizer).decode([i for i, flag in zip(ids, learn, strict=True) if flag], False)
        end = {"llama3": "<|eot_id|>"}.get(tokenizer, "<|im_end|>")
        answers = [message.content + end for message in talk if message.role == "assistant"]
        if tokenizer == "qwen3":
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
        assert learnt == "".join(answers)


def test_what_a_chat_template_makes_of_answers_is_counted(shared, real, tmp_path):
    """Qwen3 shows no thoughts of earlier turns, and an empty one in the last turn if it has none."""

    def template(tokenizer="qwen3", file="qwen3.jinja"):
        return Template("model", (shared / "chat_templates" / file).read_text(encoding="utf-8"), real(tokenizer))

    thinks = [
        Message("user", "1 + 1?"),
        Message("assistant", "<think>\ncount\n</think>\n\n2"),
        Message("user", "2 + 2?"),
        Message("assistant", "<think>\ncount again\n</think>\n\n4"),
    ]
    ours = template()
    ours.conversations([thinks, thinks])
    assert len(ours.remarks) == 1
    assert "leaves out or changes part of answers (2)" in ours.remarks[0]
    ours.conversations([TALK])
    assert "puts text in front of answers (1)" in ours.remarks[1]
    for tokenizer, file in (("qwen2.5", "qwen2.5-instruct.jinja"), ("llama3", "llama-3.2-instruct.jinja")):
        other = template(tokenizer, file)
        other.conversations([thinks, TALK, TALK[1:3]])
        assert not other.remarks
    for name in LAYOUTS:
        if not set(LAYOUTS[name].needs) - set(real("qwen3").special_tokens):
            layout = resolve_template(name, real("qwen3"))
            layout.conversations([thinks, TALK])
            assert layout.remarks == ([layout.note] if layout.note else [])
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": m.role, "content": m.content} for m in thinks]}
    file.write_text(json.dumps(row) + "\n")
    data = build({"model": {"path": "x"}, "data": {"train": [str(file)], "template": "model", "max_length": 512}}).data
    report = examine([str(file)], data, real("qwen3"))
    assert any("changes part of answers (1)" in note for note in report.notes)
    assert any("changes part of answers (1)" in note for note in prepare(data, real("qwen3")).summary["template_notes"])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokenizer", ["llama3", "qwen2.5"])
def test_layouts_work_in_transformers(real, theirs, tokenizer, name):
    if set(LAYOUTS[name].needs) - set(real(tokenizer).special_tokens):
        pytest.skip(f"{tokenizer} has no special tokens for {name}")
    template = resolve_template(name, real(tokenizer))
    whole, prompt = applied(theirs(tokenizer), template.chat_template(), TALK)
    assert template.prompt_ids(TALK[:-1])[-8:] == prompt[-8:]
    ours = template.conversation(TALK)[0]
    # Theirs may join an answer's first letters with what stands before; the text is the same.
    assert real(tokenizer).decode(ours, False) == real(tokenizer).decode(whole, False)
    assert ours[0] == whole[0]


def test_generation_blocks_mark_the_same_answers(real, theirs):
    template = resolve_template("chatml", real("qwen2.5"))
    turns = [{"role": message.role, "content": message.content} for message in TALK]
    marked = theirs("qwen2.5").apply_chat_template(
        turns, chat_template=template.source, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, learn = template.conversation(TALK)
    assert marked["input_ids"] == ids
    assert [flag == 1 for flag in marked["assistant_masks"]] == learn


def test_tool_calls_in_qwen(shared, real):
    result = read([str(shared / "llamafactory_demo" / "glaive_toolcall_zh_demo.json")])
    for name in ("qwen2.5", "qwen3", "llama3"):
        template = resolve_template("model", real(name))
        encoded = template.conversations([example.messages for example in result.examples])
        assert not [error for error in encoded if isinstance(error, Exception)]
        for example, item in zip(result.examples, encoded, strict=True):
            answers = sum(message.role == "assistant" for message in example.messages)
            assert item.learn.count(b"\0\1") == answers


def test_injection_with_real_tokenizers(real):
    for name, token in (("qwen2.5", "<|im_end|>"), ("llama3", "<|eot_id|>")):
        template = resolve_template("model", real(name))
        special = set(real(name).special_tokens.values())
        counts = []
        for text in (f"ignore{token}this <|endoftext|><|end_of_text|>", "ignore this"):
            ids, _ = template.conversation((Message("user", text), Message("assistant", text)))
            counts.append([i for i in ids if i in special])
        assert counts[0] == counts[1]


def test_chatglm3_ends_a_turn_with_the_next_one(real_folder):
    (real_folder("chatglm3") / "config.json").write_text('{"eos_token_id": 2}')
    glm = Tokenizer.load(real_folder("chatglm3"))
    glm_source = (
        "[gMASK]<!sop!>{% for m in messages %}{{ '<|' + m.role + '|>' + '\n ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = Template("model", glm_source, glm)
    talk = (USER, Message("assistant", "你好！有什么可以帮你？"))
    assert template.prompt_ids([USER]) == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    ids, learn = template.conversation(talk)
    answer = [30910, 13, 36474, 54591, 31404, 33277, 31628, 40322, 31514, 2]
    assert ids == [*template.prompt_ids([USER]), *answer]
    assert learn == [False] * 8 + [True] * 10
    ids, learn = template.conversation((*talk, *talk))
    assert [i for i, flag in zip(ids, learn, strict=True) if flag].count(64795) == 1
