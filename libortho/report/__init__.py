"""Results as something to look at: a page, Markdown, or JSON for a chart over time.

All three are pure functions of results files. `page` says which sections there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from libortho.errors import ConfigError
from libortho.files import atomic_write_text
from libortho.results import Results
from libortho.typed_json import check_json_values

from .benchmark_json import Direction, to_benchmark_json
from .html import to_html
from .markdown import to_markdown
from .page import document
from .run import Run

Format = Literal["html", "markdown", "benchmark-json"]
FORMATS: tuple[Format, ...] = get_args(Format)


def render(
    results: Sequence[tuple[str, Results]],
    form: Format = "html",
    *,
    better: Direction = "bigger",
) -> str:
    """The report's text.

    Args:
        results: one run or several, each with what its file is called.
        form: the format.
        better: for `benchmark-json`, which direction's figures; see `benchmark_json`.

    Raises:
        ConfigError: no results, or a format that there isn't.
        ValueError: a value is not finite, which no results file can hold.
    """
    if not results:
        raise ConfigError("A report needs at least one results file; found none.")
    for _, result in results:
        check_json_values(dataclasses.asdict(result))
    runs = [
        Run.of(result, name) for (_, result), name in zip(results, _names(results), strict=True)
    ]
    if form == "html":
        return to_html(document(runs))
    if form == "markdown":
        return to_markdown(document(runs))
    if form == "benchmark-json":
        return to_benchmark_json(runs, better)
    raise ConfigError(f"There is no report format {form!r}. Choose one of: {', '.join(FORMATS)}.")


def write_report(
    results: Sequence[tuple[str, Results]], path: str | Path, form: Format = "html"
) -> Path:
    """Write a report; `path` is then old or new, whole. Raises `OSError`, and as `render` does."""
    path = Path(path)
    atomic_write_text(path, render(results, form))
    return path


def _names(results: Sequence[tuple[str, Results]]) -> list[str]:
    """Names of runs, told apart by number where two files are called the same."""
    total, seen, names = Counter(name for name, _ in results), Counter[str](), []
    for name, _ in results:
        seen[name] += 1
        names.append(f"{name} ({seen[name]})" if total[name] > 1 else name)
    return names
