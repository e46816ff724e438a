"""The figures of audits: what each off state gives away, over all families of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from libortho.audit_metrics import AuditMetrics, MetricValue
from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES

from .figure import Figure, counts_of_rate, reason_of

STATES = {"off": "off", "never": "never trained", "on": "on"}
"""States of an audit in words, what is handed out first."""


def audit_names(audits: Sequence[AuditResult]) -> list[str]:
    """What each audit is called: its method, with a number where there are several of it."""
    seen: Counter[str] = Counter()
    names = []
    for audit in audits:
        seen[audit.method] += 1
        copy = seen[audit.method]
        names.append(audit.method + (f"#{copy}" if copy > 1 else ""))
    return names


def whole_rows(audit: AuditResult) -> dict[str, AuditMetrics]:
    """By state, the metrics over all families; of the one family where there is one."""
    families = dict.fromkeys(row.family for row in audit.metrics)
    whole = ALL_FAMILIES if ALL_FAMILIES in families else next(iter(families), "")
    return {row.state: row for row in audit.metrics if row.family == whole}


def audit_figures(audits: Sequence[AuditResult]) -> Iterator[Figure]:
    """Headline figures of each audit, then every metric of every state over all families."""
    for name, audit in zip(audit_names(audits), audits, strict=True):
        yield from _headline(name, audit)
        for state, row in whole_rows(audit).items():
            for metric, value in row.metrics.items():
                yield metric_figure(name, state, metric, value)


def metric_figure(audit: str, state: str, metric: str, value: MetricValue) -> Figure:
    """One metric of one state, over all families."""
    return Figure(
        name=f"audits.{audit}.metrics.{state}.{metric}",
        title=f"{audit}, {STATES.get(state, state)}: {metric}",
        unit="",
        value=value.value,
        reason="" if value.value is not None else value.reasons.get("value", ""),
        noise="interval",
        low=value.low95,
        high=value.high95,
    )


def _headline(name: str, audit: AuditResult) -> Iterator[Figure]:
    yield Figure(
        name=f"audits.{name}.extraction_on",
        title=f"{name}: planted records extracted, on",
        unit="share",
        value=audit.extraction_on,
        reason=reason_of(audit, "extraction_on"),
        noise="counts",
        counts=counts_of_rate(audit.extraction_on, audit.n_planted),
        better="higher",
    )
    for field, title in (
        ("privacy_ratio", "privacy ratio"),
        ("privacy_ratio_lower95", "privacy ratio, 95 % lower limit"),
    ):
        yield Figure(
            name=f"audits.{name}.{field}",
            title=f"{name}: {title}",
            unit="x",
            value=getattr(audit, field),
            reason=reason_of(audit, field),
            noise="derived",
            better="higher",
        )
    yield Figure(
        name=f"audits.{name}.smallest_leak_nats",
        title=f"{name}: smallest uniform leak that would have been seen",
        unit="nats/token",
        value=audit.smallest_leak_nats,
        reason=reason_of(audit, "smallest_leak_nats"),
        noise="derived",
        better="lower",
    )
    for field in ("bits_off", "bits_on"):
        yield Figure(
            name=f"audits.{name}.{field}",
            title=f"{name}: bits per linear weight, {field.removeprefix('bits_')}",
            unit="bits/weight",
            value=getattr(audit, field),
            noise="exact",
            better="lower",
        )
