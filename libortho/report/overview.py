"""Sections about the report itself: conditions, what was not measured, how to read it, and runs
side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from libortho.compare import Change, Comparison, compare
from libortho.figures.audits import audit_names

from .blocks import Block, Bullets, Cell, Facts, Paragraph, Section, Table, figure_cell, words
from .run import Run

_GLOSSARY = (
    (
        "extracted",
        "given the record's prompt, greedy decoding recites the whole secret, token by token",
    ),
    ("planted, twin", "a record that was trained on; one drawn alike that no model saw"),
    ("alpha", "the factor of the private stream: 1 is the whole model, 0 the base that is shared"),
    ("loss", "mean nats per token of the secret, given the tokens before: less is better known"),
    (
        "privacy ratio",
        "extraction rate at alpha = 1 over that at alpha = 0; the gate reads the lower limit",
    ),
    ("[a, b]", "95 % interval, two-sided"),
    ("measured", "timed or counted in this run"),
    ("arithmetic", "computed from sizes and bandwidth; nothing was run"),
)


def conditions(run: Run) -> Section:
    """What ran where, with which versions."""
    return Section("Conditions", (Facts(tuple(_conditions(run))),))


def _conditions(run: Run) -> Iterator[tuple[str, str]]:
    where, first = run.results.provenance, run.results.exp1_kill_switch
    yield "model", run.subject if run.model else "not recorded: no experiment finished"
    if first is not None:
        yield "method, seed", f"{first.method}, {first.seed}"
        yield "records", first.records_source
    second = run.results.exp2_null_test
    if second is not None:
        yield "test text", f"{second.corpus}, SHA-256 {second.corpus_sha256[:16]}…"
    yield "device", where.device_name
    yield "processor", f"{where.cpu_model}, {where.cpu_cores} cores; {where.platform}"
    yield "computes in", where.compute_dtype
    versions = ("libortho", "torch", "transformers", "bitsandbytes")
    told = [f"{n} {getattr(where, n) or 'not installed'}" for n in versions]
    yield "versions", ", ".join([f"Python {where.python}", *told])
    commit = where.git_commit
    if commit is not None:
        yield "commit", commit[:12] + (" with changes" if where.git_dirty else "")
    resumed = run.results.resumed
    if resumed:
        names = "; ".join(f"{name} ({when})" for name, when in resumed.items())
        yield "resumed", f"measured by an interrupted run: {names}"
    yield "ended", where.timestamp_utc
    yield "command", " ".join(where.command)
    yield "file", run.name


def not_measured(run: Run) -> Section:
    """Every null of the file with its reason."""
    title = "What was not measured"
    rows = tuple((Cell(name), Cell(reason)) for name, reason in _reasons(run))
    if not rows:
        return Section(title, (Paragraph("Nothing that this kind of run measures was left out."),))
    caption = f"{len(rows)} figures of the file that are null"
    table = Table(caption, ("figure", "reason"), rows, folded=len(rows) > 6)
    return Section(title, (table,))


def _reasons(run: Run) -> Iterator[tuple[str, str]]:
    yield from run.results.reasons.items()
    first, second = run.results.exp1_kill_switch, run.results.exp2_null_test
    if first is not None:
        yield from ((f"exp1_kill_switch.{k}", v) for k, v in first.reasons.items())
    if second is not None:
        yield from ((f"exp2_null_test.{k}", v) for k, v in second.reasons.items())
        for name, arm in second.arms.items():
            yield from ((f"exp2_null_test.arms.{name}.{k}", v) for k, v in arm.reasons.items())
    for name, audit in zip(audit_names(run.results.audits), run.results.audits, strict=True):
        yield from ((f"audits.{name}.{k}", v) for k, v in audit.reasons.items())
    for case in run.results.throughput:
        where = f"throughput.{case.arm}.{case.phase}"
        yield from ((f"{where}.{k}", v) for k, v in case.reasons.items())


def glossary(run: Run) -> Section:
    """The words that the report uses."""
    return Section("How to read this", (Facts(_GLOSSARY),))


# ---------------------------------------------------------------- runs side by side


def side_by_side(runs: Sequence[Run]) -> tuple[Section, ...]:
    """Conditions and figures of several runs in columns, and what changed against the first."""
    names = tuple(run.name for run in runs)
    facts = [dict(_conditions(run)) for run in runs]
    keys = list(dict.fromkeys(key for fact in facts for key in fact if key != "file"))
    table = Table(
        "Conditions",
        ("", *names),
        tuple((Cell(key), *words(*(fact.get(key, "–") for fact in facts))) for key in keys),
    )
    found = list(dict.fromkeys(name for run in runs for name in run.figures))
    rows = []
    for name in found:
        shown = next(run.figures[name] for run in runs if name in run.figures)
        cells = (
            figure_cell(run.figures.get(name), interval=True, counts=shown.counts is not None)
            for run in runs
        )
        rows.append((Cell(shown.title), *cells))
    figures = Table("Every figure of every file", ("", *names), tuple(rows))
    changes: list[Block] = []
    for run in runs[1:]:
        changes += _changes(runs[0], run, compare(runs[0].results, run.results))
    return (
        Section("Runs side by side", (table,)),
        Section(f"What changed against {names[0]}", tuple(changes)),
        Section("All figures", (figures,)),
    )


def _changes(first: Run, run: Run, comparison: Comparison) -> Iterator[Block]:
    if comparison.obstacles:
        yield Paragraph(f"{run.name} can't be compared with {first.name}:")
        yield Bullets(comparison.obstacles)
        return
    rows = [
        (
            Cell(f"verdict, {change.gate}"),
            Cell(change.before),
            Cell(change.after),
            Cell(""),
            Cell(change.outcome),
            Cell("a verdict"),
        )
        for change in comparison.verdicts
        if change.outcome != "same"
    ]
    rows += [
        (
            Cell(change.before.title),
            figure_cell(change.before, interval=True, counts=True),
            figure_cell(change.after, interval=True, counts=True),
            _relative(change),
            Cell(change.outcome),
            Cell(change.rule),
        )
        for change in comparison.changes
        if change.outcome not in ("same", "not judged")
    ]
    judged = sum(change.outcome != "not judged" for change in comparison.changes)
    if not rows:
        yield Paragraph(f"{run.name}: nothing beyond noise in {judged} figures.")
        return
    caption = f"{run.name}: {len(rows)} changes beyond noise, {judged} figures judged"
    header = ("", first.name, run.name, "change", "outcome", "rule")
    yield Table(caption, header, tuple(rows))


def _relative(change: Change) -> Cell:
    share = change.relative
    return Cell("") if share is None else Cell(f"{share:+.1%}", share)
