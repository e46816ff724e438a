"""Figures of the READMEs' table of audits, from a results file that `audits.py` merged.

Formats figures; the words around them are `readme_texts`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from libortho.audit_metrics import AuditMetrics
from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES, Finding
from libortho.results import Results

LEVEL = 0.05
ORDER = (
    *("ortho", "qlora", "B0-never-trained", "B2-random-slots"),
    *("B1-dense-int4", "blind-hessian", "blind-kfac"),
)


def audit_rows(run: Results, words: Mapping[str, str]) -> list[list[str]]:
    """A row for each audit, in the order of the methods and then of the seeds."""
    audits = sorted(run.audits, key=lambda a: (ORDER.index(a.method), a.seed))
    return [_row(audit, words) for audit in audits]


def seed_facts(run: Results) -> dict[str, object]:
    """Least and greatest of each headline figure over the seeds of the method with most seeds."""
    methods = [audit.method for audit in run.audits]
    method = max(ORDER, key=methods.count)
    audits = [audit for audit in run.audits if audit.method == method]

    def spread(of: Callable[[AuditResult], float], form: str) -> str:
        values = [of(audit) for audit in audits]
        ends = dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values)))
        return "–".join(ends)

    def off(name: str, audit: AuditResult) -> float:
        (found,) = (m.metrics[name] for m in _whole(audit) if m.state == "off")
        return found.value

    return {
        "method": f"`{method}`",
        "seeds": len(audits),
        "on": spread(lambda a: a.extraction_on or 0.0, ".1%"),
        "off": spread(lambda a: off("extraction, planted", a), ".1%"),
        "ratio": spread(lambda a: a.privacy_ratio_lower95 or 0.0, ".1f"),
        "gap": spread(lambda a: off("mean loss, twins", a) - off("mean loss, planted", a), "+.3f"),
        "exposure": spread(lambda a: off("exposure", a), ".2f"),
        "seen": spread(lambda a: len(_seen(a)), ".0f"),
        "tests": audits[0].tests,
        "attacks": len(audits[0].attacks),
    }


def _whole(audit: AuditResult) -> list[AuditMetrics]:
    return [m for m in audit.metrics if m.family == ALL_FAMILIES]


def _seen(audit: AuditResult) -> list[Finding]:
    """Tests of the audit that see a leak."""
    return [f for f in audit.findings if f.question != "control" and f.p_adjusted <= LEVEL]


def _row(audit: AuditResult, words: Mapping[str, str]) -> list[str]:
    states = {m.state: m.metrics for m in _whole(audit)}
    off, on = states["off"], states["on"]
    planted, twins = (off[f"mean loss, {who}"].value for who in ("planted", "twins"))
    recipe = audit.config["tuning"]
    trained = f"{recipe['records_per_step']} × {recipe['steps']}"
    seen = len(_seen(audit))
    beating = [f.metric for f in _seen(audit) if f.question == "attack"]
    attacks = words["not run"]
    if audit.attacks:
        attacks = words["hits"].format(hits=len(beating), n=len(audit.attacks))
    exposure = off["exposure"].value if "exposure" in off else None
    return [
        f"`{audit.method}`",
        str(audit.seed),
        words["untrained"] if audit.method == "B0-never-trained" else trained,
        *(_rate(metrics["extraction, planted"]) for metrics in (on, off)),
        f"{planted:.2f} / {twins:.2f}",
        words["not run"] if exposure is None else f"{exposure:.2f}",
        words["hits"].format(hits=seen, n=audit.tests),
        attacks,
        words[audit.verdict],
    ]


def _rate(metric: object) -> str:
    value, low, high = (getattr(metric, name) for name in ("value", "low95", "high95"))
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"
