"""Figures of the READMEs' table of audits, from a results file that `audits.py` merged.

Formats figures; the words around them are `readme_texts`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES
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


def _row(audit: AuditResult, words: Mapping[str, str]) -> list[str]:
    states = {m.state: m.metrics for m in audit.metrics if m.family == ALL_FAMILIES}
    off, on = states["off"], states["on"]
    planted, twins = (off[f"mean loss, {who}"].value for who in ("planted", "twins"))
    recipe = audit.config["tuning"]
    trained = f"{recipe['records_per_step']} × {recipe['steps']}"
    seen = sum(f.p_adjusted <= LEVEL for f in audit.findings if f.question != "control")
    beating = [f.metric for f in audit.findings if f.question == "attack" and f.p_adjusted <= LEVEL]
    attacks = words["not run"]
    if audit.attacks:
        attacks = words["hits"].format(hits=len(beating), n=len(audit.attacks))
    exposure = off["exposure"].value if "exposure" in off else None
    return [
        f"`{audit.method}`",
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
