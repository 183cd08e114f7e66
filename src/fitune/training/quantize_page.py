"""`fitune quantize-report --to DIR`: what was measured as one page with plots; it needs no network and runs no script.

    write_page(quantize_report("embedded"), Path("report"))

It wears the clothes of the run's report (report.css). Plots are inline SVG; values stand in their titles and tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

from fitune.infer.disk import check_free, new_folder
from fitune.infer.quantize_report import QuantizeReport, short
from fitune.methods.base import write_json
from fitune.model.quantizers import code_table
from fitune.model.rounding import PRODUCTS, Rounding
from fitune.training.curves import Axis, escaped, value_axis

WIDTH, SMALL, HEIGHT, LEFT, BOTTOM = 1000, 400, 240, 56, 26
BLUE, RED, FAINT = "#2f5f8f", "#b3402a", "#9db8d1"
COLORS = {"int8": BLUE, "absmax": RED, "LLM.int8()": "#2f6b4a", "nf4": "#8a5a00", "fp4": "#7a4f9e", "fp8": "#5f6b73"}
STYLE = """
main, footer { max-width: 76rem; } .plots svg { width: 100%; height: auto; } .plots figure { margin-bottom: 1.2rem; }
.key span { display: inline-block; margin-right: 1.2rem; } .key i { display: inline-block; width: .7rem; height: .7rem;
border-radius: 50%; margin-right: .35rem; } .small { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); } td.n { white-space: nowrap; }
code { font-family: var(--mono); font-size: .9em; } p + p { margin-top: .7rem; } .lesson { max-width: 46rem; }
"""


def write_page(report: QuantizeReport, target: Path) -> Path:
    """Write report.html and report.json into a new folder.

    Raises:
        ConfigError: `target` exists and is not an empty folder.
        CheckpointError: the disk does not take it.
    """
    check_free(target, "--to")

    def fill(folder: Path) -> None:
        (folder / "report.html").write_text(render(report), encoding="utf-8")
        write_json(folder / "report.json", report.to_json())

    new_folder(target, fill)
    return target


def render(report: QuantizeReport) -> str:
    """The whole page. The same report gives the same bytes."""
    style = resources.files("fitune.training").joinpath("report.css").read_text("utf-8") + STYLE
    name = Path(report.model).name
    sections = (
        _header(report),
        _lesson(),
        _kinds(report),
        _errors(report),
        _outliers(report),
        _levels(report),
        _all(report),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(name)} in 8 and 4 bits · fitune</title>
<style>{style}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
<footer>Measured by <code>fitune quantize-report</code>; the numbers are in report.json.</footer>
</body>
</html>
"""


def _header(report: QuantizeReport) -> str:
    total = report.all
    sizes = "".join(
        f"<div><dt>{escaped(key)}</dt><dd>{size / 1e6:,.1f} MB"
        f"<small>{size / total.size_bytes['16 bit']:.1%}</small></dd></div>"
        for key, size in total.size_bytes.items()
    )
    seen = f"{report.rows} rows, {report.tokens} tokens of text" if report.tokens else "no tokenizer: weights only"
    facts = (f"{len(report.layers)} linear layers", f"{total.weights:,} weights", f"computed in {report.dtype}", seen)
    spans = "".join(f"<span>{escaped(fact)}</span>" for fact in facts)
    return f"""<header>
<p class="eyebrow">fitune quantize-report</p>
<h1>{escaped(report.model)} in 8 and 4 bits</h1>
<p class="what">{spans}<span></span></p>
</header>
<dl class="facts">{sizes}</dl>
"""


def _lesson() -> str:
    text = """<div class="lesson">
<p><b>absmax.</b> Divide a row by its largest magnitude, multiply by 127, round. [0.1, -0.3, 0.25, 0.15, -0.05] becomes
[42, -127, 106, 64, -21] and comes back as [0.099, -0.3, 0.250, 0.151, -0.050]: at most half a step, 0.3 / 254, is lost.
Put one 60 into the row and the step is 200 times coarser: [0, -1, 1, 0, 0, 127].</p>
<p><b>LLM.int8().</b> Inputs of large models hold such outliers, always in the same few columns. Those columns are
multiplied apart in 16 bit; the rest keeps a fine grid.</p>
<p><b>nf4.</b> Sixteen levels, closer together where a normal distribution has more numbers. Blocks of 64 weights share
one absmax, so an outlier spoils 63 others and no more.</p>
<p><b>fp8.</b> Three bits of mantissa, four of exponent: an equal <i>relative</i> error for small and large values.</p>
</div>"""
    return _section("How these formats round", text)


def _kinds(report: QuantizeReport) -> str:
    note = (
        "Relative errors: ‖Ŵ − W‖ / ‖W‖ of weights, and of the products with real inputs. Layers of one kind together."
    )
    return _section("By kind of layer", _table(report, report.kinds), note)


def _all(report: QuantizeReport) -> str:
    table = _table(report, report.layers)
    return _section("Every layer", f"<details><summary>{len(report.layers)} layers</summary>{table}</details>")


def _errors(report: QuantizeReport) -> str:
    if not report.tokens:
        return ""
    note = (
        "Each dot is a layer, in the order of the blocks. int8, nf4 and fp4 round weights only; absmax, LLM.int8() and "
        "fp8 round the inputs too. Where a layer has no outliers, absmax lies under LLM.int8()."
    )
    values = {product: [layer.output_ratio(product) for layer in report.layers] for product in PRODUCTS}
    return _section("Error of products", f'<div class="plots">{_dots(report.layers, values)}</div>', note)


def _outliers(report: QuantizeReport) -> str:
    if not report.tokens:
        return ""
    counts = [(short(layer.name), float(layer.outliers)) for layer in report.layers]
    shares = [(short(layer.name), 100 * (layer.outlier_share or 0.0)) for layer in report.layers]
    most = max(report.layers, key=lambda layer: layer.outlier_share or 0.0)
    note = (
        f"Columns of the inputs with a magnitude of at least {report.threshold:g}, and what part of the squared error "
        f"of absmax products goes when they are multiplied in 16 bit. Most: {short(most.name)}, {most.outliers:,} of "
        f"{most.columns:,} columns, {most.outlier_share or 0.0:.0%} of the error."
    )
    figures = _bars("Outlier columns", counts, "{:.0f} columns") + _bars(
        "Their share of the error [%]", shares, "{:.1f} %"
    )
    return _section("Outliers", f'<div class="plots">{figures}</div>', note)


def _levels(report: QuantizeReport) -> str:
    note = (
        "Weights divided by the absmax of their block of 64, counted; the lines are the 16 levels of nf4, their height "
        "how often each is used. The more even the heights, the better the levels fit the weights."
    )
    figures = "".join(_histogram(kind) for kind in reversed(report.kinds))
    return _section("Weights and the levels of nf4", f'<div class="plots small">{figures}</div>', note)


def _section(title: str, body: str, note: str = "") -> str:
    fine = f'<p class="fine">{escaped(note)}</p>' if note else ""
    return f"<section><h2>{escaped(title)}</h2>{fine}{body}</section>\n"


def _table(report: QuantizeReport, rows: Iterable[Rounding]) -> str:
    products = [*PRODUCTS, "outlier columns", "their share"] if report.tokens else []
    heads = ["16 bit MB", "int8", "nf4", *(f"W {key}" for key in ("int8", "nf4", "fp4", "fp8")), *products]
    cells = "".join(f'<th class="n">{escaped(head)}</th>' for head in heads)
    lines = []
    for one in rows:
        texts = [f"{one.size_bytes[key] / 1e6:,.2f}" for key in ("16 bit", "int8", "nf4")]
        texts += [f"{one.weight_ratio(key):.2%}" for key in ("int8", "nf4", "fp4", "fp8")]
        if report.tokens:
            ratios = [one.output_ratio(product) for product in PRODUCTS]
            texts += ["–" if ratio is None else f"{ratio:.2%}" for ratio in ratios]
            share = one.outlier_share
            texts += [f"{one.outliers:,} of {one.columns:,}", "–" if share is None else f"{share:.0%}"]
        numbers = "".join(f'<td class="n">{text}</td>' for text in texts)
        lines.append(f"<tr><td>{escaped(short(one.name))}</td>{numbers}</tr>")
    head = f"<thead><tr><th></th>{cells}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _dots(layers: Sequence[Rounding], values: dict[str, list[float | None]]) -> str:
    known = [100 * value for column in values.values() for value in column if value]
    if not known:
        return ""
    axis = _decades(min(known), max(known))
    parts = []
    for product, column in values.items():
        for number, value in enumerate(column):
            if value:
                x = _x(number, len(layers))
                title = f"{short(layers[number].name)}, {product}: {value:.2%}"
                circle = f'<circle cx="{x:.1f}" cy="{_y(axis, 100 * value):.1f}" r="3.2" fill="{COLORS[product]}">'
                parts.append(f"{circle}<title>{escaped(title)}</title></circle>")
    key = "".join(f'<span><i style="background:{COLORS[product]}"></i>{escaped(product)}</span>' for product in values)
    inside = _axis(axis) + _blocks([layer.name for layer in layers]) + "".join(parts)
    return f'{_figure("Error of products [%]", inside)}<p class="fine key">{key}</p>'


def _bars(title: str, values: Sequence[tuple[str, float]], form: str) -> str:
    axis = value_axis([value for _, value in values], True, 4)
    width = (WIDTH - LEFT) / len(values)
    bars = [
        f'<rect x="{_x(i, len(values)) - 0.4 * width:.1f}" y="{_y(axis, value):.1f}" width="{0.8 * width:.1f}" '
        f'height="{_y(axis, axis.low) - _y(axis, value):.1f}" fill="{RED}">'
        f"<title>{escaped(name)}: {form.format(value)}</title></rect>"
        for i, (name, value) in enumerate(values)
        if value
    ]
    return _figure(title, _axis(axis) + _blocks([name for name, _ in values]) + "".join(bars))


def _histogram(one: Rounding) -> str:
    """Bars of the weights, lines of the levels; both as density, so that they share an axis."""
    densities = [count / max(1, one.weights) * len(one.histogram) / 2 for count in one.histogram]
    levels = code_table("nf4").tolist()
    bounds = [-1.0, *((a + b) / 2 for a, b in pairwise(levels)), 1.0]
    shares = [count / max(1, one.weights) for count in one.nf4_codes]
    axis = Axis(0.0, 1.1 * max(densities), ())
    share_axis = Axis(0.0, max(0.16, *shares), ())
    width = SMALL / len(densities)
    parts = [
        f'<rect x="{i * width:.1f}" y="{_y(axis, density):.1f}" width="{width:.1f}" '
        f'height="{_y(axis, 0.0) - _y(axis, density):.1f}" fill="{FAINT}"/>'
        for i, density in enumerate(densities)
    ]
    for level, (low, high), share in zip(levels, pairwise(bounds), shares, strict=True):
        title = f"level {level:.4f}, for {low:.3f} to {high:.3f}: {share:.1%} of the weights"
        parts.append(
            f'<line x1="{_place(level):.1f}" x2="{_place(level):.1f}" y1="{_y(axis, 0.0):.1f}" '
            f'y2="{_y(share_axis, share):.1f}" stroke="{RED}" stroke-width="4">'
            f"<title>{escaped(title)}</title></line>"
        )
    for value in (-1, -0.5, 0, 0.5, 1):
        anchor = "start" if value == -1 else "end" if value == 1 else "middle"
        parts.append(f'<text x="{_place(value):.1f}" y="{HEIGHT + 19}" text-anchor="{anchor}">{value:g}</text>')
    least, most = min(shares), max(shares)
    return _figure(f"{short(one.name)}: levels used {least:.1%} to {most:.1%}", "".join(parts), SMALL)


def _blocks(names: Sequence[str]) -> str:
    """Numbers of the blocks under their first layers, at most about twenty."""
    numbers = [short(name).partition(".")[0] for name in names]
    firsts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]
    return "".join(
        f'<text x="{_x(i, len(names)):.1f}" y="{HEIGHT + 19}" text-anchor="middle">{escaped(numbers[i])}</text>'
        for i in firsts[:: 1 + len(firsts) // 20]
    )


def _figure(title: str, inside: str, width: int = WIDTH) -> str:
    return (
        f'<figure class="chart"><figcaption><h3>{escaped(title)}</h3></figcaption>'
        f'<svg viewBox="0 0 {width} {HEIGHT + BOTTOM}" role="img" aria-label="{escaped(title)}">{inside}</svg></figure>'
    )


def _axis(axis: Axis) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{_y(axis, mark):.1f}" y2="{_y(axis, mark):.1f}"/>'
        f'<text x="{LEFT - 10}" y="{_y(axis, mark) + 4:.1f}" text-anchor="end">{label}</text>'
        for mark, label in axis.labels()
    )


def _place(value: float) -> float:
    """x of a value from -1 to 1 in a small figure."""
    return SMALL * (value + 1) / 2


def _decades(low: float, high: float) -> Axis:
    """A logarithmic axis with marks at 1, 2 and 5 times the powers of ten."""
    marks = [factor * 10.0**power for power in range(-9, 7) for factor in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low or i == 0)
    last = min(i for i, mark in enumerate(marks) if mark >= high or i == len(marks) - 1)
    return Axis(math.log10(marks[first]), math.log10(marks[last]), tuple(marks[first : last + 1]), log=True)


def _x(number: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT) * (number + 0.5) / count


def _y(axis: Axis, value: float) -> float:
    return 8 + (HEIGHT - 8) * (1 - axis.at(value))
