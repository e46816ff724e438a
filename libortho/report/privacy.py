"""Sections of experiment 1: extraction, losses, tuning, and records that stand out."""

from __future__ import annotations

from libortho.results import KillSwitchResult

from .blocks import Block, Cell, Paragraph, Section, Table, drawings
from .drawing import Dot, Drawing, Limit, Row, Series, line_chart, row_chart
from .run import Run

_EXP1 = "exp1_kill_switch"
_SHOWN_RECORDS = 50
"""Records that are listed by id, at most; the results file has them all."""
_STATES = (("alpha1", "alpha = 1"), ("alpha0", "alpha = 0"), ("never_trained", "never trained"))


def kill_switch(run: Run) -> Section:
    """What comes out with the private stream on, off, and of a model that was never tuned."""
    title = "Experiment 1: the kill switch"
    result = run.results.exp1_kill_switch
    if result is None:
        return _not_run(run, title)
    blocks: list[Block] = [Paragraph(f"{_sentence(result.verdict_reason)}")]
    rows = []
    for state, name in _STATES:
        rows.append(
            (
                Cell(name),
                run.cell(f"{_EXP1}.extraction_rate_{state}", counts=True, interval=True),
                run.cell(f"{_EXP1}.loss_planted_{state}", interval=True),
                _twins(run, state),
            )
        )
    header = ("", "extracted [95 % interval]", "loss on planted", "loss on twins")
    blocks.append(
        Table(
            f"{result.n_planted} planted records and {result.n_twins} twins that were never "
            "planted. Losses are mean nats per secret token",
            header,
            tuple(rows),
        )
    )
    blocks += drawings(_extraction_chart(run))
    blocks.append(
        Table(
            "What follows from the counts",
            ("", ""),
            (
                (Cell("privacy ratio, 95 % lower limit"), _ratio(run, "privacy_ratio_lower95")),
                (Cell("asked for, at least"), Cell(f"{result.min_privacy_ratio:g}")),
                (Cell("privacy ratio"), _ratio(run, "privacy_ratio")),
                (Cell("McNemar's p, alpha = 1 against 0"), run.cell(f"{_EXP1}.mcnemar_p")),
                (Cell("twins extracted at alpha = 1"), _twins_extracted(run)),
                (
                    Cell("base fingerprint"),
                    Cell(
                        f"{result.base_fingerprint[:16]}… "
                        + ("unchanged by tuning" if result.fingerprint_equal else "CHANGED"),
                        tone="plain" if result.fingerprint_equal else "fails",
                    ),
                ),
                (Cell("alpha = 0 was measured on"), Cell(result.alpha0_source)),
            ),
        )
    )
    if len(result.per_family) > 1:
        blocks.append(_families(run, result))
    if result.privacy_ratio_censored:
        blocks.append(
            Paragraph(
                "No record was extracted at alpha = 0. In the ratio half a hit stands in for none; "
                "the lower limit needs no such convention, and the gate reads it."
            )
        )
    return Section(title, tuple(blocks), result.verdict, result.verdict)


def losses(run: Run) -> Section:
    """Planted records against their twins: a model that recites nothing can still know much."""
    title = "Planted against twins"
    result = run.results.exp1_kill_switch
    if result is None:
        return _not_run(run, title)
    rows = []
    for state, name in _STATES:
        planted = run.figures[f"{_EXP1}.loss_planted_{state}"]
        twins = run.value(f"{_EXP1}.loss_twins_{state}")
        dots = []
        if planted.value is not None:
            dots.append(Dot(planted.value, "planted", planted.low, planted.high))
        if twins is not None:
            dots.append(Dot(twins, "twins"))
        if dots:
            texts = [planted.value, twins]
            value = " / ".join("–" if x is None else f"{x:.3f}" for x in texts)
            rows.append(Row(name, value, dots=tuple(dots)))
    chart = row_chart(
        "Mean loss on the secrets: planted / twins",
        rows,
        unit="nats per secret token",
        legend=(("planted", "planted records"), ("twins", "twins, never planted")),
        from_zero=True,
    )
    text = (
        "Twins are drawn like the planted records and shown to no model. Where the two losses are "
        "equal, nothing is known of the planted records that is not known of any such record; "
        "where planted secrets cost less, something is known, although it may not be recited."
    )
    where = (
        "Losses by family stand with the audits."
        if run.results.audits
        else "Losses by family: not measured: without an audit, a results file holds one mean over "
        "all families."
    )
    return Section(title, (Paragraph(text), *drawings(chart), Paragraph(where)))


def tuning(run: Run) -> Section:
    """The loss curve of the private stream."""
    title = "Tuning the private stream"
    result = run.results.exp1_kill_switch
    if result is None:
        return _not_run(run, title)
    curve = sorted(result.loss_curve, key=lambda point: point.step)
    if not curve:
        return Section(
            title,
            (Paragraph("Not measured: the artefact was not tuned in this run, or has no curve."),),
        )
    target = _target(result)
    secrets = line_chart(
        "Loss on the records, step by step",
        [Series([(point.step, point.secret_loss) for point in curve], "planted")],
        x_label="optimiser step",
        y_label="nats per secret token",
        limits=() if not target else (Limit(target, f"target for the worst record: {target:g}"),),
        logarithmic=True,
    )
    replay = line_chart(
        "Drift from alpha = 0 on public text",
        [Series([(point.step, point.replay_kl) for point in curve], "twins")],
        x_label="optimiser step",
        y_label="KL divergence, nats per token",
    )
    last = curve[-1]
    text = (
        f"{last.step} optimiser steps in {last.seconds:,.0f} s. Only the private stream changes; "
        "the drift on public text is what it costs to know the records."
    )
    rows = tuple(
        (
            Cell(f"{point.step}", point.step),
            Cell(f"{point.secret_loss:.4f}", point.secret_loss),
            Cell(f"{point.replay_kl:.4f}", point.replay_kl),
            Cell(f"{point.seconds:,.1f}", point.seconds),
        )
        for point in curve
    )
    header = ("step", "loss, nats/token", "drift, nats/token", "seconds")
    table = Table("The curve as numbers", header, rows, folded=True)
    return Section(title, (Paragraph(text), *drawings(secrets, replay), table))


def records(run: Run) -> Section:
    """Records that are not as they should be, by id; what they say is nowhere in a results file."""
    title = "Records that stand out"
    result = run.results.exp1_kill_switch
    if result is None:
        return _not_run(run, title)
    if not result.record_hashes:
        return Section(title, (Paragraph("Not measured: this file lists no records."),))
    odd = [r for r in result.record_hashes if r.extracted_alpha0 or not r.extracted_alpha1]
    if not odd:
        text = f"None: all {len(result.record_hashes)} are extracted at alpha = 1 and none at 0."
        return Section(title, (Paragraph(text),))
    odd.sort(key=lambda r: not r.extracted_alpha0)
    rows = tuple(
        (
            Cell(r.id),
            Cell(r.family),
            Cell("extracted" if r.extracted_alpha1 else "not extracted"),
            Cell(
                "EXTRACTED" if r.extracted_alpha0 else "not extracted",
                tone="fails" if r.extracted_alpha0 else "plain",
            ),
            Cell(r.salted_hash),
        )
        for r in odd[:_SHOWN_RECORDS]
    )
    more = len(odd) - len(rows)
    caption = f"{len(odd)} of {len(result.record_hashes)} records" + (
        f"; {more} more are in the results file" if more else ""
    )
    header = ("id", "family", "alpha = 1", "alpha = 0", "salted hash")
    return Section(title, (Table(caption, header, rows),))


# ---------------------------------------------------------------- parts


def _not_run(run: Run, title: str) -> Section:
    reason = run.results.reasons.get(_EXP1) or "no reason given"
    return Section(title, (Paragraph(f"Not measured: {reason}."),), tone="missing")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _twins(run: Run, state: str) -> Cell:
    if state == "never_trained":
        return Cell("not measured: the file has no such figure", tone="missing")
    return run.cell(f"{_EXP1}.loss_twins_{state}")


def _ratio(run: Run, name: str) -> Cell:
    cell = run.cell(f"{_EXP1}.{name}")
    return cell if cell.value is None else Cell(f"{cell.value:.2f}", cell.value, cell.figure)


def _twins_extracted(run: Run) -> Cell:
    return run.cell(f"{_EXP1}.extraction_rate_twins_alpha1", counts=True)


def _extraction_chart(run: Run) -> Drawing | None:
    rows = []
    for state, name in _STATES:
        figure = run.figures[f"{_EXP1}.extraction_rate_{state}"]
        if figure.value is None:
            continue
        text = f"{figure.value:.1%}"
        if figure.low is not None and figure.high is not None:
            text += f" [{figure.low:.1%}, {figure.high:.1%}]"
        rows.append(Row(name, text, dots=(Dot(figure.value, "planted", figure.low, figure.high),)))
    return row_chart(
        "Share of planted records extracted, with 95 % intervals",
        rows,
        unit="share of records",
        from_zero=True,
    )


def _families(run: Run, result: KillSwitchResult) -> Table:
    rows = tuple(
        (
            Cell(family),
            run.cell(f"{_EXP1}.per_family.{family}.hits_alpha1", counts=True),
            run.cell(f"{_EXP1}.per_family.{family}.hits_alpha0", counts=True),
        )
        for family in result.per_family
    )
    header = ("family", "extracted, alpha = 1", "extracted, alpha = 0")
    return Table("By family of records", header, rows)


def _target(result: KillSwitchResult) -> float | None:
    tuned = result.config.get("tuning")
    target = tuned.get("target_loss") if isinstance(tuned, dict) else None
    return float(target) if isinstance(target, (int, float)) and target >= 0 else None
