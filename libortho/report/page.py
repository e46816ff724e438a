"""Which sections a report has, and in which order.

A section is a function of a `Run`, and may give several. To add one, write it and name it in
`SECTIONS`: HTML and Markdown follow by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .audits import audits
from .blocks import Document, Part, Section
from .headline import headline
from .memory import memory
from .overview import conditions, glossary, not_measured, side_by_side
from .privacy import kill_switch, losses, records, tuning
from .quality import bits, perplexity
from .run import Run
from .speed import guide, throughput

SECTIONS: tuple[Callable[[Run], Section | tuple[Section, ...]], ...] = (
    kill_switch,
    losses,
    tuning,
    records,
    audits,
    perplexity,
    bits,
    memory,
    throughput,
    guide,
    conditions,
    not_measured,
    glossary,
)


def document(runs: Sequence[Run]) -> Document:
    """The report of one run, or of several side by side. Raises `ValueError` for none."""
    if not runs:
        raise ValueError("a report needs at least one run")
    parts = tuple(Part(run.name, headline(run), tuple(_sections(run))) for run in runs)
    first = runs[0]
    title = first.subject if len(runs) == 1 and first.model else f"{len(runs)} runs"
    if len(runs) == 1 and first.model is None:
        title = first.name
    return Document(f"libortho: {title}", parts, side_by_side(runs) if len(runs) > 1 else ())


def _sections(run: Run) -> Iterator[Section]:
    for make in SECTIONS:
        made = make(run)
        yield from made if isinstance(made, tuple) else (made,)
