"""Charts as vector shapes: rows of bars and intervals on one scale, and lines.

Knows geometry only: numbers become coordinates in a picture of a phone's width, 360 units, that a
page may scale up. Colours are the page's: a shape carries the kind of its mark. Written by hand
rather than plotted by a library, because a chart that follows the reader's colour scheme, keeps its
text as text and has labels that survive a narrow screen is shapes and style sheet, no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 360.0
_MARGIN = 8.0
_ROW = 42.0
_BAR = 13.0
_TEXT = 12.0
_AXIS = 34.0
_GUTTER = 44.0
_PLOT_HEIGHT = 132.0
_LARGEST = 1e15
"""Numbers beyond it are not drawn: differences between them can't be told in double precision."""


@dataclass(frozen=True)
class Shape:
    """One element of a picture: `tag` and attributes as in SVG, with text for the tag `text`."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass(frozen=True)
class Drawing:
    """A picture with what a reader needs who can't see it.

    description: what it shows, with the numbers
    legend: (kind of mark, what it means)
    """

    title: str
    description: str
    width: float
    height: float
    shapes: tuple[Shape, ...]
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Bar:
    """A stretch of a row from `start` to `end`. `kind` decides its colour."""

    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Dot:
    """A value, with the limits of its interval if there is one."""

    value: float
    kind: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One row: label and value in words above, marks below."""

    label: str
    value: str
    bars: tuple[Bar, ...] = ()
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Limit:
    """A line across all rows."""

    value: float
    label: str


@dataclass(frozen=True)
class Series:
    """A line through points (x, y). `dotted` marks every point, else only the last."""

    points: Sequence[tuple[float, float]]
    kind: str
    label: str = ""
    dotted: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def row_chart(
    title: str,
    rows: Sequence[Row],
    *,
    unit: str,
    limits: Sequence[Limit] = (),
    legend: Sequence[tuple[str, str]] = (),
    from_zero: bool = False,
) -> Drawing | None:
    """Rows of marks on one horizontal scale; None if there is nothing that can be drawn."""
    values = [limit.value for limit in limits]
    for row in rows:
        values += [edge for bar in row.bars for edge in (bar.start, bar.end)]
        for dot in row.dots:
            values += [x for x in (dot.value, dot.low, dot.high) if x is not None]
    bounds = _bounds(values, from_zero)
    if bounds is None or not any(row.bars or row.dots for row in rows):
        return None
    scale = _Scale(*bounds, _MARGIN, WIDTH - _MARGIN)
    top = 6 + 15.0 * len(limits)
    bottom = top + _ROW * len(rows)
    shapes = _bottom_axis(scale, bottom, unit, grid_from=top)
    for index, row in enumerate(rows):
        shapes += _marks(row, top + _ROW * index, scale)
    for index, limit in enumerate(limits):
        shapes += _limit_shapes(limit, scale, 15.0 * index + _TEXT, bottom)
    for index, row in enumerate(rows):  # last, so that no mark crosses a text
        baseline = top + _ROW * index + _TEXT
        shapes.append(_text(_MARGIN, baseline, row.label, "start", "label"))
        shapes.append(_text(WIDTH - _MARGIN, baseline, row.value, "end", "value"))
    told = [f"{row.label}: {row.value}" for row in rows]
    told += [f"line at {limit.label}" for limit in limits]
    return Drawing(title, "; ".join(told), WIDTH, bottom + _AXIS, tuple(shapes), tuple(legend))


def line_chart(
    title: str,
    lines: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    limits: Sequence[Limit] = (),
    logarithmic: bool = False,
) -> Drawing | None:
    """Lines through points in the order of x; None if no line has two points.

    `logarithmic` is a wish: with values of 0 or less the scale stays linear, and starts at 0.
    """
    lines = [line for line in lines if len(line.points) > 1]
    heights = [y for line in lines for _, y in line.points] + [limit.value for limit in limits]
    across = _bounds([x for line in lines for x, _ in line.points], from_zero=False)
    logarithmic = logarithmic and min(heights, default=0.0) > 0
    lift = math.log10 if logarithmic else float
    up = _bounds([lift(y) for y in heights], from_zero=not logarithmic)
    if not lines or across is None or up is None:
        return None
    top = 24.0
    bottom = top + _PLOT_HEIGHT
    x_scale = _Scale(*across, _GUTTER, WIDTH - _MARGIN - 4)
    y_scale = _Scale(*up, bottom, top)
    shapes = [_text(_MARGIN, _TEXT, y_label, "start", "axis")]
    for tick in _log_ticks(*up) if logarithmic else _ticks(*up):
        y = y_scale(lift(tick))
        shapes.append(_line(_GUTTER, y, WIDTH - _MARGIN, y, "grid"))
        shapes.append(_text(_GUTTER - 5, y + 4, _tick_text(tick), "end", "axis"))
    shapes += _bottom_axis(x_scale, bottom, x_label)
    for limit in limits:
        y = y_scale(lift(limit.value))
        shapes.append(_line(_GUTTER, y, WIDTH - _MARGIN, y, "limit"))
        shapes.append(_text(_GUTTER + 5, y - 4, limit.label, "start", "limit-text"))
    told = []
    for line in lines:
        places = [(x_scale(x), y_scale(lift(y))) for x, y in line.points]
        path = " ".join(f"{_place(x)},{_place(y)}" for x, y in places)
        shapes.append(Shape("polyline", {"points": path, "class": f"curve mark-{line.kind}"}))
        for x, y in places if line.dotted else places[-1:]:
            shapes.append(_circle(x, y, 3.5, line.kind))
        (first_x, first), (last_x, last) = line.points[0], line.points[-1]
        told.append(
            f"{line.label or y_label} from {first:.3g} at {x_label} {first_x:g} to {last:.3g} at "
            f"{last_x:g}"
        )
    legend = tuple((line.kind, line.label) for line in lines if line.label)
    return Drawing(title, "; ".join(told), WIDTH, bottom + _AXIS, tuple(shapes), legend)


# ---------------------------------------------------------------- shapes


def _marks(row: Row, top: float, scale: _Scale) -> list[Shape]:
    base = top + 18
    shapes = []
    for bar in row.bars:
        left, right = sorted((scale(bar.start), scale(bar.end)))
        place = {"x": left, "y": base, "width": max(right - left, 0.75), "height": _BAR}
        attributes = {name: _place(value) for name, value in place.items()}
        shapes.append(Shape("rect", attributes | {"class": f"mark-{bar.kind}"}))
    middle = base + _BAR / 2
    for dot in row.dots:
        if dot.low is not None and dot.high is not None:
            low, high = scale(dot.low), scale(dot.high)
            shapes.append(_line(low, middle, high, middle, f"interval mark-{dot.kind}"))
            for end in (low, high):
                shapes.append(_line(end, middle - 4, end, middle + 4, f"interval mark-{dot.kind}"))
        shapes.append(_circle(scale(dot.value), middle, 5, dot.kind))
    return shapes


def _limit_shapes(limit: Limit, scale: _Scale, text_y: float, bottom: float) -> list[Shape]:
    x = scale(limit.value)
    right = x > WIDTH / 2
    text_x, anchor = (x - 5, "end") if right else (x + 5, "start")
    return [
        _line(x, text_y - _TEXT + 3, x, bottom, "limit"),
        _text(text_x, text_y, limit.label, anchor, "limit-text"),
    ]


def _bottom_axis(
    scale: _Scale, y: float, label: str, grid_from: float | None = None
) -> list[Shape]:
    shapes = [_line(scale.start, y, scale.end, y, "axis-line")]
    for tick in _ticks(scale.low, scale.high):
        x = scale(tick)
        if grid_from is not None:
            shapes.append(_line(x, grid_from, x, y, "grid"))
        anchor = "start" if x < _MARGIN + 8 else "end" if x > WIDTH - _MARGIN - 8 else "middle"
        shapes.append(_text(x, y + 14, _tick_text(tick), anchor, "axis"))
    shapes.append(_text((scale.start + scale.end) / 2, y + 29, label, "middle", "axis"))
    return shapes


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Shape:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return Shape("line", {name: _place(value) for name, value in ends.items()} | {"class": kind})


def _circle(x: float, y: float, radius: float, kind: str) -> Shape:
    place = {"cx": _place(x), "cy": _place(y), "r": _place(radius)}
    return Shape("circle", place | {"class": f"mark-{kind}"})


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Shape:
    attributes = {"x": _place(x), "y": _place(y), "text-anchor": anchor, "class": kind}
    return Shape("text", attributes, text)


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# ---------------------------------------------------------------- scales


def _bounds(values: Sequence[float], from_zero: bool) -> tuple[float, float] | None:
    """The ends of a scale that holds all values with some room; None if that can't be."""
    if not values or max(map(abs, values)) > _LARGEST:
        return None
    low, high = min(values), max(values)
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * max(high - low, least)
    return (low if from_zero and low == 0 else low - room), high + room


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends, at most `about` and one more."""
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high, with 2 and 5 between them if they are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    few = high - low < 1.5
    every = max(1, math.ceil((high - low) / 5))
    factors = (1.0, 2.0, 5.0) if few else (1.0,)
    found = [f * 10.0**d for d in decades if d % every == 0 for f in factors]
    return [tick for tick in found if low <= math.log10(tick) <= high]


def _tick_text(value: float) -> str:
    return f"{0.0 if value == 0 else value:,.6g}"
