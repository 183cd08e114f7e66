"""The findings about files, as text and as JSON."""

import json

import pytest

from fitune.config import DataConfig
from fitune.data.doctor import examine, render_text, to_json
from fitune.errors import DataError


def row(i=0, output="answer"):
    return {"instruction": f"question {i}", "output": output}


@pytest.fixture
def report(write, toy):
    rows = [row(0), row(1, ""), row(2, "x" * 100), row(0), {"instruction": "y" * 90, "output": "late"}, {"text": "no"}]
    return examine([write(rows)], DataConfig(max_length=64), toy)


def test_counts(report):
    assert (report.num_rows, report.num_bad_rows) == (6, 2)
    assert [bad.line for bad in report.bad_rows] == [2, 6]
    assert report.template == "tutorial"
    assert report.num_supervised == 7 + 101 + 7 + 5
    assert sum(count for _, _, count in report.histogram) == 4
    assert report.histogram[0] == (20, 40, 2)
    assert report.lengths["max"] == 131


def test_cuts(report):
    cuts = report.cuts
    assert (cuts.num_rows, cuts.num_answers, cuts.num_cut_answers, cuts.num_hopeless_rows) == (2, 4, 2, 1)
    assert cuts.num_lost_supervised == 101 - (64 - 30) + 5
    assert cuts.max_length_for_all == 131


def test_a_conversation_counts_each_answer(write, toy):
    turns = [{"role": role, "content": "x" * 10} for role in ("user", "assistant") * 3]
    file = write([{"messages": turns}])
    whole = examine([file], DataConfig(), toy)
    assert (whole.cuts.num_answers, whole.cuts.num_rows) == (3, 0)
    for max_length, lost in ((50, 2), (41, 2), (40, 2), (39, 2), (38, 3)):
        cuts = examine([file], DataConfig(max_length=max_length), toy).cuts
        end = len("Human: " + "x" * 10 + "\n\nAssistant: " + "x" * 10) + 1
        assert cuts.num_cut_answers == (3 if max_length < end else 2), (max_length, lost)
    needed = whole.cuts.max_length_for_all
    assert examine([file], DataConfig(max_length=needed), toy).cuts.num_rows == 0
    assert examine([file], DataConfig(max_length=needed - 1), toy).cuts.num_cut_answers == 1


def test_duplicates_and_examples(report):
    ((first, again),) = report.duplicates
    assert (first.rsplit(":", 1)[1], again.rsplit(":", 1)[1]) == ("1", "4")
    assert len(report.examples) == 3
    assert report.examples[0][1] == "Human: question 0\n\nAssistant: ⟦answer<eos>⟧"


def test_unknown_characters(write, toy):
    report = examine([write([{"text": "abc你"}])], DataConfig(), toy)
    assert (report.num_tokens, report.num_byte_tokens, report.num_unknown_tokens) == (7, 3, 0)
    assert report.template is None


def test_long_texts_are_split_not_cut(write, toy):
    report = examine([write([{"text": "a" * 30}, {"text": "b"}])], DataConfig(max_length=8), toy)
    assert (report.cuts.num_split_texts, report.cuts.num_windows, report.cuts.num_rows) == (1, 4, 0)
    assert "1 text longer than max_length 8: split into 4 rows" in render_text(report)


def test_text(report):
    text = render_text(report)
    for line in (
        "rows        6: 4 good, 2 bad",
        "2 bad rows, by reason:",
        f"  {report.files[0]}:2: output: empty answer",
        "max_length 64 cuts 2 of 4 answers (50.0%) in 2 rows: they lose their end, the end-of-sequence token included",
        "  data.on_long_rows=truncate would keep 1 of these rows, lose 72 supervised tokens, and reject 1 row "
        "with none left",
        "  data.on_bad_rows=quarantine would train without them; now set: data.on_bad_rows=refuse",
        "  data.on_long_rows=quarantine would train without 2 rows",
        "  data.max_length=131 keeps every answer whole",
        "1 row repeating an earlier row exactly:",
        "Human: question 0",
        "Assistant: ⟦answer<eos>⟧",
    ):
        assert line in text.splitlines(), text
    assert "\x1b" not in text


def test_json_has_everything(write, toy):
    file = write([row(i, "") for i in range(150)] + [row(1)])
    report = examine([file], DataConfig(), toy)
    tree = json.loads(to_json(report))
    assert len(tree["bad_rows"]) == tree["num_bad_rows"] == 150
    assert tree["bad_rows"][7] | {"row": ""} == {"file": file, "line": 8, "reason": "output: empty answer", "row": ""}
    assert tree["bad_by_reason"] == {"output: empty answer": 150}
    text = render_text(report)
    assert text.count(": output: empty answer") == 100
    assert "... and 50 more (--json has all)" in text
    assert "max_length 1,024 cuts no answer" in text


def test_only_bad_rows(write, toy):
    report = examine([write([row(0, "")])], DataConfig(), toy)
    assert report.num_bad_rows == 1
    assert "1 bad row, by reason:" in render_text(report)
    with pytest.raises(DataError, match="does not exist"):
        examine(["missing.jsonl"], DataConfig(), toy)


def test_real_files(shared, real):
    files = [str(shared / name) for name in ("sft_other/oasst_sft_zh.json", "llamafactory_demo/identity.json")]
    report = examine(files, DataConfig(max_length=512), real("llama3"))
    assert report.num_bad_rows == 0
    assert len(report.duplicates) == 5
    assert report.cuts.num_rows > 0
    wide = examine(files, DataConfig(max_length=report.cuts.max_length_for_all), real("llama3"))
    assert wide.cuts.num_rows == 0


def test_control_characters_stay_out_of_the_terminal(write, toy):
    report = examine([write([row(0, "\x1b[31mred\x07\ttab")])], DataConfig(), toy)
    assert "⟦�[31mred�\ttab<eos>⟧" in render_text(report)


def test_loss_on_all_learns_and_marks_the_whole_conversation(write, toy):
    turns = [{"role": role, "content": "x" * 10} for role in ("user", "assistant") * 3]
    files = [write([{"messages": turns}], "a.jsonl"), write([row(0)], "b.jsonl")]
    report = examine(files, DataConfig(loss_on="all", max_length=50), toy)
    assert report.num_supervised == report.num_tokens - 2, "all but the first token of each row"
    assert report.examples[1][1] == "H⟦uman: question 0\n\nAssistant: answer<eos>⟧"
    assert (report.cuts.num_answers, report.cuts.num_cut_answers, report.cuts.num_hopeless_rows) == (2, 1, 0)
    assert "max_length 50 cuts 1 of 2 conversations (50.0%) in 1 row:" in render_text(report)


def test_conversations_that_are_all_bad_are_no_raw_text(write, toy):
    text = render_text(examine([write([{"messages": []}])], DataConfig(), toy))
    assert "template    none (no row is a good conversation)" in text.splitlines()
    text = render_text(examine([write([{"text": "a"}])], DataConfig(), toy))
    assert "template    none (raw text)" in text.splitlines()


def test_the_histogram_starts_where_rows_are(write, toy):
    report = examine([write([row(0, "x" * 1000)])], DataConfig(), toy)
    assert report.histogram == ((1000, 1100, 1),)


def test_json_shortens_long_rows(write, toy):
    report = examine([write([row(0, "") | {"input": "x" * 5000}])], DataConfig(), toy)
    assert len(json.loads(to_json(report))["bad_rows"][0]["row"]) == 2000
