"""What a person watching a run sees: one live bar on a terminal, plain lines in a log or pipe.

    with Progress(total_steps=400) as progress:
        progress.step({"step": 1, "loss": 2.31, "tokens": 1900, "seconds": 0.41, "learning_rate": 1e-4})

Rows are those of metrics.jsonl. Everything goes to standard error, so that results can be piped. The loss shown is
smoothed; metrics.jsonl keeps the exact one. report.py shares the number formats below.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

SMOOTHING = 0.9  # share of the old value in the shown loss
LINE_SECONDS = 15.0  # plain output: a line at least this often, thinning to one a minute in long runs
MAX_LINE_SECONDS = 60.0
MAX_ROWS_NAMED = 3
MIN_BAR_CELLS = 10


def number(row: Mapping[str, object], key: str) -> float | None:
    """The finite number at `key`, or None: rows may lack a key or hold nan."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # an int beyond 1e308
        return None
    return value if math.isfinite(value) else None


def scientific(value: float) -> str:
    """A number the way people write it in a configuration: `1e-4`, `4.25e8`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def loss_text(loss: float) -> str:
    """Three decimals, or more where a tiny loss needs them."""
    return f"{loss:.3f}" if loss == 0 or abs(loss) >= 0.01 else scientific(loss)


def perplexity_text(loss: float) -> str:
    """exp(loss) with three digits; a loss nobody can want does not overflow."""
    if loss > 50:
        return "over 1e21"
    value = math.exp(loss)
    if value < 1e6:
        return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
    return scientific(value)


def seconds_text(seconds: float) -> str:
    """A duration in its two largest units, for example `3 min 12 s`."""
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, name, part_size, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size:,} {name} {whole % size // part_size} {part}"
    return f"{whole // 60} min {whole % 60} s"


def bytes_text(num_bytes: float) -> str:
    """GB of 1e9 bytes, the unit of `memory.budget`; MB below a tenth of that."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


class Progress:
    """Shows a run while it goes on; a context manager, and its methods also work before it is entered.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps done before this process; may be set until the first step is shown.
        quiet: show nothing at all.
        console: where to write; None: standard error.
        clock: seconds that only grow; replaced in tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self._quiet = quiet
        if console is None:
            # FORCE_COLOR and the like make rich call a log file a terminal; control characters have no place there.
            console = Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
        self._console = console
        self._clock = clock
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._first: tuple[float, int] | None = None
        self._line: tuple[float, int] | None = None
        self._loss_sum = 0.0
        self._loss_weight = 0.0

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_interactive:
            self._bar = Bar(
                TextColumn("{task.fields[count]}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[stats]}", markup=False),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                "", total=self.total_steps, completed=self.start_step, count=self._count(self.start_step), stats=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            try:
                self._bar.stop()
            except (OSError, SystemExit):
                self._nobody_reads()
            self._bar = None

    def step(self, row: Mapping[str, object]) -> None:
        """Show one finished optimizer step."""
        now, step = self._clock(), int(number(row, "step") or 0)
        loss = number(row, "loss")
        if loss is not None:  # a mean with weights falling back in time: right from the first step on
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
        if self._first is None:
            self._first = (now - (number(row, "seconds") or 0.0), step - 1)
        if self._bar is not None:
            count = self._count(step)
            stats = self._fitting(self._stats(row, step, now), self._console.width - cell_len(count))
            self._bar.update(self._task, completed=step, count=count, stats=stats)
        elif not self._quiet and self._line_is_due(step, now):
            self._line = (now, step)
            share = 100 * step // max(1, self.total_steps)
            self._print(f"step {self._count(step)} ({share}%)  {'  '.join(self._stats(row, step, now))}")

    def eval(self, row: Mapping[str, object]) -> None:
        """Show one evaluation on held-out rows."""
        loss, step = number(row, "loss"), int(number(row, "step") or 0)
        shown = "not finite" if loss is None else f"{loss_text(loss)}  perplexity {perplexity_text(loss)}"
        best = row.get("best") is True
        self._print(
            f"held-out  step {step:,}  loss {shown}{'  best so far' if best else ''}", "green" if best else "cyan"
        )

    def note(self, text: str) -> None:
        """Show one message."""
        self._print(text)

    def skipped(self, row: Mapping[str, object]) -> None:
        """Show a step whose update was not applied, and the rows it came from."""
        step, rows = int(number(row, "step") or 0), row.get("rows")
        names = [str(name) for name in rows] if isinstance(rows, list | tuple) else []
        more = f" and {len(names) - MAX_ROWS_NAMED:,} more" if len(names) > MAX_ROWS_NAMED else ""
        where = f" (rows {', '.join(names[:MAX_ROWS_NAMED])}{more})" if names else ""
        self._print(f"skipped step {step:,}: {row.get('reason', 'no reason recorded')}{where}", "yellow")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, count=self._count(step))

    def _print(self, text: str, style: str = "") -> None:
        """One message above the bar; file names and data in it can hold anything, so nothing in it is obeyed."""
        if self._quiet:
            return
        safe = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)
        # soft_wrap in a log: a line there is as long as its message, whatever width a pipe claims to have.
        try:
            self._console.print(Text(safe, style), soft_wrap=not self._console.is_interactive)
        except (OSError, SystemExit):  # rich makes the latter of a broken pipe
            self._nobody_reads()

    def _nobody_reads(self) -> None:
        """Of a pipe or terminal that is gone: the run goes on, its folder tells how."""
        self._quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())  # what is buffered would fail at exit

    def _count(self, step: int) -> str:
        return f"{step:,}/{self.total_steps:,}"

    def _stats(self, row: Mapping[str, object], step: int, now: float) -> list[str]:
        """What is known at this step, most wanted first."""
        stats = []
        if self._loss_weight > 0:
            stats.append(f"loss {loss_text(self._loss_sum / self._loss_weight)}")
        if self._first is not None and step < self.total_steps:
            # Wall time, not the sum of step times: evaluations and checkpoints take their share of what is left too.
            since, first_step = self._first
            stats.append(f"{seconds_text((now - since) / max(1, step - first_step) * (self.total_steps - step))} left")
        tokens, seconds = number(row, "tokens"), number(row, "seconds")
        if tokens is not None and seconds:
            stats.append(f"{tokens / seconds:,.0f} tokens/s")
        rate, memory = number(row, "learning_rate"), number(row, "memory_bytes")
        if rate is not None:
            stats.append(f"lr {scientific(rate) if rate else 0}")
        if memory:
            stats.append(bytes_text(memory))
        return stats

    @staticmethod
    def _fitting(stats: list[str], width: int) -> str:
        """As many as fit beside the bar: a narrow terminal shows less, never a broken line."""
        text = ""
        for part in stats:
            longer = f"{text} · {part}" if text else part
            if cell_len(longer) > width - MIN_BAR_CELLS - 2:
                break
            text = longer
        return text

    def _line_is_due(self, step: int, now: float) -> bool:
        if self._line is None or step >= self.total_steps:
            return True
        since, last_step = self._line
        started = self._first[0] if self._first else now
        pause = min(MAX_LINE_SECONDS, max(LINE_SECONDS, (now - started) / 100))
        tenth = max(1, self.total_steps)
        return now - since >= pause or 10 * step // tenth > 10 * last_step // tenth
