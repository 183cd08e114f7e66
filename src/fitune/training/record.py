"""What the files of a run folder say, for report.py. Any of them may be missing or damaged.

    run = read_run(Path("runs/demo"))
    losses_of(run)

metrics.jsonl rows keep their keys; `fitune.training.progress.number` reads one safely.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fitune.config.load import read_yaml
from fitune.errors import ConfigError
from fitune.training.curves import Point, smooth
from fitune.training.progress import loss_text, number, perplexity_text

Row = Mapping[str, object]

MAX_PLOTTED = 1e30  # beyond this an axis has no meaning
HELD_OUT = "Held-out loss"
FEW_POINTS = 20  # fewer than this need no smoothing
FOREIGN_KEYS = {
    "formats",
    "files",
    "extra_keys",
    "rejected_by_reason",
}  # below these, keys are file names, keys or reasons


@dataclass(frozen=True)
class Run:
    """What the files of a run folder say; `problems` names those that could not be read."""

    name: str
    train: tuple[Row, ...] = ()
    evals: tuple[Row, ...] = ()
    skipped: tuple[Row, ...] = ()
    notes: tuple[Row, ...] = ()
    samples: tuple[Row, ...] = ()
    result: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    config_text: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """The loss the page talks about: held-out, or smoothed training loss if nothing was held out."""

    name: str
    chinese: str
    first: float
    best: float
    best_step: float
    last: float
    last_step: float


def losses_of(run: Run) -> Losses | None:
    """First, best and last loss; the best is never the untrained model's unless nothing else is known."""
    points = points_of(run.evals, "loss") or _evals_of_result(run.result)
    if not points:
        points = list(smoothed(points_of(run.train, "loss")))
        if not points:
            return None
        best = min(points, key=lambda point: point[1])
        return Losses("Training loss", "训练损失", points[0][1], best[1], best[0], points[-1][1], points[-1][0])
    best = min([point for point in points if point[0] > 0] or points, key=lambda point: point[1])
    return Losses(HELD_OUT, "验证损失", points[0][1], best[1], best[0], points[-1][1], points[-1][0])


def _evals_of_result(result: Row) -> list[Point]:
    """The evaluations that result.json remembers, for a run whose metrics are lost."""
    steps = (
        ("first_eval_loss", 0.0),
        ("best_eval_loss", number(result, "best_step")),
        ("last_eval_loss", step_of(result)),
    )
    found = {step: loss for key, step in steps if step is not None and (loss := number(result, key)) is not None}
    return sorted(found.items())


def outcome(run: Run) -> tuple[str, str]:
    """The outcome in a sentence, in English and in Chinese."""
    losses = losses_of(run)
    if losses is None:
        return "No loss has been recorded yet.", "尚无损失记录。"
    first, best = loss_text(losses.first), loss_text(losses.best)
    if losses.last_step == losses.best_step and first == best:
        return f"{losses.name} is {first}, perplexity {perplexity_text(losses.first)}.", f"{losses.chinese} {first}。"
    if losses.best >= losses.first:
        return f"{losses.name} did not fall: {first} at first, {best} at best.", f"{losses.chinese}未下降。"
    before, after = perplexity_text(losses.first), perplexity_text(losses.best)
    text = f"{losses.name} fell from {first} to {best}, perplexity from {before} to {after}."
    if losses.name == HELD_OUT and losses.last > losses.best * 1.01:
        text += f" It was lowest at step {losses.best_step:,.0f} and rose to {loss_text(losses.last)} by the end."
    return text, f"{losses.chinese}由 {first} 降至 {best}，困惑度由 {before} 降至 {after}。"


def setting_of(run: Run, section: str, key: str) -> str:
    """A value of the configuration; of a path only its last part, reports get shared."""
    group = run.config.get(section)
    value = str(group.get(key, "") if isinstance(group, dict) else "")
    return Path(value).name if value.startswith(("/", "~", ".")) or "\\" in value else value


def read_run(run: Path) -> Run:
    """Read what is there. Damaged files become `problems`, never a failure: a report is most needed then."""
    problems: list[str] = []
    by_kind: dict[str, dict[object, Row]] = {"train": {}, "eval": {}, "skipped": {}}
    notes: list[Row] = []
    damaged = 0
    for line in _text(run / "metrics.jsonl", problems).splitlines():
        row = _json(line)
        if not isinstance(row, dict):
            damaged += bool(line.strip())
        elif (kind := str(row.get("kind"))) == "note":
            notes.append(row)
        elif kind in by_kind and number(row, "step") is not None:
            by_kind[kind][row["step"]] = row  # a resumed run may write a step again: the later row counts
    if damaged:
        problems.append(f"metrics.jsonl: {damaged:,} unreadable line{'s' if damaged > 1 else ''} left out")
    train, evals, skipped = (tuple(sorted(rows.values(), key=step_of)) for rows in by_kind.values())
    files: dict[str, object] = {}
    for name, expected in (("samples.json", list), ("result.json", dict)):
        text = _text(run / name, problems)
        files[name] = _json(text)
        if text and not isinstance(files[name], expected):
            problems.append(f"{name}: cannot be read")
    samples, result = files["samples.json"], files["result.json"]
    try:
        config = read_yaml(run / "config.yaml")
    except ConfigError:
        config = {}  # shown as text below, whatever it holds
    return Run(
        run.resolve().name, train, evals, skipped, tuple(notes),
        tuple(mappings(samples)), result if isinstance(result, dict) else {},
        config, _text(run / "config.yaml", problems), tuple(problems),
    )  # fmt: skip


def _text(file: Path, problems: list[str]) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{file.name}: {error.strerror}")
        return ""


def _json(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def mappings(value: object) -> Iterator[Row]:
    yield from (item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


def flat(tree: object, prefix: str = "", foreign: bool = False) -> Iterator[tuple[str, object]]:
    """The values of a tree that say something, under the names of their keys; empty lists and zeros do not.

    Args:
        foreign: the keys are not fitune's own, and stay as they are.
    """
    for key, value in tree.items() if isinstance(tree, dict) else ():
        name = prefix + (str(key) if foreign else str(key).replace("_", " "))
        if isinstance(value, dict):
            yield from flat(value, f"{name} · ", foreign or key in FOREIGN_KEYS)
        elif isinstance(value, bool) or (value not in ("", 0) and value != [] and value != ()):
            yield name, value


def step_of(row: Row) -> float:
    return number(row, "step") or 0.0


def points_of(rows: Iterable[Row], key: str) -> list[Point]:
    pairs = ((step_of(row), number(row, key)) for row in rows)
    return [(step, value) for step, value in pairs if value is not None and abs(value) < MAX_PLOTTED]


def smoothing_span(points: Sequence[Point]) -> int:
    return max(5, len(points) // 40)


def smoothed(points: Sequence[Point]) -> Sequence[Point]:
    return smooth(points, smoothing_span(points)) if len(points) >= FEW_POINTS else points
