"""Figures as the JSON that github-action-benchmark draws over time.

The action's custom tools take one direction a file: `customBiggerIsBetter` or
`customSmallerIsBetter`. So the figures of one direction are written, and those that have none are
left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from .run import Run

Direction = Literal["bigger", "smaller"]
_BETTER = {"bigger": "higher", "smaller": "lower"}


def to_benchmark_json(runs: Sequence[Run], direction: Direction) -> str:
    """A JSON list of {name, unit, value, range?, extra}; a figure that is null is no entry."""
    entries = [entry for run in runs for entry in _entries(run, direction, len(runs) > 1)]
    return json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _entries(run: Run, direction: Direction, several: bool) -> list[dict[str, Any]]:
    entries = []
    where = run.results.provenance
    for figure in run.figures.values():
        if figure.value is None or figure.better != _BETTER[direction]:
            continue
        entry: dict[str, Any] = {
            "name": f"{run.name}: {figure.name}" if several else figure.name,
            "unit": figure.unit,
            "value": figure.value,
        }
        if figure.low is not None and figure.high is not None:
            entry["range"] = f"{figure.low:.6g} to {figure.high:.6g}"
        facts = [figure.title, run.subject, run.device, where.compute_dtype]
        entry["extra"] = "\n".join([*facts, f"torch {where.torch}", where.timestamp_utc])
        entries.append(entry)
    return entries
