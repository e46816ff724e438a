"""What commands write: lines on standard output, aligned columns, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def out(text: str) -> None:
    """Write a line, or several, to standard output."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Write a line to standard error, where it stays out of what a script reads."""
    sys.stderr.write(f"libortho: {text}\n")


def to_json(value: Any) -> str:
    """JSON as people can read it too; refuses NaN and infinity with `ValueError`."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as indented lines whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
