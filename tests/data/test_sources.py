"""Reading: formats, every kind of bad row with its line and reason, and nothing passed over."""

import gzip
import json

import pytest

from fitune.data.scan import MAX_ROW_BYTES
from fitune.data.sources import BadRow, Message, read
from fitune.errors import DataError

GOOD = {"instruction": "say hi", "input": "", "output": "hi"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def talk(*turns):
    return {"messages": list(turns)}


def chat(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def line(row):
    return json.dumps(row, ensure_ascii=False)


def reasons(file, format="auto"):
    return [(row.line, row.reason) for row in read([file], format).bad_rows]


# --- formats


def test_alpaca(write):
    row = {"instruction": "add", "input": "1 2", "output": " 3\n", "system": "be brief", "history": [["a", "b"]]}
    (example,) = read([write([row])]).examples
    assert example.messages == (
        Message("system", "be brief"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "add\n1 2", instruction="add", input="1 2"),
        Message("assistant", " 3\n"),
    )
    assert example.line == 1
    assert example.text is None


def test_alpaca_optional_keys_may_be_null(write):
    (example,) = read([write([GOOD | {"input": None, "system": None, "history": None}])]).examples
    assert [message.content for message in example.messages] == ["say hi", "hi"]


def test_openai_and_sharegpt_are_the_same(write):
    openai = talk({"role": "system", "content": "s"}, USER, ANSWER)
    sharegpt = chat(("human", "q"), ("gpt", "a")) | {"system": "s"}
    one, two = read([write([openai, sharegpt])]).examples
    assert one.messages == two.messages == (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))


def test_tool_turns_and_tools(write):
    row = chat(("human", "q"), ("function_call", "{}"), ("observation", "42"), ("gpt", "a"))
    (example,) = read([write([row | {"tools": '[{"name": "f"}]'}])]).examples
    assert [message.role for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[0].content == 'You have access to these tools:\n[{"name": "f"}]'


def test_text_and_extra_keys_are_counted(write):
    result = read([write([{"text": "a poem", "title": "t"}, {"text": "b", "title": "t", "id": 7}])])
    assert [example.text for example in result.examples] == ["a poem", "b"]
    assert result.extra_keys == {"title": 2, "id": 1}
    assert set(result.formats_by_file.values()) == {"text"}


def test_alpaca_rows_with_a_text_column_are_alpaca(write):
    result = read([write([GOOD | {"text": "Below is"}])])
    assert set(result.formats_by_file.values()) == {"alpaca"}


def test_format_is_found_by_the_first_recognisable_row(write):
    file = write([{"output": "x"}, GOOD, {"text": "t"}])
    result = read([file])
    assert result.formats_by_file == {file: "alpaca"}
    assert reasons(file) == [
        (1, "instruction: missing"),
        (3, "keys text: expected a row of format alpaca (so is the file's first row), got text"),
    ]


def test_a_format_can_be_required(write):
    assert reasons(write([GOOD]), "messages") == [
        (1, "keys instruction, input, output: expected a row of format messages (data.format says so), got alpaca")
    ]


def test_no_known_format(write):
    result = read([write([{"question": "a", "answer": "b"}, {}])])
    expected = "no known format; expected instruction and output, messages, prompt and completion, or text"
    assert [row.reason for row in result.bad_rows] == [
        f"keys question, answer: {expected}",
        f"an empty object: {expected}",
    ]


@pytest.mark.parametrize("format", ["auto", "messages"])
def test_prompt_and_completion_of_trl(write, format):
    pair = {"prompt": "q", "completion": "a", "id": 1}
    turns = {"prompt": [{"role": "developer", "content": "s"}, USER], "completion": [ANSWER]}
    faults = [
        {"prompt": "q", "completion": " "},
        {"prompt": [USER, ANSWER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": [USER]},
        {"prompt": 3, "completion": []},
    ]
    result = read([write([pair, turns, talk(USER, ANSWER) | {"prompt": "q"}, *faults])], format)
    plain = (Message("user", "q"), Message("assistant", "a"))
    assert [example.messages for example in result.examples] == [plain, (Message("system", "s"), *plain), plain]
    assert set(result.formats_by_file.values()) == {"messages"}
    assert result.extra_keys == {"id": 1, "prompt": 1}
    assert [bad.reason for bad in result.bad_rows] == [
        "completion: empty answer",
        "completion[0]: assistant after assistant; expected user or tool",
        "completion[0]: user after user; expected assistant",
        "prompt: must be text, got a number; completion: empty; prompt: the last turn is user; expected assistant",
    ]


def test_half_a_pair_is_a_bad_row(write):
    file = write([{"prompt": "q", "completion": "a"}, {"prompt": "q"}])
    assert reasons(file, "messages") == [(2, "completion: missing")]


def test_content_in_parts_is_joined(write):
    def part(text):
        return {"type": "text", "text": text}

    user = {"role": "user", "content": [part("a "), part("b")]}
    image = {"role": "user", "content": [part("a"), {"type": "image_url", "image_url": {}}, "b"]}
    result = read([write([talk(user, ANSWER), talk(image, ANSWER), talk(USER, {"role": "assistant", "content": []})])])
    assert result.examples[0].messages[0] == Message("user", "a b")
    shape = 'must be {"type": "text", "text": ...}, got'
    assert [bad.reason for bad in result.bad_rows] == [
        f"messages[0].content[1]: {shape} type 'image_url'; messages[0].content[2]: {shape} another shape",
        "messages[1].content: empty answer",
    ]


def test_reasons_are_counted_by_name_not_by_place(write):
    boss = [talk({"role": who, "content": "q"}, ANSWER) for who in ("boss", "boss", "chef")]
    kinds = [bad.kind for bad in read([write(boss)]).bad_rows]
    assert kinds[0] == kinds[1] != kinds[2]
    assert kinds[0].startswith("messages[N].role: unknown role 'boss'; known are system, ")
    reason = "no answer token fits data.max_length=512 (the row has 8,801 tokens); UTF-8, llama3 isn't at 7, 9's"
    assert BadRow("f", 1, reason, "").kind == (
        "no answer token fits data.max_length=512 (the row has N tokens); UTF-8, llama3 isn't at N, N's"
    )


def test_bad_rows_keep_their_whole_json(write):
    row = GOOD | {"input": "x" * 5000, "output": ""}
    (bad,) = read([write([row])]).bad_rows
    assert json.loads(bad.raw) == row


def test_several_files_keep_their_formats(write):
    files = [write([GOOD], "a.jsonl"), write([talk(USER, ANSWER)], "b.json.gz")]
    result = read(files)
    assert list(result.formats_by_file.values()) == ["alpaca", "messages"]
    assert result.num_rows == 2


# --- bad rows, one at line 2 between good ones

ALPACA_FAULTS = {
    "missing output": ({"instruction": "a"}, "output: missing"),
    "null output": (GOOD | {"output": None}, "output: must be text, got null"),
    "number": (GOOD | {"output": 5}, "output: must be text, got a number"),
    "boolean": (GOOD | {"output": True}, "output: must be text, got true or false"),
    "list": (GOOD | {"instruction": ["a"]}, "instruction: must be text, got a list"),
    "object": (GOOD | {"input": {}}, "input: must be text, got an object"),
    "empty answer": (GOOD | {"output": " \n"}, "output: empty answer"),
    "empty instruction": (GOOD | {"instruction": ""}, "instruction: empty"),
    "two at once": (GOOD | {"output": "", "input": 1}, "input: must be text, got a number; output: empty answer"),
    "history no list": (GOOD | {"history": "x"}, "history: must be a list of [user, assistant] pairs, got text"),
    "history no pair": (GOOD | {"history": [["a"]]}, "history[0]: must be a pair [user, assistant]"),
    "history empty": (GOOD | {"history": [["a", "b"], ["c", ""]]}, "history[1][1]: empty answer"),
    "surrogate": (GOOD | {"output": "\ud800"}, "output: an unpaired surrogate, which is no character"),
}

MESSAGE_FAULTS = {
    "no list": ({"messages": "x"}, "messages: must be a list of turns, got text"),
    "empty": (talk(), "messages: empty"),
    "turn no object": (talk("x"), "messages[0]: must be an object, got text"),
    "no role": (talk({"content": "x"}, ANSWER), "messages[0].role: missing"),
    "no content": (talk(USER, {"role": "assistant"}), "messages[1].content: missing"),
    "null content": (talk(USER, ANSWER | {"content": None}), "messages[1].content: must be text, got null"),
    "role no text": (talk(USER | {"role": 3}, ANSWER), None),
    "unknown role": (talk(USER | {"role": "robot"}, ANSWER), None),
    "assistant first": (talk(ANSWER), "messages[0]: assistant at the beginning; expected system or user"),
    "two users": (talk(USER, USER, ANSWER), "messages[1]: user after user; expected assistant"),
    "two answers": (talk(USER, ANSWER, ANSWER), "messages[2]: assistant after assistant; expected user or tool"),
    "late system": (
        talk(USER, ANSWER, {"role": "system", "content": "s"}, ANSWER),
        "messages[2]: system after assistant; expected user or tool",
    ),
    "tool first": (
        talk({"role": "tool", "content": ""}),
        "messages[0]: tool at the beginning; expected system or user",
    ),
    "no answer at the end": (talk(USER, ANSWER, USER), "messages[2]: the last turn is user; expected assistant"),
    "system only": (talk({"role": "system", "content": "s"}), "messages: only a system turn"),
    "empty answer": (talk(USER, ANSWER | {"content": "  "}), "messages[1].content: empty answer"),
    "empty question": (talk(USER | {"content": ""}, ANSWER), "messages[0].content: empty"),
    "two systems": (
        talk({"role": "system", "content": "s"}, USER, ANSWER) | {"system": "t"},
        "messages[0]: system after system; expected user",
    ),
    "both keys": (
        talk(USER, ANSWER) | {"conversations": []},
        "messages: stands beside conversations; only one of them is allowed",
    ),
    "tool calls": (
        talk(USER, ANSWER | {"tool_calls": [{"id": 1}]}),
        "messages[1].tool_calls: not supported; write the call into content",
    ),
    "weight": (talk(USER, ANSWER | {"weight": 0}), "messages[1].weight: 0 is not supported; every answer is learnt"),
    "sharegpt role": (chat(("user", "q"), ("bot", "a")), None),
    "tools": (talk(USER, ANSWER) | {"tools": 3}, "tools: must be text or a list, got a number"),
}


@pytest.mark.parametrize("name", ALPACA_FAULTS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_alpaca_faults(write, name, suffix):
    row, reason = ALPACA_FAULTS[name]
    rows = [json.dumps(each) for each in (GOOD, row, GOOD)]
    file = write("\n".join(rows) if suffix == "jsonl" else "[" + ",\n".join(rows) + "]", f"x.{suffix}")
    assert reasons(file) == [(2, reason)]
    assert str(read([file]).bad_rows[0]) == f"{file}:2: {reason}"
    assert read([file]).num_rows == 3


@pytest.mark.parametrize("name", MESSAGE_FAULTS)
def test_message_faults(write, name):
    row, reason = MESSAGE_FAULTS[name]
    ((at, found),) = reasons(write([talk(USER, ANSWER), row, talk(USER, ANSWER)]))
    assert at == 2
    if reason is None:
        assert "unknown role" in found
        assert "known are system, user, human, assistant, gpt" in found
    else:
        assert found == reason


def test_text_faults(write):
    file = write([{"text": "a"}, {"text": " "}, {"text": 3}])
    assert reasons(file) == [(2, "text: empty"), (3, "text: must be text, got a number")]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"instruction": "a" "output": "b"}', "invalid JSON: Expecting ',' delimiter at column 21"),
        (b'{"instruction": "a", "output": "b"', "invalid JSON: Expecting ',' delimiter at column 35"),
        (b'{"instruction": "a", "output": "b', "invalid JSON: Unterminated string starting at column 32"),
        (b"not json", "invalid JSON: Expecting value at column 1"),
        (b'["a"]', "expected an object, got a list"),
        (b'"a"', "expected an object, got text"),
        (b"null", "expected an object, got null"),
        (line(GOOD).encode() * 2, "invalid JSON: a second value at column 55; one object per line"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', "output: duplicate key"),
        (b'{"instruction": "a", "output": NaN}', "output: NaN and Infinity are not JSON"),
        (b'{"instruction": "a", "output": "b", "x": [-Infinity]}', "NaN and Infinity are not JSON"),
        (b'{"instruction": "a", "output": "b\xff"}', "invalid UTF-8 at byte 34"),
        (b'{"instruction": "a", "output": "\xed\xa0\x80"}', "invalid UTF-8 at byte 33"),
        (b'{"instruction": "a", "output": "b", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
        (b'{"instruction": "a", "output": "b", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper than 64"),
        (b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b"", "blank line; only allowed at the end of the file"),
        (b" \t", "blank line; only allowed at the end of the file"),
        (b"\xef\xbb\xbf{}", "invalid JSON: Expecting value at column 1"),
    ],
)
def test_lines_that_are_no_rows(write, bad, reason):
    good = line(GOOD).encode()
    assert reasons(write(good + b"\n" + bad + b"\n" + good)) == [(2, reason)]


def test_brackets_inside_strings_are_not_depth(write):
    assert read([write([GOOD | {"output": "[" * 1000}])]).bad_rows == ()


def test_huge_rows(write):
    fits = GOOD | {"output": "x" * (MAX_ROW_BYTES - len(line(GOOD)) + 2)}
    assert len(line(fits)) == MAX_ROW_BYTES
    over = GOOD | {"output": "x" * (MAX_ROW_BYTES - len(line(GOOD)) + 3)}
    far_over = GOOD | {"output": "x" * (2 * MAX_ROW_BYTES)}
    for name, first in (("x.jsonl", 1), ("x.json", 2)):
        result = read([write([fits, over, GOOD, far_over, GOOD], name)])
        assert [(row.line - first, row.reason) for row in result.bad_rows] == [
            (1, "a row of 10,000,001 bytes; at most 10,000,000"),
            (3, f"a row of {len(line(far_over)):,} bytes; at most 10,000,000"),
        ]
        assert len(result.examples) == 3
        assert all(len(row.raw) <= 2000 for row in result.bad_rows)


def test_all_problems_are_collected(write):
    rows = [GOOD | {"output": ""} for _ in range(300)]
    result = read([write(rows)])
    assert [row.line for row in result.bad_rows] == list(range(1, 301))
    assert result.bad_rows[0].kind == "output: empty answer"


def test_many_problems_of_one_row_are_shortened(write):
    row = chat(*[("robot", 5)] * 20)
    ((_, reason),) = reasons(write([row]))
    assert reason.endswith("; 35 more problems")


def test_hostile_rows_cannot_disturb_a_terminal_or_take_forever(write):
    keys = json.dumps({"\x1b[31m\n": 1, "\ud800": 2})
    twice = "{" + ", ".join(f'"k{i % 50_000}": 1' for i in range(100_000)) + "}"
    turns = json.dumps(talk(*[USER, ANSWER] * 50_000))
    history = json.dumps(GOOD | {"history": [["a", "b"]] * 50_000})
    result = read([write("\n".join([json.dumps(GOOD), keys, twice, history])), write(turns, "b.jsonl")])
    assert [row.reason[:38] for row in result.bad_rows] == [
        "instruction: missing; output: missing",
        "k0: duplicate key; k1: duplicate key; ",
        "history: 50,000 pairs; at most 500",
        "messages: 100,000 turns; at most 1,000",
    ]
    unknown = read([write(keys, "c.jsonl")]).bad_rows
    assert unknown[0].reason.startswith("keys ?[31m?, ?: no known format")
    for row in (*result.bad_rows, *unknown):
        assert str(row).isprintable()
        assert len(row.reason) < 1100
        json.dumps(row.reason, ensure_ascii=False).encode()


# --- files


def test_json_list_with_line_numbers(write):
    text = '[\n {"instruction": "a",\n  "output": "b"},\n\n {"instruction": "c",\n  "output": 3}, {"text": ""}\n]\n'
    result = read([write(text, "x.json")])
    assert [example.line for example in result.examples] == [2]
    assert [row.line for row in result.bad_rows] == [5, 6]


def test_faults_inside_a_list_do_not_end_it(write):
    rows = ['{"instruction": "a", "instruction": "a", "output": NaN}', "7", line(GOOD)]
    rows.insert(1, '{"instruction": "a", "output": "b", "x": ' + "[" * 5000 + "]" * 5000 + "}")
    result = read([write("[" + ",\n".join(rows) + "]", "x.json")])
    assert [(row.line, row.reason) for row in result.bad_rows] == [
        (1, "instruction: duplicate key; output: NaN and Infinity are not JSON"),
        (2, "nested deeper than 64"),
        (3, "expected an object, got a number"),
    ]
    assert [example.line for example in result.examples] == [4]
    assert result.incomplete == ()


def test_invalid_utf8_inside_a_list_is_one_row(write):
    text = (
        b"[" + b",\n".join([line(GOOD).encode(), b'{"instruction": "a", "output": "\xff"}', line(GOOD).encode()]) + b"]"
    )
    result = read([write(text, "x.json")])
    assert [(row.line, row.reason) for row in result.bad_rows] == [(2, "invalid UTF-8")]
    assert len(result.examples) == 2


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ('\n{"instruction": }]', "invalid JSON: Expecting value at line 2 column 17"),
        ("", None),
        ("\n] trailing", "invalid JSON: more text after the list"),
        ("\n7 8]", "invalid JSON: expected ',' or ']' after a row"),
    ],
)
def test_a_list_that_breaks_off_is_incomplete(write, tail, reason):
    comma = "" if tail.startswith("\n]") else ","
    file = write("[" + line(GOOD) + comma + tail, "x.json")
    result = read([file])
    assert result.incomplete == (file,)
    assert len(result.examples) == 1
    last = result.bad_rows[-1]
    assert last.reason.endswith("; the rest of the list was not read")
    if reason:
        assert last.reason.startswith(reason)
        assert last.line == 2


def test_bom_and_blank_end_are_noted(write):
    result = read([write(b"\xef\xbb\xbf" + line(GOOD).encode() + b"\r\n\r\n\n")])
    assert len(result.examples) == 1
    assert result.bad_rows == ()
    assert [note.split(": ", 1)[1] for note in result.notes] == [
        "begins with a byte-order mark, which is ignored",
        "2 blank line(s) at the end are ignored",
    ]
    assert len(read([write(b"\xef\xbb\xbf[" + line(GOOD).encode() + b"]", "b.json")]).examples) == 1


def test_gzip(write):
    assert len(read([write([GOOD] * 3, "a.jsonl.gz"), write([GOOD] * 2, "b.json.gz")]).examples) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n\n", "has no rows"),
        ("x.jsonl", b"\xef\xbb\xbf", "has no rows"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b"[ \n ]", "has no rows"),
        ("x.json", b'{"text": "a"}', "one object; if it has one object per line, name it .jsonl"),
        ("x.json", b"text", "must hold one list of objects"),
        ("x.csv", b"a,b", "unknown kind of file; readable are .json, .jsonl, .json.gz, .jsonl.gz"),
        ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_cannot_be_used(write, name, content, message):
    file = write(content, name)
    with pytest.raises(DataError) as caught:
        read([file])
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_missing_files_are_named_together(tmp_path):
    with pytest.raises(DataError) as caught:
        read([str(tmp_path / "a.json"), str(tmp_path)])
    assert (
        str(caught.value) == f"{tmp_path / 'a.json'}: does not exist\n{tmp_path}: is a directory; give the files in it"
    )
    with pytest.raises(DataError, match="no data files"):
        read([])


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"".join(line(GOOD | {"id": i}).encode() + b"\n" for i in range(5000)))
    path = tmp_path / "x.jsonl.gz"
    for content in (whole[: len(whole) // 2], b"no gzip at all", whole[:20] + b"\xff" * 50 + whole[70:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl\.gz: damaged gzip file after line"):
            read([str(path)])


def test_a_list_in_a_jsonl_file_gets_a_hint(write):
    result = read([write("[\n" + line(GOOD) + "\n]")])
    assert result.bad_rows[0].reason.endswith("; a file with one list ends in .json")


# --- real files


def test_stanford_alpaca_names_its_28_empty_outputs(shared):
    file = str(shared / "alpaca" / "alpaca_en_52k.jsonl.gz")
    result = read([file])
    assert result.num_rows == 52002
    assert {row.reason for row in result.bad_rows} == {"output: empty answer"}
    lines = [row.line for row in result.bad_rows]
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        assert lines == [n for n, text in enumerate(stream, 1) if not json.loads(text)["output"].strip()]
    assert len(lines) == 28
    assert lines[:3] == [285, 1224, 1348]


@pytest.mark.parametrize(
    ("file", "format", "rows"),
    [
        ("alpaca/alpaca_gpt4_zh_demo1000.jsonl", "alpaca", 1000),
        ("sft_other/oasst_sft_zh.json", "alpaca", 689),
        ("llamafactory_demo/identity.json", "alpaca", 91),
        ("llamafactory_demo/glaive_toolcall_zh_demo.json", "messages", 300),
        ("pretrain/chinese_poetry_classics.jsonl.gz", "text", 12555),
    ],
)
def test_real_files_are_clean(shared, file, format, rows):
    result = read([str(shared / file)])
    assert result.bad_rows == ()
    assert list(result.formats_by_file.values()) == [format]
    assert len(result.examples) == rows
