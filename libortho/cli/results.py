"""Commands that read results files: report and compare."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from libortho.compare import DEFAULT_FACTOR, Change, Comparison, compare
from libortho.errors import ArtifactError
from libortho.figures import Figure
from libortho.files import atomic_write_text
from libortho.report import FORMATS, Format, render
from libortho.report.blocks import figure_cell
from libortho.results import Results, read_results
from libortho.summary import table

from .commands import (
    EXIT_DONE,
    EXIT_NO,
    EXIT_REFUSED,
    Commands,
    add_command,
    add_json,
    finite_float,
)
from .output import note, out, to_json

_FORMAT_OF_SUFFIX: dict[str, Format] = {".md": "markdown", ".json": "benchmark-json"}


def add_commands(commands: Commands) -> None:
    """Add `report` and `compare`."""
    _add_report(commands)
    _add_compare(commands)


def _add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "show results files as a page, as Markdown, or as JSON for a chart over time",
        examples=(
            "report gtx4050_results_20260304_150607.json --out report.html",
            "report before.json after.json --out both.html",
            "report results.json --format markdown >> $GITHUB_STEP_SUMMARY",
            "report results.json --format benchmark-json --better smaller --out smaller.json",
        ),
        more="The page needs nothing else: no script, no font, no picture from elsewhere. Several "
        "files are set side by side.",
    )
    parser.add_argument("results", type=Path, nargs="+", help="results files of the suite")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: by the name of --out (.md, .json), else html",
    )
    parser.add_argument(
        "--better",
        choices=("bigger", "smaller"),
        default="bigger",
        help="for benchmark-json: github-action-benchmark takes figures of one direction a file, "
        "customBiggerIsBetter or customSmallerIsBetter (default: %(default)s)",
    )


def _add_compare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        _compare,
        "tell what changed between two results files beyond noise",
        examples=("compare before.json after.json", "compare main.json branch.json --json"),
        more="Counts are tested (McNemar on the same records, else Fisher; p < 0.05). Figures with "
        "95 % intervals changed if the intervals do not overlap. Figures without one (tokens/s, "
        "memory) changed from --factor on. A verdict that passes no more is worse by itself.\n\n"
        "Runs on other cards, models, texts or windows are refused unless --anyway is given.",
        exit_codes="0 nothing is worse beyond noise; 1 something is",
    )
    parser.add_argument("before", type=Path, help="the results file to compare with")
    parser.add_argument("after", type=Path, help="the results file that is judged")
    parser.add_argument(
        "--anyway", action="store_true", help="compare also what was measured differently"
    )
    parser.add_argument(
        "--factor",
        type=_factor,
        default=DEFAULT_FACTOR,
        help="from which factor on a figure without an interval changed (default: %(default)g)",
    )
    parser.add_argument("--all", action="store_true", help="show figures that did not change too")
    add_json(parser)


def _factor(text: str) -> float:
    value = finite_float(text)
    if value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 1")
    return value


# ---------------------------------------------------------------- report


def _report(options: argparse.Namespace) -> int:
    suffix = options.out.suffix if options.out else ""
    form: Format = options.format or _FORMAT_OF_SUFFIX.get(suffix, "html")
    results = [(path.name, read_results(path)) for path in options.results]
    text = render(results, form, better=options.better)
    if options.out is None:
        out(text.rstrip("\n"))
        return EXIT_DONE
    try:
        atomic_write_text(options.out, text)
    except OSError as error:
        raise ArtifactError(
            f"{options.out} could not be written: {error.strerror or error}. Choose another --out."
        ) from error
    note(f"wrote {options.out}")
    return EXIT_DONE


# ---------------------------------------------------------------- compare


def _compare(options: argparse.Namespace) -> int:
    before, after = read_results(options.before), read_results(options.after)
    comparison = compare(before, after, anyway=options.anyway, factor=options.factor)
    code = EXIT_NO if comparison.is_worse else EXIT_DONE
    if comparison.obstacles and not options.anyway:
        code = EXIT_REFUSED
    if options.json:
        out(to_json(_facts(comparison, options, code)))
    elif code == EXIT_REFUSED:
        note(
            f"{options.before.name} and {options.after.name} can't be compared: "
            f"{'; '.join(comparison.obstacles)}. Add --anyway to compare them nevertheless."
        )
    else:
        out("\n".join(_lines(comparison, options, before, after)))
    return code


def _lines(
    comparison: Comparison, options: argparse.Namespace, before: Results, after: Results
) -> Iterator[str]:
    for name, path, results in (
        ("before", options.before, before),
        ("after", options.after, after),
    ):
        yield f"{name}: {path.name}, {results.provenance.timestamp_utc}"
    yield from (f"NOT COMPARABLE: {text}" for text in comparison.obstacles)
    yield from (f"differs: {text}" for text in comparison.notes)
    shown = [
        change
        for change in comparison.changes
        if options.all or change.outcome not in ("same", "not judged")
    ]
    verdicts = [v for v in comparison.verdicts if options.all or v.outcome != "same"]
    rows = [[v.outcome, f"verdict, {v.gate}", v.before, v.after, "", ""] for v in verdicts]
    rows += [_row(change) for change in shown]
    if rows:
        yield ""
        yield from table(["outcome", "figure", "before", "after", "change", "rule"], rows)
    outcomes = [verdict.outcome for verdict in comparison.verdicts]
    outcomes += [change.outcome for change in comparison.changes]
    counts = ", ".join(
        f"{outcomes.count(name)} {name}" for name in ("worse", "better", "changed", "same")
    )
    yield ""
    yield f"{counts}; {outcomes.count('not judged')} not judged"


def _row(change: Change) -> list[str]:
    cells = [
        figure_cell(figure, interval=True, counts=True).text.replace("\u00a0", " ")
        for figure in (change.before, change.after)
    ]
    share = "" if change.relative is None else f"{change.relative:+.1%}"
    return [change.outcome, change.before.title, *cells, share, change.rule]


def _facts(comparison: Comparison, options: argparse.Namespace, code: int) -> dict[str, Any]:
    return {
        "before": str(options.before),
        "after": str(options.after),
        "comparable": not comparison.obstacles,
        "obstacles": list(comparison.obstacles),
        "differences": list(comparison.notes),
        "worse": comparison.is_worse,
        "exit_code": code,
        "verdicts": [asdict(verdict) for verdict in comparison.verdicts],
        "figures": [
            {
                "name": change.before.name,
                "unit": change.before.unit,
                "outcome": change.outcome,
                "rule": change.rule,
                "before": _measured(change.before),
                "after": _measured(change.after),
                "relative_change": change.relative,
            }
            for change in comparison.changes
        ],
    }


def _measured(figure: Figure) -> dict[str, Any]:
    counts = None if figure.counts is None else list(figure.counts)
    return {
        "value": figure.value,
        "low95": figure.low,
        "high95": figure.high,
        "counts": counts,
        "reason": figure.reason,
    }
