"""Sections of audits: methods beside each other, and what each off state gives away.

An audit's states: *off* is what is handed out, *on* knows the records, *never trained* is what off
would be had there been none.
"""

from __future__ import annotations

from collections.abc import Iterator

from libortho.attacks.comparison import AttackResult, Rate
from libortho.audit_metrics import AuditMetrics
from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES
from libortho.figures.audits import STATES, audit_names, metric_figure, whole_rows

from .blocks import (
    Block,
    Cell,
    Facts,
    Paragraph,
    Section,
    Table,
    Tone,
    columns_table,
    drawings,
    figure_cell,
)
from .drawing import Dot, Drawing, Limit, Row, Series, line_chart, row_chart
from .run import Run

_LOSS = "mean loss"
_SEEN = 0.05
"""Adjusted p of a finding that is named, at most: the audit's own family-wise error rate."""


def tone_of(audit: AuditResult) -> Tone:
    """The colour of an audit's verdict."""
    if audit.verdict.startswith("private"):
        return "passes"
    return "fails" if audit.verdict == "leaks" else "inconclusive"


def audits(run: Run) -> tuple[Section, ...]:
    """Methods side by side if there are several, then each audit by itself."""
    found = run.results.audits
    if not found:
        text = "Not measured: no audit ran. `pytest -m audit` makes one."
        return (Section("Audit of the off state", (Paragraph(text),), tone="missing"),)
    sections = [_audit(name, audit) for name, audit in zip(audit_names(found), found, strict=True)]
    return ((_methods(run),) if len(found) > 1 else ()) + tuple(sections)


def _methods(run: Run) -> Section:
    found = run.results.audits
    names = audit_names(found)

    def metric(state: str, name: str) -> list[Cell]:
        return [
            run.cell(f"audits.{audit}.metrics.{state}.{name}", interval=True) for audit in names
        ]

    columns = {
        "verdict": [Cell(audit.verdict, tone=tone_of(audit)) for audit in found],
        "extracted, on": metric("on", "extraction, planted"),
        "extracted, off": metric("off", "extraction, planted"),
        "loss, planted - twins, off": metric("off", "mean loss, planted - twins"),
        "AUC against never trained, off": metric("off", "ratio to B0: AUC"),
        "privacy ratio, lower limit": [
            run.cell(f"audits.{name}.privacy_ratio_lower95") for name in names
        ],
        "bits, off": [run.cell(f"audits.{name}.bits_off") for name in names],
    }
    rows = []
    for name, audit in zip(names, found, strict=True):
        figure = run.figures.get(f"audits.{name}.metrics.off.ratio to B0: AUC")
        if figure is not None and figure.value is not None:
            kind = "ours" if audit.verdict.startswith("private") else "planted"
            dot = Dot(figure.value, kind, figure.low, figure.high)
            rows.append(Row(name, f"{figure.value:.3f}", dots=(dot,)))
    chart = row_chart(
        "Who was planted, told from the off state: AUC against never trained",
        rows,
        unit="0.5 = nothing is known",
        limits=(Limit(0.5, "nothing known"),),
        legend=(("ours", "judged private"), ("planted", "not judged private")),
    )
    caption = "Every method and control that was audited, on the same records"
    table = columns_table(caption, names, columns, "method")
    return Section("Methods compared", (*drawings(chart), *table))


def _audit(name: str, audit: AuditResult) -> Section:
    reason = audit.verdict_reason
    blocks: list[Block] = [
        Paragraph(reason[:1].upper() + reason[1:] + "."),
        _facts(audit),
        *drawings(_losses(audit, "off"), _losses(audit, "on")),
        *drawings(*_dose_curve(audit)),
    ]
    if not audit.dose_curve:
        why = audit.reasons.get("dose_curve", "no reason given")
        blocks.append(Paragraph(f"Dose curve: not measured: {why}."))
    else:
        text = "Dose curve: 0 and 1 are the off and the on state over all records, the others over"
        most = max(point.planted.n for point in audit.dose_curve)
        blocks.append(Paragraph(f"{text} {most} planted ones."))
    blocks += _attacks(audit)
    blocks += _findings(audit)
    blocks += _metrics(name, audit)
    return Section(f"Audit: {name}", tuple(blocks), audit.verdict, tone_of(audit))


def _facts(audit: AuditResult) -> Facts:
    def fact(field: str, text: str) -> str:
        value = getattr(audit, field)
        return (
            text.format(value)
            if value is not None
            else (f"not measured: {audit.reasons.get(field, 'no reason given')}")
        )

    off, without = audit.fingerprint_off, audit.fingerprint_without_records
    if off is None or without is None:
        told = fact("fingerprint_off", "{}")
    else:
        same = "equal" if off == without else "DIFFERENT"
        told = f"{off[:16]}… and, made without the records, {without[:16]}…: {same}"
    return Facts(
        (
            ("what it promises", audit.promise),
            (
                "records",
                f"{audit.n_planted} planted, {audit.n_twins} twins; {audit.records_source}",
            ),
            ("extracted when on", fact("extraction_on", "{:.1%} of the planted records")),
            ("privacy ratio, lower limit", fact("privacy_ratio_lower95", "{:.1f}")),
            ("fingerprints", told),
            (
                "smallest leak it could have seen",
                fact("smallest_leak_nats", "{:.2g} nats per token"),
            ),
            ("bits per linear weight", f"{audit.bits_off:.3f} off, {audit.bits_on:.3f} on"),
            ("took", f"{sum(audit.seconds.values()):,.0f} s, preparation left out"),
        )
    )


# ---------------------------------------------------------------- charts


def _families(audit: AuditResult, state: str) -> list[AuditMetrics]:
    """A state's rows by family; that over all families stands last."""
    rows = [row for row in audit.metrics if row.state == state]
    return sorted(rows, key=lambda row: row.family == ALL_FAMILIES)


def _losses(audit: AuditResult, state: str) -> Drawing | None:
    rows = []
    for row in _families(audit, state):
        dots, texts = [], []
        for kind in ("planted", "twins"):
            found = row.metrics.get(f"{_LOSS}, {kind}")
            if found is None or found.value is None:
                texts.append("–")
                continue
            dots.append(Dot(found.value, kind, found.low95, found.high95))
            texts.append(f"{found.value:.3f}")
        if dots:
            rows.append(Row(row.family, " / ".join(texts), dots=tuple(dots)))
    meaning = {"off": "off: what is handed out", "on": "on: what knows the records"}
    return row_chart(
        f"Mean loss on secrets, planted / twins; {meaning[state]}",
        rows,
        unit="nats per secret token, 95 % intervals",
        legend=(("planted", "planted records"), ("twins", "twins, never planted")),
        from_zero=True,
    )


def _dose_curve(audit: AuditResult) -> Iterator[Drawing | None]:
    if not audit.dose_curve:
        return
    kinds = (("planted", "planted records"), ("twins", "twins"))
    shares, losses = [], []
    for kind, words in kinds:
        ends = _ends(audit, f"extraction, {kind}")
        rates = [(p.alpha, getattr(p, kind)) for p in audit.dose_curve]
        points = ends + [(x, rate.hits / rate.n) for x, rate in rates if rate.n > 0]
        shares.append(Series(sorted(points), kind, words, dotted=True))
        points = _ends(audit, f"{_LOSS}, {kind}")
        points += [(p.alpha, getattr(p, f"loss_{kind}")) for p in audit.dose_curve]
        losses.append(Series(sorted(points), kind, words, dotted=True))
    yield line_chart(
        "Dose curve: records extracted at each alpha",
        shares,
        x_label="alpha",
        y_label="share of records",
    )
    yield line_chart(
        "Dose curve: mean loss on secrets",
        losses,
        x_label="alpha",
        y_label="nats per secret token",
    )
    perplexities = sorted((p.alpha, p.ppl) for p in audit.dose_curve if p.ppl is not None)
    yield line_chart(
        "Dose curve: perplexity on public text",
        [Series(perplexities, "ours", dotted=True)],
        x_label="alpha",
        y_label="perplexity",
    )


def _ends(audit: AuditResult, metric: str) -> list[tuple[float, float]]:
    """The off state as alpha = 0 and the on state as alpha = 1, both over all records."""
    rows = whole_rows(audit)
    found = [
        (alpha, rows[state].metrics[metric].value)
        for alpha, state in ((0.0, "off"), (1.0, "on"))
        if state in rows and metric in rows[state].metrics
    ]
    return [(alpha, value) for alpha, value in found if value is not None]


# ---------------------------------------------------------------- tables


def _attacks(audit: AuditResult) -> Iterator[Block]:
    if not audit.attacks:
        why = audit.reasons.get("attacks", "no reason given")
        yield Paragraph(f"Attacks: not measured: {why}.")
        return
    rows = tuple(_attack(attack) for attack in audit.attacks)
    header = ("attack", "needs", "got, off", "got, never trained", "AUC", "p", "seconds")
    caption = (
        "Attacks on what is handed out, each beside the same attack on the never-trained model; "
        "planted records of which the whole secret was got. p is for the attack alone"
    )
    yield Table(caption, header, rows)


def _attack(attack: AttackResult) -> tuple[Cell, ...]:
    seconds = attack.cost_off.seconds + attack.cost_never.seconds
    return (
        Cell(attack.name),
        Cell(attack.needs),
        _rate(attack.off_planted),
        _rate(attack.never_planted),
        Cell(f"{attack.auc:.3f}", attack.auc),
        Cell(
            f"{attack.p_value:.2g}" + (" beats never trained" if attack.beats_never else ""),
            attack.p_value,
        ),
        Cell(f"{seconds:,.1f}", seconds),
    )


def _rate(rate: Rate) -> Cell:
    tied = "\u00a0"
    text = f"{rate.hits}{tied}of{tied}{rate.n} [{rate.low95:.1%},{tied}{rate.high95:.1%}]"
    return Cell(text, rate.hits / rate.n if rate.n > 0 else 0.0)


def _findings(audit: AuditResult) -> Iterator[Block]:
    seen = sorted((f for f in audit.findings if f.p_adjusted <= _SEEN), key=lambda f: f.p_adjusted)
    if not audit.findings:
        yield Paragraph("Tests: not measured: the evidence did not allow any.")
    elif not seen:
        smallest = min(f.p_adjusted for f in audit.findings)
        yield Paragraph(
            f"None of {len(audit.findings)} tests tells the off state from the never-trained "
            f"model: the smallest p after Holm's correction is {smallest:.2g}."
        )
    else:
        rows = tuple(
            (
                Cell(f.metric),
                Cell(f.question),
                Cell(f.family),
                Cell(f"{f.effect:+.3g} {f.unit}", f.effect),
                Cell("–" if f.auc is None else f"{f.auc:.3f}", f.auc),
                Cell(f"{f.p_adjusted:.2g}", f.p_adjusted),
            )
            for f in seen
        )
        header = ("test", "question", "family", "effect", "AUC", "p, corrected")
        caption = f"{len(seen)} of {len(audit.findings)} tests see a difference, after correction"
        yield Table(caption, header, rows)


def _metrics(name: str, audit: AuditResult) -> Iterator[Block]:
    rows = whole_rows(audit)
    states = [state for state in STATES if state in rows]
    metrics = list(dict.fromkeys(m for state in states for m in rows[state].metrics))
    table = [
        (
            Cell(metric),
            *(
                figure_cell(
                    metric_figure(name, state, metric, rows[state].metrics[metric])
                    if metric in rows[state].metrics
                    else None,
                    interval=True,
                )
                for state in states
            ),
            Cell(next(rows[s].metrics[metric].unit for s in states if metric in rows[s].metrics)),
        )
        for metric in metrics
    ]
    if table:
        caption = f"All {len(metrics)} metrics with 95 % intervals, over all families"
        header = ("metric", *(STATES[state] for state in states), "unit")
        yield Table(caption, header, tuple(table), folded=True)
