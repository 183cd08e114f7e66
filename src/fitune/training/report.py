"""The run as one page: reads a run folder, writes report.html, which needs no network and runs nothing of the data's.

    write_report(Path("runs/demo"))

Any file may be missing, since an interrupted run gets a report too. Curves are inline SVG that reads without
JavaScript; report.js adds the values under the pointer. Styles and script carry their hash in the page's
content security policy, so text that slipped through escaping would still be inert.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from fitune.errors import CheckpointError
from fitune.training.curves import Chart, Point, Series, bilingual, draw, escaped, value_text
from fitune.training.progress import bytes_text, loss_text, number, perplexity_text, seconds_text
from fitune.training.record import (
    FEW_POINTS,
    Row,
    Run,
    flat,
    losses_of,
    mappings,
    outcome,
    points_of,
    read_run,
    setting_of,
    smoothed,
    smoothing_span,
    step_of,
)

# Bytes of HTML per part; together with the curves they stay below 300 KB however large the run is.
SAMPLES_BYTES, TABLE_BYTES, LIST_BYTES, CONFIG_BYTES = 60_000, 15_000, 8_000, 25_000
MAX_TABLES, MAX_TEXT, MAX_CELL, MAX_COLUMNS = 4, 2_000, 300, 16
STATUS = {
    "done": ("done", "完成", "good", ""),
    "interrupted": ("interrupted", "已中断", "warn", "The run was stopped on request; fitune resume continues it."),
    "diverged": (
        "diverged",
        "已发散",
        "bad",
        "Loss or gradients stayed non-finite; no such step was applied or saved.",
    ),
    "failed": ("failed", "失败", "bad", "The run ended with an error; the message was printed where it ran."),
    "": ("no result yet", "尚无结果", "warn", "The run has not written its result: it is still going, or was killed."),
}


def write_report(run: Path) -> Path:
    """Write `run`/report.html from whatever the run folder holds; replaced in one step, never half written.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    target, temporary = run / "report.html", run / ".report.html.tmp"
    # A lone surrogate, legal in JSON, has no UTF-8 form.
    page = render(read_run(run)).encode("utf-8", errors="replace")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot write {target}: {error.strerror}; is {run} a run folder?") from error
    return target


def render(run: Run) -> str:
    """The whole page. The same run gives the same bytes."""
    style, script = (
        resources.files("fitune.training").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    sections = (
        _header(run),
        _facts(run),
        _curves(run),
        _samples(run),
        _tables(run),
        _events(run),
        _summary("Data", "数据", run.result.get("data")),
        _config(run),
        _summary("Versions", "版本", run.result.get("versions")),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escaped(run.name)} · fitune</title>
<style>{style}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
<footer>{bilingual("Written by fitune from the files of this run.", "由本次运行的文件生成")}</footer>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(title: str, chinese: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    note = f'<p class="fine">{note}</p>' if note else ""
    return f"<section><h2>{bilingual(title, chinese)}</h2>{note}{body}</section>\n"


def _header(run: Run) -> str:
    status = str(run.result.get("status") or "")
    english, chinese, mood, why = STATUS.get(status, (status, "", "warn", ""))
    parts = [setting_of(run, "model", "path"), setting_of(run, "method", "name"), run.result.get("device")]
    facts = "".join(f"<span>{escaped(_cut(part, MAX_CELL))}</span>" for part in parts if part)
    lead, chinese_lead = outcome(run)
    return f"""<header>
<p class="eyebrow">{bilingual("fitune run report", "训练报告")}</p>
<h1 dir="auto">{escaped(run.name)}</h1>
<p class="what">{facts}<span class="status {mood}">{bilingual(_cut(english, 40), chinese)}</span></p>
<p class="lead">{bilingual(f"{lead} {why}".strip(), chinese_lead)}</p>
{"".join(f'<p class="problem">{escaped(problem)}</p>' for problem in run.problems)}</header>
"""


def _facts(run: Run) -> str:
    losses, result = losses_of(run), run.result
    hero = ""
    if losses is not None:
        for word, chinese, loss, step in (
            ("first", "最初", losses.first, None),
            ("best", "最佳", losses.best, losses.best_step),
            ("last", "最后", losses.last, losses.last_step),
        ):
            where = "" if step is None else f" · step {step:,.0f}"
            detail = f"perplexity {perplexity_text(loss)}{where}"
            hero += _tile(f"{losses.name}, {word}", f"{chinese}{losses.chinese}", loss_text(loss), detail, word)
    tokens, learned, padded, seconds = (
        math.fsum(number(row, key) or 0 for row in run.train)
        for key in ("tokens", "supervised_tokens", "padded_tokens", "seconds")
    )
    tiles = ""
    if run.train or run.skipped:
        done = max(step_of(row) for row in (*run.train, *run.skipped))
        total, epoch = (
            number(result, "total_steps"),
            max(number(row, "epoch") or 0 for row in (*run.train, *run.skipped)),
        )
        of = f"of {total:,.0f} · " if total and total > done else ""
        tiles += _tile("Steps", "步数", f"{done:,.0f}", f"{of}{epoch:.3g} epochs" if epoch else of.rstrip(" ·"))
    if tokens:
        detail = f"{learned / tokens:.0%} in loss" if learned else ""
        detail += f" · {1 - tokens / padded:.0%} padding" if padded >= tokens else ""
        tiles += _tile("Tokens", "词元", _count(tokens), detail.removeprefix(" · "))
    if tokens and seconds:
        tiles += _tile("Tokens/s", "每秒词元", _count(round(tokens / seconds)), "in training steps")
    memory = max([number(result, "peak_memory_bytes") or 0, *(number(row, "memory_bytes") or 0 for row in run.train)])
    if memory:
        tiles += _tile("Peak memory", "峰值内存", bytes_text(memory))
    trainable, parameters = number(result, "trainable_parameters"), number(result, "total_parameters")
    if trainable and parameters:
        detail = f"{_count(trainable)} of {_count(parameters)}"
        tiles += _tile("Trained share", "可训练参数", f"{100 * trainable / parameters:.3g} %", detail)
    wall = number(result, "seconds") or seconds
    if wall:
        tiles += _tile("Time", "用时", seconds_text(wall))
    return (f'<dl class="hero">{hero}</dl>' if hero else "") + (f'<dl class="facts">{tiles}</dl>\n' if tiles else "")


def _tile(english: str, chinese: str, value: str, detail: str = "", style: str = "") -> str:
    small = f"<small>{escaped(detail)}</small>" if detail else ""
    return f'<div class="{style}"><dt>{bilingual(english, chinese)}</dt><dd>{escaped(value)}{small}</dd></div>'


def _count(value: float) -> str:
    for size, name in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {name}" if value < 999.5 * size else f"{value / size:,.0f} {name}"
    return f"{value:,.0f}"


def _curve(points: Sequence[Point]) -> tuple[Series, ...]:
    """A noisy curve: faint as it is, strong when smoothed."""
    if len(points) < FEW_POINTS:
        return (Series("each step", "每步", "smooth", points),)
    return Series("each step", "每步", "raw", points), Series("smoothed", "平滑", "smooth", smoothed(points))


def _curves(run: Run) -> str:
    speed = [
        {"step": row["step"], "speed": (number(row, "tokens") or 0) / seconds}
        for row in run.train
        if (seconds := number(row, "seconds"))
    ]
    held, losses = points_of(run.evals, "loss"), losses_of(run)
    train, rate = points_of(run.train, "loss"), points_of(run.train, "learning_rate")
    steps = [step_of(row) for row in (*run.train, *run.evals)]
    if not steps:
        return ""
    skipped = [(step_of(row), _cut(f"skipped, {row.get('reason', '')}", 60)) for row in run.skipped]
    main = Chart(
        "Loss", "损失", (*_curve(train), Series("held-out", "验证", "held", held)), 280, 300, 6,
        best=losses.best_step if losses and held else None, marks=[mark for mark in skipped if mark[0] <= max(steps)],
    )  # fmt: skip
    small = (
        Chart("Learning rate", "学习率", (Series("each step", "每步", "smooth", rate),), from_zero=True),
        Chart("Gradient norm", "梯度范数", _curve(points_of(run.train, "grad_norm"))),
        Chart("Tokens per second", "每秒词元", _curve(points_of(speed, "speed")), from_zero=True),
    )
    note = []
    if len(train) >= FEW_POINTS:
        note.append(f"Smoothed: an exponential mean over about {smoothing_span(train)} steps.")
    if len(train) > 2 * small[0].buckets:
        note.append(f"{len(train):,} steps are drawn by the lowest and the highest value of each group of steps.")
    if skipped:
        note.append("Short upright marks on the step axis: skipped steps.")
    figures = "".join(draw(chart, min(steps), max(steps)) for chart in small)
    body = draw(main, min(steps), max(steps)) + (f'<div class="three">{figures}</div>' if figures else "")
    return _section("Curves", "曲线", body, " ".join(note))


def _within(blocks: Iterable[str], budget: int) -> tuple[str, int]:
    """The first blocks that fit into `budget` bytes, and how many were left out."""
    kept: list[str] = []
    left_out = 0
    for block in blocks:
        budget -= len(block.encode("utf-8", errors="replace"))
        if budget < 0:
            left_out += 1
        else:
            kept.append(block)
    return "".join(kept), left_out


def _more(left_out: int, what: str, file: str) -> str:
    return f'<p class="fine">{left_out:,} more {what} in {file}.</p>' if left_out else ""


def _cut(value: object, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length:,} more characters)"


def _samples(run: Run) -> str:
    cards, left_out = _within(map(_card, run.samples), SAMPLES_BYTES)
    note = "The same prompts, answered by the untrained model and by the trained one."
    if not any("after" in sample for sample in run.samples):
        note = "Answers of the untrained model; the run has not come to those of the trained one."
    return _section("Samples", "样例", cards + _more(left_out, "samples", "samples.json") if cards else "", note)


def _card(sample: Row) -> str:
    columns = "".join(
        f'<div class="{key}"><h3>{bilingual(english, chinese)}</h3>{_prose(sample[key])}</div>'
        for key, english, chinese in (
            ("before", "Before", "训练前"), ("after", "After", "训练后"), ("reference", "Reference", "参考"),
        )
        if sample.get(key) is not None
    )  # fmt: skip
    prompt = f"<h3>{bilingual('Prompt', '提示')}</h3>{_prose(sample.get('prompt', ''))}"
    return f'<article><div class="prompt">{prompt}</div><div class="answers">{columns}</div></article>\n'


def _prose(value: object) -> str:
    """Text as it is, line by line; short Chinese lines are set as verse."""
    text = _cut(value, MAX_TEXT).strip("\n")
    if not text.strip():
        return '<p class="text empty">empty <span class="zh" lang="zh-Hans">空</span></p>'
    if not any("\u3400" <= char <= "\u9fff" for char in text):
        return f'<p class="text" dir="auto">{escaped(text)}</p>'
    lines = [line for line in text.splitlines() if line.strip()]
    verse = " verse" if len(lines) > 1 and max(map(len, lines)) <= 24 else ""
    return f'<p class="text han{verse}" lang="zh-Hans" dir="auto">{escaped(text)}</p>'


def _tables(run: Run) -> str:
    tables = run.result.get("tables")
    found = [*mappings(tables), *mappings([run.result.get("table")])]
    return "".join(map(_table, found[:MAX_TABLES])) + _more(max(0, len(found) - MAX_TABLES), "tables", "result.json")


def _table(table: Row) -> str:
    columns = _list(table.get("columns"))[:MAX_COLUMNS]
    rows = [_list(row)[:MAX_COLUMNS] for row in _list(table.get("rows"))]
    # A column of numbers stands right, with the same decimals in every row.
    by_column = [[row[i] for row in rows if i < len(row)] for i in range(MAX_COLUMNS)]
    numeric = [any(map(_is_number, cells)) and not any(isinstance(cell, str) for cell in cells) for cells in by_column]
    places = [max((_decimals(cell) for cell in cells), default=0) for cells in by_column]
    side = ["n" if is_numeric else "t" for is_numeric in numeric]
    heads = "".join(f'<th class="{side[i]}">{escaped(_cut(name, 60))}</th>' for i, name in enumerate(columns))
    lines = (
        "".join(f'<td class="{side[i]}">{escaped(_cell(cell, places[i]))}</td>' for i, cell in enumerate(row))
        for row in rows
    )
    body, left_out = _within((f"<tr>{line}</tr>" for line in lines), TABLE_BYTES)
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    text = f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>{_more(left_out, "rows", "result.json")}'
    return _section(_cut(table.get("title") or "Table", 120), "", text if heads or body else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decimals(value: object) -> int:
    """Decimals that show a number of ordinary size to three digits."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0 or not 1e-3 <= abs(value) < 1e6:
        return 0
    return len(f"{value:.3f}".rstrip("0").partition(".")[2])


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def _cell(value: object, decimals: int | None = None) -> str:
    """A value as people write it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and decimals is not None and (value == 0 or 1e-3 <= abs(value) < 1e6):
        return f"{value:,.{decimals}f}"
    if isinstance(value, int | float):
        return value_text(value) if isinstance(value, float) else f"{value:,}"
    if isinstance(value, list | tuple):
        return _cut(", ".join(map(_cell, value)), MAX_CELL)
    return _cut(value, MAX_CELL)


def _events(run: Run) -> str:
    def skipped(row: Row) -> str:
        rows = _list(row.get("rows"))
        more = f" and {len(rows) - 6:,} more" if len(rows) > 6 else ""
        where = (
            f"<br><small>rows {escaped(_cut(', '.join(map(str, rows[:6])), MAX_CELL))}{more}</small>" if rows else ""
        )
        return f"<li><b>step {step_of(row):,.0f}</b> {escaped(_cut(row.get('reason', ''), MAX_CELL))}{where}</li>"

    def note(row: Row) -> str:
        step = number(row, "step")
        where = "" if step is None else f"<b>step {step:,.0f}</b> "
        return f"<li>{where}{escaped(_cut(row.get('text', ''), MAX_CELL))}</li>"

    result = ""
    for title, chinese, rows, write, why in (
        (
            "Skipped steps",
            "跳过的步",
            run.skipped,
            skipped,
            "Loss or gradient was not finite; these updates were not applied.",
        ),
        ("Notes", "备注", run.notes, note, ""),
    ):
        items, left_out = _within(map(write, rows), LIST_BYTES)
        more = _more(left_out, "rows", "metrics.jsonl")
        result += _section(title, chinese, f'<ul class="events">{items}</ul>{more}' if items else "", why)
    return result


def _summary(title: str, chinese: str, values: object) -> str:
    items, left_out = _within(
        (
            f"<div><dt>{escaped(_cut(key, 80))}</dt><dd>{escaped(_cell(value))}</dd></div>"
            for key, value in flat(values)
        ),
        LIST_BYTES,
    )
    body = f'<dl class="list">{items}</dl>{_more(left_out, "values", "result.json")}' if items else ""
    return _section(title, chinese, body)


def _config(run: Run) -> str:
    text, left_out = _within((escaped(line) + "\n" for line in run.config_text.splitlines()), CONFIG_BYTES)
    body = (
        f"<details><summary>config.yaml</summary><pre>{text}</pre></details>{_more(left_out, 'lines', 'config.yaml')}"
    )
    return _section("Configuration", "完整配置", body if text else "")
