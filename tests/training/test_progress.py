"""Progress: a live bar on a terminal, plain lines elsewhere, numbers that never mislead."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from fitune.training.progress import Progress, bytes_text, loss_text, number, perplexity_text, seconds_text


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, loss: float = 2.0, seconds: float = 0.5, **more: object) -> dict[str, object]:
    return {
        "kind": "train", "step": step, "loss": loss, "learning_rate": 1e-4, "tokens": 1000, "seconds": seconds,
        "memory_bytes": 3_210_000_000, **more,
    }  # fmt: skip


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal(width: int = 120) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, height=20, color_system=None
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drive(console: Console, total: int, start: int = 0, seconds: float = 0.5) -> str:
    clock = Clock()
    with Progress(total, start, console=console, clock=clock) as progress:
        for step in range(start + 1, total + 1):
            clock.now += seconds
            progress.step(row(step, seconds=seconds))
    return written(console)


def screen(text: str) -> list[str]:
    return [
        line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").split("\n") if line.strip()
    ]


def test_plain_output_has_a_line_per_tenth_and_no_control_characters() -> None:
    lines = drive(plain(), 400, seconds=0.01).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("step 1/400 (0%)  loss 2.000")
    assert lines[-1] == "step 400/400 (100%)  loss 2.000  100,000 tokens/s  lr 1e-4  3.21 GB"
    assert all(char.isprintable() for line in lines for char in line)


def test_plain_output_of_a_slow_run_has_a_line_every_15_seconds() -> None:
    lines = drive(plain(), 100, seconds=5).splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/100", "4/100", "7/100", "10/100"]


def test_plain_output_of_a_very_long_run_thins_to_a_line_a_minute() -> None:
    lines = drive(plain(), 20_000, seconds=10).splitlines()
    assert len(lines) < 20_000 * 10 / 60 + 400


@pytest.mark.parametrize(("total", "start", "lines"), [(1, 0, 1), (2, 1, 1), (10, 9, 1), (3, 0, 3)])
def test_few_steps_are_all_shown(total: int, start: int, lines: int) -> None:
    assert len(drive(plain(), total, start).splitlines()) == lines


@pytest.mark.parametrize("total", [0, 5])
def test_a_run_with_nothing_left_to_do_shows_nothing_and_does_not_fail(total: int) -> None:
    assert drive(plain(), total, total) == ""
    assert f"{total}/{total}" in drive(terminal(), total, total)


def test_time_left_counts_this_session_and_its_evaluations() -> None:
    clock, console = Clock(), plain()
    with Progress(1000, 500, console=console, clock=clock) as progress:
        clock.now += 1
        progress.step(row(501, seconds=1))
        clock.now += 3  # an evaluation of two seconds and a step of one
        progress.step(row(502, seconds=1))
        clock.now += 16
        progress.step(row(510, seconds=1))
    last = written(console).splitlines()[-1]
    assert "16 min 20 s left" in last  # 20 s for 10 steps, 490 to go


def test_start_step_may_be_set_before_entering() -> None:
    console = terminal()
    progress = Progress(400, console=console)
    progress.note("before the bar")
    progress.start_step = 200
    with progress:
        pass
    assert "before the bar" in screen(written(console))[0]
    assert "200/400" in written(console)


def test_loss_is_smoothed_without_a_cold_start_and_survives_nan() -> None:
    console, clock = plain(), Clock()
    with Progress(4, console=console, clock=clock) as progress:
        for step, loss in enumerate([4.0, float("nan"), 2.0, float("inf")], 1):
            progress.step(row(step, loss))
    shown = re.findall(r"loss (\S+)", written(console))
    assert shown == ["4.000", "4.000", "2.947", "2.947"]


def test_terminal_shows_one_bar_with_everything() -> None:
    lines = screen(drive(terminal(), 37))
    assert "37/37" in lines[-1]
    assert "━" in lines[-1]
    for part in ("loss 2.000", "2,000 tokens/s", "lr 1e-4", "3.21 GB"):
        assert part in lines[-1]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_terminal_lines_fit_any_width_also_with_chinese_text_and_huge_counts(width: int) -> None:
    console = terminal(width)
    with Progress(12_345_678, 12_345_670, console=console, clock=Clock()) as progress:
        progress.step(row(12_345_671))
        progress.note("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 3)
    assert max(cell_len(line) for line in screen(written(console))) <= width


def test_a_narrow_terminal_keeps_the_loss_and_drops_the_rest() -> None:
    text = "\n".join(screen(drive(terminal(40), 37)))
    assert "loss 2.000" in text
    assert "GB" not in text
    assert "…" not in text


@pytest.mark.parametrize("make", [plain, terminal])
def test_evaluations_notes_and_skipped_steps_are_lines_of_their_own(make: Callable[[], Console]) -> None:
    console = make()
    with Progress(40, console=console, clock=Clock()) as progress:
        progress.step(row(1))
        progress.eval({"step": 20, "loss": 2.1, "best": True})
        progress.eval({"step": 30, "loss": float("nan"), "best": False})
        progress.skipped({"step": 31, "reason": "non-finite loss", "rows": [f"诗.jsonl:{i}" for i in range(1, 10)]})
        progress.skipped({"step": 32})
        progress.note("[bold]not markup[/bold] \x1b[31mnot a colour\a")
    lines = [line.rstrip() for line in screen(written(console))]
    for line in (
        "held-out  step 20  loss 2.100  perplexity 8.17  best so far",
        "held-out  step 30  loss not finite",
        "skipped step 31: non-finite loss (rows 诗.jsonl:1, 诗.jsonl:2, 诗.jsonl:3 and 6 more)",
        "skipped step 32: no reason recorded",
        "[bold]not markup[/bold] \ufffd[31mnot a colour\ufffd",
    ):
        assert line in lines


def test_quiet_shows_nothing() -> None:
    for console in (plain(), terminal()):
        with Progress(2, quiet=True, console=console) as progress:
            progress.step(row(1))
            progress.eval({"step": 1, "loss": 2.1})
            progress.note("note")
            progress.skipped({"step": 2, "reason": "r", "rows": []})
        assert written(console) == ""


def test_forced_colour_does_not_put_control_characters_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(1) as progress:
        progress.step(row(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 1/1 (100%)")
    assert "\x1b" not in captured.err


def test_the_bar_is_closed_when_the_run_fails() -> None:
    console = terminal()

    def run() -> None:
        with Progress(3, console=console) as progress:
            progress.step(row(1))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert written(console).rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_a_row_without_numbers_is_shown_as_far_as_it_goes() -> None:
    console = plain()
    with Progress(1, console=console) as progress:
        progress.step({"step": 1, "seconds": 0, "tokens": 5, "loss": None, "learning_rate": True})
    assert written(console).strip() == "step 1/1 (100%)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.21, "3.2 s"),
        (59.96, "1 min 0 s"),
        (75, "1 min 15 s"),
        (11520, "3 h 12 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_number_formats() -> None:
    assert [loss_text(loss) for loss in (0, 2.31449, 0.00042)] == ["0.000", "2.314", "4.2e-4"]
    assert [perplexity_text(loss) for loss in (0, 2.1, 7.5, 20, 1e9)] == [
        "1.00",
        "8.17",
        "1,808",
        "4.85e8",
        "over 1e21",
    ]
    assert [bytes_text(size) for size in (5_250_000, 3_210_000_000)] == ["5.2 MB", "3.21 GB"]
    assert number({"a": 10**400}, "a") is None
