"""Rows token by token: what `fitune data --render` shows, as a table and as JSON."""

import json

import pytest

from fitune import cli
from fitune.config import DataConfig
from fitune.data.doctor import examine, render_text, to_json
from fitune.data.row_view import RowView, TokenView, table, view
from fitune.data.rows import encode
from fitune.data.sources import read
from fitune.data.templates import resolve_template

ROW = {"instruction": "a b", "output": "你\n"}


@pytest.fixture
def first_row(write, toy):
    examples = read([write([ROW])]).examples
    return next(row for _, row in encode(examples, toy, resolve_template("chatml", toy)))


def test_each_token_has_its_id_mark_and_place(first_row, toy):
    shown = view(first_row, toy)
    assert [token.id for token in shown.tokens] == first_row.input_ids.tolist()
    assert [token.learnt for token in shown.tokens] == [flag == 1 for flag in first_row.learn]
    assert [token.positions["position"] for token in shown.tokens] == list(range(len(shown.tokens)))
    assert [token.sees for token in shown.tokens] == list(range(1, len(shown.tokens) + 1))
    assert shown.num_supervised == sum(token.learnt for token in shown.tokens) == 5
    assert shown.tokens[0].token == "<|im_start|>"


def test_the_table_is_safe_and_aligned(first_row, toy):
    title, head, *lines = table(view(first_row, toy))
    assert title.endswith(f"rows.jsonl:1: {len(lines)} tokens, 5 learnt")
    assert len({line.index(line.split()[-1]) for line in lines}) == 1, "texts begin in one column"
    assert "  ".join(line.split()[-1] for line in lines[1:8]) == "u  s  e  r  \\n  a  ␣"
    assert [line.count("*") for line in lines] == [int(flag) for flag in first_row.learn]
    assert head.split() == ["#", "id", "learnt", "position", "sees", "token"]
    assert all(character.isprintable() for line in lines for character in line)


def test_two_rows_of_positions_and_a_prefix():
    """As ChatGLM-6B has them: the mask is drawn as well."""
    context, answer, sees = [0, 1, 2, 2, 2], [0, 0, 0, 1, 2], [3, 3, 3, 4, 5]
    tokens = [TokenView(i, "t", i > 2, {"context": context[i], "answer": answer[i]}, sees[i]) for i in range(5)]
    _, head, *lines = table(RowView("f:1", 2, tuple(tokens)))
    assert head.split() == ["#", "id", "learnt", "context", "answer", "sees", "token"]
    assert lines[4].split() == ["4", "4", "*", "2", "2", "5", "t"]
    assert [line.strip() for line in lines[-5:]] == ["███··", "███··", "███··", "████·", "█████"]


def test_the_doctor_shows_as_many_as_were_asked_for(write, toy):
    file = write([ROW, {"instruction": "bad", "output": ""}, ROW, ROW])
    assert examine([file], DataConfig(), toy).rendered == ()
    report = examine([file], DataConfig(), toy, render=2)
    assert [row.source.rsplit(":", 1)[1] for row in report.rendered] == ["1", "3"]
    assert report.examples == ()
    assert render_text(report).count("tokens, 5 learnt") == 2
    (first, second) = json.loads(to_json(report))["rendered"]
    assert first["tokens"] == second["tokens"]
    keys = {"id", "token", "learnt", "positions", "sees"}
    assert all(token.keys() == keys for token in first["tokens"])


def test_the_command(write, capsys):
    file = write([ROW, ROW])
    for arguments, count in (([], 0), (["--render"], 1), (["--render", "2"], 2), (["--render", "9"], 2)):
        assert cli.main(["data", file, *arguments]) == 0
        assert capsys.readouterr().out.count("learnt  position") == count
    with pytest.raises(SystemExit):
        cli.main(["data", file, "--render", "0"])
    assert "0 is no number of rows; a whole number from 1 to 10000" in capsys.readouterr().err


def test_sentencepiece_spelling(real):
    ids = real("chatglm3").encode("hi 你\n")
    assert [real("chatglm3").spell(i) for i in ids] == ["▁hi", "▁你", "<0x0A>"]
    qwen = real("qwen2.5")
    assert [qwen.spell(i) for i in qwen.encode("hi 你好")] == ["hi", " ", "你好"]
    assert all(qwen.spell(i) for i in qwen.encode("𠮷")), "bytes of a character as the vocabulary writes them"
