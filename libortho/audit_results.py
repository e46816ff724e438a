"""One audit as it stands in the results file: typed, without any record's evidence.

It knows fields and units, not how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from libortho.attacks.comparison import AttackResult
from libortho.attacks.dose import DosePoint
from libortho.audit import AuditVerdictName
from libortho.audit_metrics import AuditMetrics
from libortho.contrast import Finding


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What one method's off state gives away, beside the never-trained model's."""

    # What ran
    method: str  # such as "ortho"
    promise: str  # what the method can promise about its off state, in words
    model: str  # registry name, hub id or folder name
    compute_dtype: str
    seed: int
    config: dict[str, Any]  # separation and training settings
    records_source: str
    n_planted: int
    n_twins: int

    # Judgement
    verdict: AuditVerdictName
    verdict_reason: str
    construction_checked: bool  # whether equal fingerprints may carry the verdict
    fingerprint_off: str | None = None  # SHA-256, hex, of the off state as it is handed out
    fingerprint_without_records: str | None = None  # of one made now from public inputs alone
    extraction_on: float | None = None  # share of planted records
    privacy_ratio: float | None = None  # extraction on / off, half a hit for none
    privacy_ratio_lower95: float | None = None  # score interval
    smallest_leak_nats: float | None = None  # nats per token, uniform; seen with probability 0.8
    smallest_leak_share: float | None = None  # of what the on state takes off planted records
    tests: int  # that share the error rate

    # Evidence
    bits_off: float  # stored bits per linear weight
    bits_on: float
    metrics: tuple[AuditMetrics, ...]  # states "off", "on" and "never", all families and each
    findings: tuple[Finding, ...]  # every test, with its p-value after Holm's correction
    attacks: tuple[AttackResult, ...]
    dose_curve: tuple[DosePoint, ...]
    seconds: dict[str, float]  # by stage, preparation left out
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null or empty -> why
