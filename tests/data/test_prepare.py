"""Rows of a run: masks, lengths, the split, the fingerprint, and nothing dropped without being counted."""

import hashlib
import json
import struct
from array import array
from itertools import pairwise
from pathlib import Path

import pytest

from fitune.config import DataConfig
from fitune.data.example import BadRow
from fitune.data.prepare import Row, percentile, prepare, write_rejected
from fitune.errors import CheckpointError, ConfigError, DataError


def row(i=0, output="answer"):
    return {"instruction": f"question {i}", "output": output}


def config(*files, **settings):
    return DataConfig(train=files, **settings)


def test_row_counts_what_is_predicted():
    assert Row(array("i", [5, 6, 7]), b"\1\0\1", "f:1").num_supervised == 1
    assert Row(array("i", [5, 6, 7]), b"\0\1\1", "f:1").num_tokens == 3


def test_answers_or_all(write, toy):
    file = write([row()])
    (answers,) = prepare(config(file), toy).train
    (everything,) = prepare(config(file, loss_on="all"), toy).train
    assert answers.input_ids == everything.input_ids
    learnt = [i for i, flag in zip(answers.input_ids, answers.learn, strict=True) if flag]
    assert learnt == [*toy.encode("answer"), toy.eos_id]
    assert everything.learn == b"\0" + b"\1" * (everything.num_tokens - 1)
    assert answers.source == f"{file}:1"


def test_text_is_cut_into_windows_that_keep_every_token(write, make_tokenizer):
    toy = make_tokenizer(bos_first=True)
    texts = ["x" * n for n in (1, 5, 6, 7, 13, 14, 15, 22, 40)]
    data = prepare(config(write([{"text": text} for text in texts]), max_length=8), toy)
    by_line: dict[str, list[Row]] = {}
    for each in data.train:
        by_line.setdefault(each.source, []).append(each)
    assert len(by_line) == len(texts)
    for text, rows in zip(texts, by_line.values(), strict=True):
        whole = [i for each in rows for i in each.input_ids]
        assert whole == [toy.bos_id, *toy.encode(text), toy.eos_id]
        assert all(2 <= each.num_tokens <= 8 for each in rows)
        assert all(each.learn == b"\0" + b"\1" * (each.num_tokens - 1) for each in rows)
    assert data.summary["split_texts"] == 6


def test_text_needs_an_end_of_sequence(write, make_tokenizer):
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        prepare(config(write([{"text": "a"}])), make_tokenizer(eos_token=None))


def test_bad_rows_are_refused_with_their_places(write, toy):
    file = write([row(), row(1, ""), {"instruction": "x"}] + [row(i, " ") for i in range(200)])
    with pytest.raises(DataError) as caught:
        prepare(config(file), toy)
    message = str(caught.value)
    assert message.startswith(f"202 bad rows:\n  {file}:2: output: empty answer\n  {file}:3: output: missing\n")
    assert message.count(": output: empty answer") == 99
    assert "... and 102 more" in message
    assert "data.on_bad_rows=quarantine" in message


def test_quarantine_keeps_count(write, toy, tmp_path):
    file = write([row(), row(1, ""), {"instruction": "x"}, row(2)])
    data = prepare(config(file, on_bad_rows="quarantine"), toy)
    assert [each.source for each in data.train] == [f"{file}:1", f"{file}:4"]
    assert [(bad.line, bad.reason) for bad in data.rejected] == [(2, "output: empty answer"), (3, "output: missing")]
    assert data.summary["rejected_by_reason"] == {"output: empty answer": 1, "output: missing": 1}
    write_rejected(tmp_path / "rejected.jsonl", data.rejected)
    first, second = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert second == {"file": file, "line": 3, "reason": "output: missing", "row": '{"instruction": "x"}'}
    assert json.loads(first["row"]) == row(1, "")


def test_rejected_rows_with_broken_bytes_can_be_written(write, toy, tmp_path):
    file = write(b'{"instruction": "\xff", "output": "a"}\n' + json.dumps(row()).encode())
    data = prepare(config(file, on_bad_rows="quarantine"), toy)
    write_rejected(tmp_path / "rejected.jsonl", data.rejected)
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["reason"] == "invalid UTF-8 at byte 18"


def test_a_file_that_breaks_off_is_refused_even_in_quarantine(write, toy):
    file = write("[" + json.dumps(row()) + ',\n{"instruction"', "x.json")
    with pytest.raises(DataError, match=r"could not be read to the end; repair it first"):
        prepare(config(file, on_bad_rows="quarantine"), toy)


def test_rows_that_the_template_refuses_are_bad_rows(write, make_tokenizer):
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    toy = make_tokenizer(chat_template=source + "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ '' }}")
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    file = write([talk | {"system": "s"}])
    with pytest.raises(DataError, match=r":1: template model refuses the conversation: no system turn"):
        prepare(config(file), toy)


def test_long_rows_are_refused_by_name(write, toy):
    file = write([row(), row(1, "x" * 100), row(2, "y" * 50)])
    with pytest.raises(DataError) as caught:
        prepare(config(file, max_length=64), toy)
    message = str(caught.value)
    assert message.startswith("2 rows are longer than data.max_length 64, which would cut the answer:")
    assert f"{file}:2: 131 tokens" in message
    assert "data.max_length=131" in message
    assert len(prepare(config(file, max_length=131), toy).train) == 3


def test_bad_and_long_rows_are_reported_together(write, toy):
    file = write([row(0, ""), row(1, "x" * 100)])
    with pytest.raises(DataError, match=r"(?s)1 bad row:.*:1: output: empty.*1 row is longer"):
        prepare(config(file, max_length=64), toy)


def test_truncation_keeps_what_is_supervised(write, toy):
    file = write([row(), row(1, "x" * 100), {"instruction": "q" * 100, "output": "a"}])
    settings = {"max_length": 64, "on_long_rows": "truncate"}
    with pytest.raises(
        DataError, match=r":3: no answer token fits data\.max_length=64 \(the row has 12\d tokens\); raise"
    ):
        prepare(config(file, **settings), toy)
    data = prepare(config(file, **settings, on_bad_rows="quarantine"), toy)
    cut = data.train[1]
    assert cut.num_tokens == 64
    assert toy.eos_id not in cut.input_ids
    assert cut.num_supervised == 64 - len("Human: question 1\n\nAssistant: ")
    assert data.summary["truncated_rows"] == 1
    assert len(data.rejected) == 1


def test_long_rows_can_be_quarantined(write, toy):
    file = write([row(), row(1, "x" * 100)])
    data = prepare(config(file, max_length=64, on_long_rows="quarantine"), toy)
    assert [str(bad) for bad in data.rejected] == [f"{file}:2: longer than data.max_length=64 (the row has 131 tokens)"]
    assert json.loads(data.rejected[0].raw) == row(1, "x" * 100)


def test_an_end_that_nobody_learns_from_is_no_reason_to_refuse(write, toy):
    file = write([row()])
    whole = prepare(config(file, template="chatml"), toy).train[0]
    assert whole.learn[-1] == 0, "the newline after the answer"
    cut = prepare(config(file, template="chatml", max_length=whole.num_tokens - 1), toy).train[0]
    assert cut.learn == whole.learn[:-1]
    with pytest.raises(DataError, match="1 row is longer"):
        prepare(config(file, template="chatml", max_length=whole.num_tokens - 2), toy)


# --- the split


def test_the_split_is_by_content_not_by_order(write, toy):
    rows = [row(i) for i in range(40)]
    one = prepare(config(write(rows, "a.jsonl"), eval=0.2), toy)
    two = prepare(config(write(rows[::-1], "b.jsonl"), eval=0.2), toy)
    assert len(one.eval) == 8
    assert {each.digest() for each in one.eval} == {each.digest() for each in two.eval}
    assert len(one.train) + len(one.eval) == 40


def test_identical_rows_stay_together(write, toy):
    data = prepare(config(write([row(i % 10) for i in range(40)]), eval=0.25), toy)
    assert len(data.eval) == 8
    assert not {each.digest() for each in data.eval} & {each.digest() for each in data.train}
    assert data.summary["eval_rows_also_in_train"] == 0


def test_windows_of_one_text_stay_together(write, toy):
    data = prepare(config(write([{"text": chr(97 + i) * 30} for i in range(10)]), max_length=8, eval=0.3), toy)
    assert not {each.source for each in data.eval} & {each.source for each in data.train}
    assert len({each.source for each in data.eval}) == 3


def test_a_split_that_leaves_nothing_is_refused(write, toy):
    with pytest.raises(DataError, match="no held-out rows"):
        prepare(config(write([row()] * 10), eval=0.1), toy)
    with pytest.raises(DataError, match=r"no training rows are left of .*; 1 were rejected"):
        prepare(config(write([row(0, "")]), on_bad_rows="quarantine"), toy)
    with pytest.raises(DataError, match="no data files"):
        prepare(config(), toy)


def test_held_out_files(write, toy):
    train, held_out = write([row(i) for i in range(4)], "a.jsonl"), write([row(3), row(9), row(5, "")], "b.jsonl")
    data = prepare(config(train, eval=held_out, on_bad_rows="quarantine"), toy)
    assert [len(data.train), len(data.eval), len(data.rejected)] == [4, 2, 1]
    assert data.summary["eval_rows_also_in_train"] == 1
    assert data.summary["formats"] == {train: "alpaca", held_out: "alpaca"}


# --- fingerprint and summary


def test_fingerprint_follows_ids_marks_order_and_split(write, toy):
    rows = [row(i) for i in range(6)]
    base = prepare(config(write(rows, "a.jsonl")), toy).fingerprint
    assert prepare(config(write(rows, "elsewhere.json")), toy).fingerprint == base
    others = [
        prepare(config(write(rows[::-1], "b.jsonl")), toy),
        prepare(config(write(rows[:-1], "c.jsonl")), toy),
        prepare(config(write(rows, "d.jsonl"), loss_on="all"), toy),
        prepare(config(write(rows, "e.jsonl"), template="alpaca"), toy),
        prepare(config(write(rows, "f.jsonl"), eval=0.2), toy),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


def test_digest_is_the_same_on_every_machine():
    digest = Row(array("i", [1, 2, 70000]), b"\0\1\1", "f:1").digest()
    assert digest == hashlib.sha256(struct.pack("<3i", 1, 2, 70000) + b"\0\1\1").digest()


def test_summary_is_json_and_adds_up(write, toy):
    file = write([row(i) | {"id": i} for i in range(10)] + [row(11, "")])
    summary = prepare(config(file, on_bad_rows="quarantine", eval=0.2), toy).summary
    again = json.loads(json.dumps(summary))
    assert again["rows_read"] == again["train_rows"] + again["eval_rows"] + again["rejected_rows"] == 11
    assert again["extra_keys"] == {"id": 10}
    assert again["train_tokens"] > again["train_supervised_tokens"] == 8 * len("answer.")


def test_percentiles_are_nearest_rank():
    numbers = list(range(1, 101))
    assert [percentile(numbers, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7], 0.5) == 7
    assert percentile([], 0.5) == 0


def test_real_data_with_a_real_tokenizer(shared, real):
    for name in ("qwen2.5", "llama3"):
        data = prepare(config(str(shared / "alpaca" / "alpaca_gpt4_zh_demo1000.jsonl"), eval=0.05), real(name))
        assert (len(data.train), len(data.eval)) == (950, 50)
        assert all(each.input_ids[-1] in (*real(name).stop_ids, 198) for each in data.train)
        assert all(sum(a < b for a, b in pairwise(each.learn)) == 1 for each in data.train)


# --- rows that do not fit


def test_rows_of_which_nothing_fits_are_named_as_such(write, toy):
    file = write([row(), row(1, "x" * 100), {"instruction": "q" * 100, "output": "a" * 3000}])
    with pytest.raises(DataError) as caught:
        prepare(config(file, max_length=64, on_long_rows="truncate"), toy)
    message = str(caught.value)
    assert message.startswith("1 row of which truncation keeps nothing to learn:")
    assert ":3: no answer token fits data.max_length=64 (the row has 3,121 tokens); raise data.max_length" in message
    assert "Set data.max_length=3121 to keep them whole, or data.on_bad_rows=quarantine" in message
    assert "Repair" not in message
    with pytest.raises(DataError, match=r"\(1 of them would keep no answer token and could only be quarantined\)"):
        prepare(config(file, max_length=64), toy)
    with pytest.raises(DataError) as caught:
        prepare(config(write([row(), row(1, "x" * 100)]), max_length=64), toy)
    assert "only be quarantined" not in str(caught.value)


@pytest.mark.parametrize("on_long_rows", ["truncate", "quarantine"])
def test_rejected_long_rows_can_be_fed_again(write, toy, tmp_path, on_long_rows):
    long = {"instruction": "q" * 100, "output": "a" * 3000, "id": 7}
    settings = {"on_long_rows": on_long_rows, "on_bad_rows": "quarantine"}
    data = prepare(config(write([row(), long]), max_length=64, **settings), toy)
    write_rejected(tmp_path / "rejected.jsonl", data.rejected)
    (again,) = [json.loads(line)["row"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert json.loads(again) == long
    assert len(prepare(config(write(again, "again.jsonl"), max_length=4000), toy).train) == 1


def test_rows_that_the_template_refuses_keep_their_json(write, make_tokenizer):
    toy = make_tokenizer(chat_template="{{ raise_exception('no') }}")
    file = write([row()])
    with pytest.raises(DataError, match=r"no training rows are left"):
        prepare(config(file, on_bad_rows="quarantine"), toy)
    with pytest.raises(DataError, match=r"refuses the conversation: no; data\.template=tutorial takes it"):
        prepare(config(file), toy)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_checkpoint_error():
    bad = [BadRow("f", 1, "reason", "x")]
    with pytest.raises(CheckpointError, match=r"^disk: cannot write /dev/full: No space left on device; choose"):
        write_rejected(Path("/dev/full"), bad)
    with pytest.raises(CheckpointError, match=r"^disk: cannot write .*: No such file or directory"):
        write_rejected(Path("missing/rejected.jsonl"), bad)


def test_reasons_in_the_summary_are_limited(write, toy):
    bad = [{"messages": [{"role": f"r{i}", "content": "q"}]} for i in range(300)]
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    counts = prepare(config(write([good, *bad]), on_bad_rows="quarantine"), toy).summary["rejected_by_reason"]
    assert len(counts) == 101
    assert counts["other reasons"] == 200
