"""Curves of a run as inline SVG text, for report.py: round axis marks, smoothing, decimation, drawing.

    draw(Chart("Loss", "损失", (Series("each step", "每步", "raw", [(1, 2.3), (2, 2.1)]),)), 1, 2)

A figure is as wide as its column and keeps its letters' size: curves are stretched (their strokes are not), labels
and dots are placed in percent. report.js reads `data-chart` to show values under the pointer. Nothing here reads a
file.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fitune.training.progress import scientific

Point = tuple[float, float]  # step, value

LOG_RATIO = 100  # positive values spread wider than this get a logarithmic axis
TOP, BELOW = 12, 26  # room above the curves and for the step labels [px]
MARGIN = 56  # room for the value labels [px]; also in report.css
MAX_DOTS = 120
MAX_MARKS = 100
# Control characters become their visible pictures; only newline and tab mean something in text.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1 and says where its marks are; a logarithmic one holds powers of ten in `low` and `high`."""

    low: float
    high: float
    marks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value; 0 is the low end."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def labels(self) -> Iterator[tuple[float, str]]:
        """Each mark with its text."""
        step = min((b - a for a, b in zip(self.marks, self.marks[1:], strict=False)), default=1.0)
        for mark in self.marks:
            yield mark, tick_label(mark, abs(mark) if self.log else step)


@dataclass(frozen=True)
class Series:
    """One curve; `style` is its CSS class: `raw` (faint), `smooth` (strong) or `held` (line and dots)."""

    name: str
    zh: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps.

    Attributes:
        height: of the curves [px].
        buckets: groups a long curve is thinned to; two points each are drawn.
        best: step of the point to stress in the `held` series.
        marks: steps to point out on the step axis, each with a reason.
    """

    title: str
    zh: str
    series: tuple[Series, ...]
    height: int = 150
    buckets: int = 120
    step_marks: int = 4
    from_zero: bool = False
    best: float | None = None
    marks: Sequence[tuple[float, str]] = ()


def escaped(text: object) -> str:
    """Text for HTML content and attributes; control characters become visible."""
    plain = str(text).replace("\r\n", "\n").replace("\r", "\n").translate(_PICTURES)
    return html.escape(plain, quote=True)


def bilingual(english: str, chinese: str) -> str:
    """A label with its Chinese in small letters behind it."""
    return (
        f'{escaped(english)} <span class="zh" lang="zh-Hans">{escaped(chinese)}</span>' if chinese else escaped(english)
    )


def ticks(low: float, high: float, count: int, whole: bool = False) -> tuple[float, ...]:
    """About `count` round numbers (1, 2 or 5 times a power of ten), from `low` or below to `high` or above."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-20):
        pad = 0.5 if whole else (abs(low) or 1.0) / 10
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, count)
    power = math.floor(math.log10(rough))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**power >= rough * (1 - 1e-9)), 10)
    if factor == 10:
        factor, power = 1, power + 1
    if whole and power < 0:
        factor, power = 1, 0
    step = factor * 10.0**power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(k * step, max(0, -power)) for k in range(first, last + 1))


def tick_label(value: float, step: float) -> str:
    """`value` with as many decimals as marks `step` apart need; very large and very small ones as 2e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or step < 1e-3:
        return scientific(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def value_text(value: float) -> str:
    """Four digits, as report.js writes them."""
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return scientific(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def decimate(points: Sequence[Point], buckets: int) -> list[Point]:
    """Keep the lowest and the highest point of each of `buckets` groups, and both ends: no spike is lost."""
    if len(points) <= 2 * buckets + 2:
        return list(points)
    kept, inner = [points[0]], points[1:-1]
    for k in range(buckets):
        group = inner[k * len(inner) // buckets : (k + 1) * len(inner) // buckets]
        kept.extend(sorted({min(group, key=_value), max(group, key=_value)}))
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Exponential mean over about `span` points, right from the first one on."""
    keep, total, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        result.append((step, total / weight))
    return result


def value_axis(values: Sequence[float], from_zero: bool, count: int) -> Axis:
    """A round axis around the values; logarithmic if they are positive and far apart."""
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high / low > LOG_RATIO:
        powers = ticks(math.floor(math.log10(low)), math.ceil(math.log10(high)), count, whole=True)
        return Axis(powers[0], powers[-1], tuple(10.0**power for power in powers), log=True)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high) or 1.0
    marks = ticks(low, high, count)
    return Axis(marks[0], marks[-1], marks)


def step_axis(low: float, high: float, count: int) -> Axis:
    """Steps from the first to the last, or from 0 if that is near; whole numbers."""
    low = 0.0 if 0 <= low <= high / 10 else low
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Axis(low, high, tuple(mark for mark in ticks(low, high, count, whole=True) if low <= mark <= high))


def draw(chart: Chart, first_step: float, last_step: float) -> str:
    """One figure with title, legend, axes and curves; empty if there is nothing to draw.

    Args:
        chart: finite values only; curves may be of any length.
        first_step, last_step: the steps the figure spans, the same for all figures of a page.
    """
    series = tuple(
        (one, decimate(one.points, MAX_DOTS // 2 - 1 if one.style == "held" else chart.buckets))
        for one in chart.series
        if one.points
    )
    if not series:
        return ""
    x = step_axis(first_step, last_step, chart.step_marks)
    y = value_axis([value for _, points in series for _, value in points], chart.from_zero, chart.height // 45)
    data = {
        "x": [x.low, x.high], "y": [y.low, y.high], "log": y.log, "top": TOP, "height": chart.height,
        "series": [
            {"style": one.style, "x": [_short(p[0]) for p in points], "y": [_short(p[1]) for p in points]}
            for one, points in series
        ],
    }  # fmt: skip
    height = TOP + chart.height + BELOW
    legend = "".join(
        f'<li class="{one.style}"><i></i>{bilingual(one.name, one.zh)} <b>{value_text(points[-1][1])}</b></li>'
        for one, points in series
    )
    values = "".join(
        f'<text x="{MARGIN - 10}" y="{_y(chart, y, mark) + 4:.1f}" text-anchor="end">{label}</text>'
        for mark, label in y.labels()
    )
    scale = ' <small>log scale <span class="zh" lang="zh-Hans">对数</span></small>' if y.log else ""
    return (
        f'<figure class="chart"><figcaption><h3>{bilingual(chart.title, chart.zh)}{scale}</h3>'
        f'<output>step {last_step:,.0f}</output><ul class="legend">{legend}</ul></figcaption><div class="canvas">'
        f'<svg class="values" width="{MARGIN}" height="{height}" aria-hidden="true">{values}</svg>'
        f'<svg class="plot" width="100%" height="{height}" role="img" tabindex="0" '
        f'aria-label="{escaped(_in_words(chart, series))}" '
        f'data-chart="{escaped(json.dumps(data, separators=(",", ":")))}">'
        f"{_plot(chart, series, x, y)}</svg></div></figure>\n"
    )


def _plot(chart: Chart, series: Sequence[tuple[Series, list[Point]]], x: Axis, y: Axis) -> str:
    bottom = TOP + chart.height
    parts = [
        f'<line class="grid" x1="0" x2="100%" y1="{_y(chart, y, mark):.1f}" y2="{_y(chart, y, mark):.1f}"/>'
        for mark in y.marks
    ]
    for mark, label in x.labels():
        anchor = "start" if x.at(mark) < 0.03 else "end" if x.at(mark) > 0.97 else "middle"
        parts.append(f'<text x="{x.at(mark):.2%}" y="{bottom + 19}" text-anchor="{anchor}">{label}</text>')
    for step, reason in chart.marks[:MAX_MARKS]:
        parts.append(
            f'<line class="skip" x1="{x.at(step):.2%}" x2="{x.at(step):.2%}" y1="{bottom - 9}" y2="{bottom}">'
            f"<title>step {step:,.0f}: {escaped(reason)}</title></line>"
        )
    lines = "".join(
        f'<polyline class="{one.style}" points="'
        + " ".join(f"{1000 * x.at(step):.1f},{chart.height * (1 - y.at(value)):.1f}" for step, value in points)
        + '"/>'
        for one, points in series
        if len(points) > 1
    )
    parts.append(
        f'<svg y="{TOP}" width="100%" height="{chart.height}" viewBox="0 0 1000 {chart.height}" '
        f'preserveAspectRatio="none" overflow="visible">{lines}</svg>'
    )
    for one, points in series:
        for step, value in points if one.style == "held" or len(points) == 1 else ():
            best = " best" if one.style == "held" and step == chart.best else ""
            parts.append(
                f'<circle class="{one.style}{best}" cx="{x.at(step):.2%}" cy="{_y(chart, y, value):.1f}" '
                f'r="{4.5 if best else 2.6}"><title>step {step:,.0f}: {value_text(value)}</title></circle>'
            )
    return "".join(parts)


def _y(chart: Chart, axis: Axis, value: float) -> float:
    return TOP + chart.height * (1 - axis.at(value))


def _in_words(chart: Chart, series: Sequence[tuple[Series, list[Point]]]) -> str:
    """The figure for those who do not see it."""
    ends = (f"{one.name} from {value_text(points[0][1])} to {value_text(points[-1][1])}" for one, points in series)
    return f"{chart.title} by step: {'; '.join(ends)}"


def _short(value: float) -> float | int:
    """Five digits, and whole numbers without a point: half the size of the page."""
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.5g}")


def _value(point: Point) -> float:
    return point[1]
