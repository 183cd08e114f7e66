"""Curves: round marks, nothing lost by thinning, figures that are well formed whatever the values."""

from __future__ import annotations

import json
import math
import random
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from fitune.training.curves import (
    Chart,
    Series,
    decimate,
    draw,
    escaped,
    smooth,
    step_axis,
    tick_label,
    ticks,
    value_axis,
    value_text,
)


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 5, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (1.93, 4.2, 6, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)),
        (0, 2e-4, 3, (0, 1e-4, 2e-4)),
        (-3, 7, 5, (-4, -2, 0, 2, 4, 6, 8)),
        (0, 10_000, 5, (0, 2000, 4000, 6000, 8000, 10_000)),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: tuple[float, ...]) -> None:
    assert ticks(low, high, count) == expected


def test_ticks_cover_any_range_with_a_sensible_number_of_marks() -> None:
    source = random.Random(0)
    for _ in range(2000):
        low = source.uniform(-1, 1) * 10 ** source.uniform(-9, 9)
        high = low + 10 ** source.uniform(-9, 9)
        count = source.randint(1, 8)
        marks = ticks(low, high, count)
        slack = 1e-6 * (marks[1] - marks[0])
        assert marks[0] <= low + slack
        assert marks[-1] >= high - slack
        assert 2 <= len(marks) <= count + 3
        assert all(a < b for a, b in pairwise(marks))


@pytest.mark.parametrize("value", [0.0, 2.5, -3e-9, 1e29, 1e-29])
def test_equal_values_get_an_axis_around_them(value: float) -> None:
    marks = ticks(value, value, 4)
    assert marks[0] < value < marks[-1]
    assert 0 < value_axis([value], False, 4).at(value) < 1


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(1, 1, (1,)), (0, 1, (0, 1)), (0, 3, (0, 1, 2, 3)), (501, 700, (550, 600, 650, 700)), (3, 997, (0, 500))],
)
def test_step_marks_are_whole_and_inside(low: float, high: float, marks: tuple[float, ...]) -> None:
    assert step_axis(low, high, 4 if high < 900 else 3).marks == marks


def test_labels() -> None:
    assert [label for _, label in value_axis([1.93, 4.2], False, 3).labels()] == ["1", "2", "3", "4", "5"]
    assert [label for _, label in value_axis([0, 2e-4], True, 3).labels()] == ["0", "1e-4", "2e-4"]
    assert [label for _, label in value_axis([0.003, 500], False, 6).labels()][:4] == ["0.001", "0.01", "0.1", "1"]
    assert tick_label(0.30000000000000004, 0.1) == "0.3"
    assert tick_label(20_000, 5000) == "20,000"
    assert tick_label(2.5e6, 5e5) == "2.5e6"
    assert [value_text(value) for value in (0, 2e-5, 0.12345, 1234.5, 3e7)] == ["0", "2e-5", "0.1235", "1,234", "3e7"]


def test_far_apart_positive_values_get_a_logarithmic_axis() -> None:
    axis = value_axis([0.02, 300], False, 4)
    assert axis.log
    assert axis.at(1) == pytest.approx(-axis.low / (axis.high - axis.low))
    assert 0 <= axis.at(0.02) < axis.at(300) <= 1
    assert not value_axis([0.0, 300], False, 4).log
    assert not value_axis([1.5, 30], False, 4).log


def test_decimation_keeps_ends_order_and_every_spike() -> None:
    source = random.Random(1)
    points = [(float(step), source.gauss(2, 0.1)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = decimate(points, 100)
    assert len(kept) <= 202
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[4321], points[777]} <= set(kept)
    assert decimate(points[:150], 100) == points[:150]


def test_smoothing_is_a_mean_from_the_first_point_on() -> None:
    flat = smooth([(step, 3.0) for step in range(50)], 10)
    assert [value for _, value in flat] == pytest.approx([3.0] * 50)
    first, second = smooth([(1, 1.0), (2, 0.0)], 3)
    assert first == (1, 1.0)
    assert second == (2, pytest.approx(1 / 3))
    assert smooth([], 10) == []


def figure(*series: Series, **more: object) -> ET.Element:
    points = [point for one in series for point in one.points]
    chart = Chart("Loss", "损失", series, **more)  # type: ignore[arg-type]
    return ET.fromstring(draw(chart, min(points)[0], max(points)[0]))


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 5e8], [-5.0, 1e20], [3.0, 2.0, 1e-30]])
def test_figures_are_well_formed_and_stay_inside(values: list[float]) -> None:
    root = figure(Series("each step", "每步", "smooth", list(enumerate(values, 1))), height=100)
    drawn = [text.split(",") for line in root.iter("polyline") for text in line.attrib["points"].split()]
    drawn += [[circle.attrib["cx"].rstrip("%"), circle.attrib["cy"]] for circle in root.iter("circle")]
    assert len(drawn) == len(values)
    for x, y in drawn:
        assert 0 <= float(x) <= 1000
        assert -0.1 <= float(y) <= 112.1
    assert "nan" not in ET.tostring(root, "unicode").lower()


def test_held_out_points_are_dots_with_the_best_stressed() -> None:
    held = Series("held-out", "验证", "held", [(0, 3.0), (10, 2.0), (20, 2.5)])
    root = figure(held, best=10, marks=[(5, "non-finite <loss>")])
    assert [circle.attrib["class"] for circle in root.iter("circle")] == ["held", "held best", "held"]
    assert [title.text for title in root.iter("title")] == [
        "step 5: non-finite <loss>", "step 0: 3", "step 10: 2", "step 20: 2.5",
    ]  # fmt: skip


def test_values_for_the_pointer_are_those_drawn() -> None:
    root = figure(Series("each step", "每步", "raw", [(1, math.pi), (2, 1e-7), (3, 123456.0)]))
    plot = next(svg for svg in root.iter("svg") if svg.get("class") == "plot")
    data = json.loads(plot.attrib["data-chart"])
    assert data["log"] is True
    assert data["series"] == [{"style": "raw", "x": [1, 2, 3], "y": [3.1416, 1e-7, 123456]}]
    assert plot.attrib["aria-label"] == "Loss by step: each step from 3.142 to 123,456"


def test_nothing_to_draw_is_nothing() -> None:
    assert draw(Chart("Loss", "损失", (Series("a", "", "raw", []),)), 1, 2) == ""


def test_escaping_shows_control_characters() -> None:
    assert escaped("a<b>&\"'\r\n\t\x00\x1b") == "a&lt;b&gt;&amp;&quot;&#x27;\n\t␀␛"
