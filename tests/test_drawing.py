"""Charts: marks lie where the numbers say, within the picture, and nothing is drawn of nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libortho.report.drawing import (
    WIDTH,
    Bar,
    Dot,
    Drawing,
    Limit,
    Row,
    Series,
    line_chart,
    row_chart,
)

AXES = {"x_label": "x", "y_label": "y"}
numbers = st.floats(-1e9, 1e9)


def shapes(drawing: Drawing | None, tag: str, kind: str) -> list[dict[str, float]]:
    """Coordinates of the shapes with that tag and class."""
    assert drawing is not None
    found = [s for s in drawing.shapes if s.tag == tag and kind in s.attributes["class"].split()]
    return [
        {k: float(v) for k, v in shape.attributes.items() if k not in ("class", "text-anchor")}
        for shape in found
    ]


def ticks(drawing: Drawing | None) -> list[str]:
    assert drawing is not None
    return [s.text for s in drawing.shapes if s.attributes.get("class") == "axis"]


@given(values=st.lists(numbers, min_size=1, max_size=5), from_zero=st.booleans())
def test_marks_lie_in_the_picture_in_the_order_of_their_values(
    values: list[float], from_zero: bool
) -> None:
    rows = [Row(f"{v}", "", dots=(Dot(v, "ours", v - 1, v + 1),)) for v in values]
    chart = row_chart("a chart", rows, unit="x", from_zero=from_zero)
    centres = [circle["cx"] for circle in shapes(chart, "circle", "mark-ours")]
    assert all(0 <= x <= WIDTH for x in centres)
    for first, x in zip(values, centres, strict=True):
        for other, y in zip(values, centres, strict=True):
            if first < other:
                assert x <= y
    assert chart is not None
    for shape in chart.shapes:
        for name, value in shape.attributes.items():
            if name in ("y", "y1", "y2", "cy"):
                assert 0 <= float(value) <= chart.height


def test_a_bar_is_as_long_as_its_value() -> None:
    rows = [Row("a", "1", (Bar(0, 1, "ours"),)), Row("b", "2", (Bar(0, 2, "ours"),))]
    one, two = shapes(row_chart("bars", rows, unit="x", from_zero=True), "rect", "mark-ours")
    assert two["width"] == pytest.approx(2 * one["width"], abs=0.2)
    assert one["x"] == two["x"]
    assert two["y"] > one["y"]


def test_stacked_bars_touch() -> None:
    row = Row("a", "", (Bar(0, 3, "weights"), Bar(3, 5, "streams")))
    chart = row_chart("stack", [row], unit="x", limits=[Limit(10, "ten")], from_zero=True)
    (first,), (second,) = (shapes(chart, "rect", f"mark-{k}") for k in ("weights", "streams"))
    assert first["x"] + first["width"] == pytest.approx(second["x"], abs=0.15)
    (limit,) = shapes(chart, "line", "limit")
    assert limit["x1"] == limit["x2"] > second["x"] + second["width"]


def test_an_interval_reaches_from_low_to_high() -> None:
    row = Row("a", "", dots=(Dot(2, "ours", 1, 4),))
    chart = row_chart("interval", [row], unit="x", limits=[Limit(1, ""), Limit(4, "")])
    whole = max(shapes(chart, "line", "interval"), key=lambda line: line["x2"] - line["x1"])
    low, high = (line["x1"] for line in shapes(chart, "line", "limit"))
    assert (whole["x1"], whole["x2"]) == (low, high)


@pytest.mark.parametrize("rows", [[], [Row("a", "")], [Row("a", "", (Bar(0, 1e300, "ours"),))]])
def test_nothing_is_drawn_where_there_is_nothing_to_see(rows: list[Row]) -> None:
    assert row_chart("nothing", rows, unit="x", from_zero=True) is None


@given(points=st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30))
def test_a_line_goes_through_its_points(points: list[tuple[float, float]]) -> None:
    points.sort()
    chart = line_chart("a line", [Series(points, "planted")], **AXES)
    assert chart is not None
    (line,) = (s for s in chart.shapes if s.tag == "polyline")
    pairs = [tuple(map(float, pair.split(","))) for pair in line.attributes["points"].split()]
    assert len(pairs) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= chart.height for x, y in pairs)
    assert [x for x, _ in pairs] == sorted(x for x, _ in pairs)
    for (_, first), (_, y) in zip(points, pairs, strict=True):
        for (_, other), (_, z) in zip(points, pairs, strict=True):
            if first < other:
                assert y >= z  # larger values are higher up


def test_a_logarithmic_line_is_straight_for_an_exponential() -> None:
    points = [(float(i), 10.0**-i) for i in range(4)]
    chart = line_chart("log", [Series(points, "planted")], **AXES, logarithmic=True)
    assert chart is not None
    (line,) = (s for s in chart.shapes if s.tag == "polyline")
    ys = [float(pair.split(",")[1]) for pair in line.attributes["points"].split()]
    steps = [b - a for a, b in itertools.pairwise(ys)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert {"1", "0.1", "0.01", "0.001"} <= set(ticks(chart))


def test_a_logarithm_of_nothing_stays_linear() -> None:
    points = [(0.0, 0.0), (1.0, 10.0)]
    chart = line_chart("lin", [Series(points, "planted")], **AXES, logarithmic=True)
    assert {"0", "10"} <= set(ticks(chart))


def test_one_point_is_no_line() -> None:
    assert line_chart("one", [Series([(1.0, 1.0)], "planted")], **AXES) is None
    assert line_chart("none", [], **AXES) is None


@given(low=numbers, span=st.floats(1e-3, 1e9))
def test_ticks_are_few_round_and_evenly_spaced(low: float, span: float) -> None:
    row = Row("a", "", (Bar(low, low + span, "ours"),))
    chart = row_chart("ticks", [row], unit="", from_zero=False)
    assert chart is not None
    lines = [line["x1"] for line in shapes(chart, "line", "grid")]
    assert 2 <= len(lines) <= 7
    gaps = [b - a for a, b in itertools.pairwise(lines)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=0.25)


def test_the_description_tells_every_row_and_limit() -> None:
    rows = [Row("a", "1.00", (Bar(0, 1, "ours"),)), Row("b", "2.00", (Bar(0, 2, "ours"),))]
    chart = row_chart("told", rows, unit="x", limits=[Limit(1.5, "gate: 1.5")])
    assert chart is not None
    assert chart.description == "a: 1.00; b: 2.00; line at gate: 1.5"


def test_lines_share_their_scales_and_are_named() -> None:
    lines = [
        Series([(0.0, 1.0), (1.0, 2.0)], "planted", "ours", dotted=True),
        Series([(0.0, 2.0), (1.0, 1.0)], "twins", "theirs"),
        Series([(5.0, 100.0)], "other", "too short to draw"),
    ]
    chart = line_chart("two", lines, **AXES)
    assert chart is not None
    assert chart.legend == (("planted", "ours"), ("twins", "theirs"))
    first, second = (s.attributes["points"] for s in chart.shapes if s.tag == "polyline")
    (a, b), (c, d) = first.split(), second.split()
    assert a.split(",")[1] == d.split(",")[1]
    assert b.split(",")[1] == c.split(",")[1]
    assert len(shapes(chart, "circle", "mark-planted")) == 2
    assert len(shapes(chart, "circle", "mark-twins")) == 1
