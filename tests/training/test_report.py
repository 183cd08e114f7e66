"""The report: complete, self-contained, inert, and there even when the run is not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fake_run import AFTER, make_run
from fitune.errors import CheckpointError
from fitune.training.record import flat, losses_of, outcome, read_run
from fitune.training.report import write_report

VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects tags and text; refuses anything unbalanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline"), f"<{tag}/> is open in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def report(run: Path) -> tuple[str, Checker]:
    page = write_report(run).read_text(encoding="utf-8")
    return page, check(page)


def write(run: Path, **values: Any) -> None:
    """Replace result.json keys of a run."""
    file = run / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}), encoding="utf-8")


def append(run: Path, *rows: object) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tang-poems", 120)


def test_report_shows_everything(run: Path) -> None:
    page, checker = report(run)
    text = " ".join(checker.text.split())
    for part in (
        "tang-poems", "embedded", "lora", "done", "NVIDIA H100 80GB HBM3", "Held-out loss fell from",
        "Held-out loss, first", "Held-out loss, best", "perplexity", "1.84 GB", "0.67 %", "344,064 of 51.4 M",
        "3 epochs", "44% in loss · 15% padding",
        "Learning rate", "Gradient norm", "Tokens per second", "skipped",
        "Before", "After", "Reference", "Form of 200 generated poems", "0.985", "12,204",
        "non-finite gradient", "and 3 more", "checkpoint of step 120 saved",
        "train rows", "19,140", "files · poems.jsonl", "learning_rate: 0.0002", "# 训练数据", "2.13.0",
    ):  # fmt: skip
        assert part in text, part
    assert "None" not in text
    assert len([tag for tag, _ in checker.tags if tag == "figure"]) == 4
    assert page == write_report(run).read_text(encoding="utf-8")


def test_verse_keeps_its_lines(run: Path) -> None:
    page, _ = report(run)
    assert f'<p class="text han verse" lang="zh-Hans" dir="auto">{AFTER[0]}</p>' in page
    assert '<p class="text empty">' in page


def test_the_page_loads_nothing_and_runs_only_its_own_script(run: Path) -> None:
    page, checker = report(run)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "@import" not in page
    assert "url(" not in page
    for tag, attributes in checker.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "form", "base", "a")
        assert not {"src", "href", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    policy = next(values["content"] for tag, values in checker.tags if values.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(content) == 1
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()}'" in policy


HOSTILE = (
    "</script></title></pre></style><img src=x onerror=alert(1)>\"'><script>alert(2)</script>&lt;"
    "\x00\x1b]8;;\u202e\ud800"
)


def test_hostile_text_anywhere_is_inert(run: Path) -> None:
    page, clean = report(run)
    sample = dict.fromkeys(("prompt", "reference", "before", "after"), HOSTILE)
    (run / "samples.json").write_text(json.dumps([sample, {"prompt": {HOSTILE: 1}}]), encoding="utf-8")
    (run / "config.yaml").write_text(f"model: {{path: '{HOSTILE[:60]}'}}\n# {HOSTILE[:-1]}", encoding="utf-8")
    append(
        run,
        {"kind": "note", "step": HOSTILE, "text": HOSTILE},
        {"kind": "skipped", "step": 7, "reason": HOSTILE, "rows": [HOSTILE] * 3},
        {"kind": HOSTILE, "step": 8},
    )
    write(
        run, status=HOSTILE, device=HOSTILE, data={HOSTILE: {HOSTILE: [HOSTILE]}}, versions={HOSTILE: HOSTILE},
        tables=[{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE, {HOSTILE: HOSTILE}]]}], total_steps=HOSTILE,
    )  # fmt: skip
    page, checker = report(run)
    tags = {tag for tag, _ in checker.tags}
    assert tags <= {tag for tag, _ in clean.tags}
    assert sum(tag == "script" for tag, _ in checker.tags) == 1
    assert not any(name.startswith("on") for _, values in checker.tags for name in values)
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.json", "result.json", "config.yaml"])
def test_each_file_may_be_missing_or_damaged(run: Path, name: str) -> None:
    text = (run / name).read_bytes()
    for content in (None, b"", text[: len(text) // 2], b"\xff\xfe\x00", b"[[[1, 2", b'"text"', b"{}", b"null\n3\n[]"):
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_bytes(content)
        _, checker = report(run)
        assert "tang-poems" in checker.text
    assert "cannot be read" in checker.text or "unreadable" in checker.text or name == "config.yaml"


def test_an_empty_folder_gets_a_report(tmp_path: Path) -> None:
    _, checker = report(tmp_path)
    assert "no result yet" in checker.text
    assert "No loss has been recorded yet." in checker.text
    assert "figure" not in {tag for tag, _ in checker.tags}


@pytest.mark.parametrize(
    ("status", "said"), [("interrupted", "fitune resume"), ("diverged", "non-finite"), ("odd", "odd")]
)
def test_a_run_that_did_not_finish_says_so(run: Path, status: str, said: str) -> None:
    samples = json.loads((run / "samples.json").read_text())
    for sample in samples:
        del sample["after"]
    (run / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    write(run, status=status, total_steps=400)
    _, checker = report(run)
    assert said in checker.text
    assert "of 400" in checker.text
    assert "After" not in checker.text
    assert "Answers of the untrained model;" in checker.text


@pytest.mark.parametrize("num_steps", [1, 2, 19, 20])
def test_short_runs(tmp_path: Path, num_steps: int) -> None:
    _, checker = report(make_run(tmp_path, num_steps))
    assert len([tag for tag, _ in checker.tags if tag == "figure"]) == 4
    assert ("smoothed" in checker.text) == (num_steps >= 20)


def test_one_step_without_evaluation(tmp_path: Path) -> None:
    append(tmp_path, {"kind": "train", "step": 1, "loss": 2.5, "tokens": 10, "seconds": 0})
    _, checker = report(tmp_path)
    assert "Training loss is 2.500, perplexity 12.2." in checker.text


def test_non_finite_numbers_do_not_reach_the_page(run: Path) -> None:
    bad = [float("nan"), float("inf"), -float("inf"), 1e308, None, True, "2.0", 10**400]
    keys = ("loss", "grad_norm", "learning_rate", "tokens", "seconds", "memory_bytes", "epoch")
    append(run, *({"kind": "train", "step": 200 + i, **dict.fromkeys(keys, value)} for i, value in enumerate(bad)))
    append(run, *({"kind": "eval", "step": 200 + i, "loss": value} for i, value in enumerate(bad)))
    append(run, {"kind": "train", "step": float("nan"), "loss": 1.0}, {"kind": "train", "loss": 1.0})
    write(run, peak_memory_bytes=float("nan"), best_eval_loss=float("nan"), tables=[{"rows": [[float("nan")]]}])
    page, _ = report(run)
    body = page[page.index("<body>") : page.index("<script>")]
    assert not re.search(r"\b(nan|inf|infinity)\b", body.lower())


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    page, checker = report(make_run(tmp_path, 10_000))
    assert len(page.encode()) < 120_000
    assert "drawn by the lowest and the highest value" in checker.text


def test_page_stays_below_300_kb_whatever_is_in_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3000)
    text = "诗&" * 5000
    samples = [dict.fromkeys(("prompt", "reference", "before", "after"), text)] * 50
    (run / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    table = {"title": text, "columns": [text] * 50, "rows": [[text[:20]] * 50] * 500}
    many = {f"key {i}": text for i in range(200)}
    write(run, tables=[table] * 9, data=many, versions=many, status=text, device=text)
    append(run, *({"kind": "eval", "step": i, "loss": 2.0 + i % 7} for i in range(3000)))
    append(run, *({"kind": "skipped", "step": i, "reason": text, "rows": [text[:999]] * 9} for i in range(300)))
    append(run, *({"kind": "note", "step": i, "text": text} for i in range(300)))
    (run / "config.yaml").write_text("# &&&&&&&&&&&\n" * 10_000, encoding="utf-8")
    page, checker = report(run)
    assert len(page.encode()) < 300_000
    for part in (
        "more samples in samples.json",
        "more rows in result.json",
        "more tables",
        "more lines",
        "more characters",
    ):
        assert part in checker.text


def test_a_resumed_run_counts_each_step_once(run: Path) -> None:
    before = read_run(run)
    append(run, {"kind": "train", "step": 100, "loss": 9.0}, {"kind": "eval", "step": 120, "loss": 1.0})
    after = read_run(run)
    assert len(after.train) == len(before.train)
    assert [row["step"] for row in after.train] == [row["step"] for row in before.train]
    losses = losses_of(after)
    assert losses is not None
    assert (losses.best, losses.best_step, losses.last) == (1.0, 120, 1.0)


def test_outcome_in_words(tmp_path: Path) -> None:
    append(tmp_path, *({"kind": "eval", "step": step, "loss": loss} for step, loss in ((0, 3.0), (10, 2.0), (20, 2.5))))
    english, chinese = outcome(read_run(tmp_path))
    assert english == (
        "Held-out loss fell from 3.000 to 2.000, perplexity from 20.1 to 7.39. "
        "It was lowest at step 10 and rose to 2.500 by the end."
    )
    assert chinese == "验证损失由 3.000 降至 2.000，困惑度由 20.1 降至 7.39。"
    append(tmp_path, {"kind": "eval", "step": 0, "loss": 1.0})
    assert outcome(read_run(tmp_path))[0] == "Held-out loss did not fall: 1.000 at first, 2.000 at best."


def test_outcome_survives_lost_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert outcome(read_run(run))[0].startswith("Held-out loss fell from 4.150 to 2.080")


def test_no_path_of_this_machine_is_shown(run: Path) -> None:
    (run / "config.yaml").write_text("model: {path: /home/somebody/models/small}\n", encoding="utf-8")
    _, checker = report(run)
    header = checker.text[: checker.text.index("Curves")]
    assert "small" in header
    assert "somebody" not in header
    assert str(run.parent) not in checker.text


def test_the_page_is_replaced_in_one_step(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = report(run)

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_report(run)
    monkeypatch.undo()
    assert (run / "report.html").read_text(encoding="utf-8") == page
    assert sorted(file.name for file in run.iterdir() if "report" in file.name) == ["report.html"]
    with pytest.raises(CheckpointError, match="a run folder"):
        write_report(tmp_path / "missing")


def test_data_summary_keeps_file_names_and_hides_what_is_empty() -> None:
    tree = {
        "train_rows": 3, "rejected_rows": 0, "notes": [], "extra_keys": {}, "packed": False, "share": 0.5,
        "formats": {"my_poems_v2.jsonl": "messages"}, "rejected_by_reason": {"unknown role 'the_boss'": 2},
        "train_length_tokens": {"p_50": 7},
    }  # fmt: skip
    assert list(flat(tree)) == [
        ("train rows", 3), ("packed", False), ("share", 0.5), ("formats · my_poems_v2.jsonl", "messages"),
        ("rejected by reason · unknown role 'the_boss'", 2), ("train length tokens · p 50", 7),
    ]  # fmt: skip
