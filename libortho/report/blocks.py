"""What a report is made of: sections of paragraphs, tables, lists and drawings, before any markup.

Knows how a figure is written as text. Doesn't know HTML or Markdown, nor what is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from libortho.figures import Figure, Unit

from .drawing import Drawing

Tone = Literal["passes", "fails", "inconclusive", "missing", "plain"]

_TIED = "\u00a0"
"""A space at which no line breaks."""

_FORMAT: dict[Unit, str] = {
    "share": "{:.1%}",
    "nats/token": "{:.3f}",
    "perplexity": "{:.3f}",
    "x": "{:.3f}",
    "bits/weight": "{:.3f}",
    "tokens/s": "{:,.1f}",
    "MiB": "{:,.0f}",
    "p": "{:.2g}",
    "": "{:.3f}",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    value: the exact number behind the text; None for words
    figure: the number's name in the results file; "" if it is not from there
    """

    text: str
    value: float | None = None
    figure: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are, for conditions and the like."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table with a caption. The first column names its row and is left-aligned.

    folded: long, and of interest to few
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


Block = Paragraph | Facts | Bullets | Table | Drawing


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. `verdict` is shown beside the heading."""

    title: str
    blocks: tuple[Block, ...]
    verdict: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Headline:
    """The one sentence that a reader takes away."""

    tone: Tone
    word: str
    sentence: str


@dataclass(frozen=True)
class Part:
    """One run: its headline and its sections."""

    title: str
    headline: Headline
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Document:
    """A whole report. `comparison` stands before the parts if there are several."""

    title: str
    parts: tuple[Part, ...]
    comparison: tuple[Section, ...] = field(default=())


def number(value: float, unit: Unit) -> str:
    """A number in the digits that its unit deserves, the unit unsaid but for shares and times."""
    if unit == "s":
        return f"{1000 * value:,.2f} ms" if abs(value) < 1 else f"{value:,.2f} s"
    return _FORMAT[unit].format(value)


def words(*texts: str) -> tuple[Cell, ...]:
    """Cells without numbers."""
    return tuple(Cell(text) for text in texts)


def figure_cell(figure: Figure | None, *, interval: bool = False, counts: bool = False) -> Cell:
    """A figure's cell, with its limits or its counts if asked for; the reason if it is missing."""
    if figure is None:
        return Cell("not measured: the file has no such figure", tone="missing")
    if figure.value is None:
        return Cell(f"not measured: {figure.reason or 'no reason given'}", tone="missing")
    text = number(figure.value, figure.unit)
    if counts and figure.counts:
        text = f"{figure.counts[0]}{_TIED}of{_TIED}{figure.counts[1]}"
    if interval and figure.low is not None and figure.high is not None:
        low, high = number(figure.low, figure.unit), number(figure.high, figure.unit)
        text += f" [{low},{_TIED}{high}]"
    return Cell(text, figure.value, figure.name)


def columns_table(
    caption: str, names: Sequence[str], columns: Mapping[str, Sequence[Cell]], corner: str = ""
) -> Iterator[Block]:
    """A table by columns. One that has the same reason in every row is said once, below it."""
    missing = [name for name, cells in columns.items() if _is_missing_alike(cells)]
    kept = {name: cells for name, cells in columns.items() if name not in missing}
    rows = [
        (Cell(name), *(cells[index] for cells in kept.values())) for index, name in enumerate(names)
    ]
    if kept:
        yield Table(caption, (corner, *kept), tuple(rows))
    said = [f"{name[:1].upper() + name[1:]}: {columns[name][0].text}." for name in missing]
    if said:
        yield Paragraph(" ".join(said))


def _is_missing_alike(cells: Sequence[Cell]) -> bool:
    return bool(cells) and cells[0].tone == "missing" and len({cell.text for cell in cells}) == 1


def drawings(*candidates: Drawing | None) -> Iterable[Drawing]:
    """Those that there is something to draw for."""
    return (drawing for drawing in candidates if drawing is not None)
