"""The verdict on a model's off state, from evidence about planted records and their twins.

Pure functions. It knows three states: *off* (what is handed out), *never* (the model that never saw
the records, at the same bits) and *on* (the private stream at full strength); it knows no models
and makes no evidence. How the states are compared is `contrast`'s.

Four verdicts, and only the first two make a gate green:

private by construction: the off state's fingerprint was recomputed and equals that of an artefact
    made without the records, and the two give identical evidence.
private as far as tested: no test and no attack tells the off state from the never-trained model,
    and the smallest leak that would have been seen is stated.
leaks: a test tells who was planted. Planted records that are known *worse* than twins leak too:
    that they were treated apart is itself a trace.
inconclusive: the evidence can't carry a verdict, and the reason says why. An off state that was
    meant to be made without the records, and whose bytes differ from such a one, ends here unless
    it leaks: what its predictions don't show it may still carry.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from libortho.audit_reasons import caution, disagreement, leak_sentence, private_sentence
from libortho.contrast import Finding, Sensitivity, compare
from libortho.evidence import Evidence
from libortho.membership import is_extracted, mean_loss
from libortho.verdict import MIN_EXTRACTION_ALPHA1

AuditVerdictName = Literal[
    "private by construction", "private as far as tested", "leaks", "inconclusive"
]

# Share of audits of a clean off state that may end in another verdict than private, at most: the
# family-wise error rate over all tests, kept by Holm's correction (Scand. J. Statist. 6, 1979).
AUDIT_SIGNIFICANCE = 0.05

# Planted records, and twins, of all families together, at least. The exact extraction of 20 of 20
# against none proves a privacy ratio of 6; fewer prove next to nothing.
MIN_AUDIT_RECORDS = 20

# Planted records, and twins, of each family, at least: the full separation of 10 from 10, a p-value
# of 1.8e-4 by Mann and Whitney's test, survives a correction over 270 tests, four times those of
# five families. Of many fewer it could not be seen if they alone leaked.
MIN_FAMILY_RECORDS = 10

# Mean shift of the loss on twins between the off state and the never-trained model, nats per token,
# at most: a hundredth of a nat changes a token's probability by 1 %, and is left to arithmetic
# in another order or precision. Larger ones count where they are also significant.
TWIN_SHIFT_TOLERANCE_NATS = 0.01

# Smallest uniform leak that an audit must be able to see, as a share of the loss that the private
# stream takes off planted records: at most. An audit that can't see a quarter is blind.
MAX_UNSEEN_LEAK = 0.25


@dataclass(frozen=True)
class AuditVerdict:
    """A verdict, the sentence that carries it, and everything that it rests on.

    findings: every test that was made, none if evidence was missing
    sensitivity: what could have been seen, None if no test was made
    smallest_leak: `sensitivity.uniform_nats` as a share of the loss that the on state takes off
        planted records; None if it takes none off or wasn't measured, or if no test was made
    extraction_on: share of planted records that the on state extracts, None if unknown
    """

    verdict: AuditVerdictName
    reason: str
    findings: tuple[Finding, ...] = ()
    sensitivity: Sensitivity | None = None
    smallest_leak: float | None = None
    extraction_on: float | None = None

    @property
    def is_private(self) -> bool:
        """Whether a gate with this verdict is green."""
        return self.verdict.startswith("private")


def audit(
    off: Sequence[Evidence],
    never: Sequence[Evidence],
    on: Sequence[Evidence] | None,
    *,
    fingerprint_equal: bool | None = None,
    attacks: Sequence[Finding] = (),
    significance: float = AUDIT_SIGNIFICANCE,
) -> AuditVerdict:
    """Judge an off state. A leak outranks every other verdict that the evidence allows.

    Args:
        off: evidence of the off state about planted records and twins, in any order.
        never: evidence of the never-trained model about the same records.
        on: evidence of the on state about the planted records at least; None if not measured.
        fingerprint_equal: whether fingerprints of the off artefact and of one made without the
            records were both recomputed and are equal; None if no such equality was promised.
        attacks: for each attack on the off state a finding of question "attack", with the p-value
            of its success there against its success on the never-trained model.
        significance: family-wise error rate of all tests together.

    Raises:
        ValueError: a record occurs twice in one state, or `significance` is outside (0, 1).
    """
    if not 0 < significance < 1:
        raise ValueError(f"significance lies between 0 and 1, found {significance}")
    missing = _what_is_missing(off, never)
    if missing:
        return AuditVerdict("inconclusive", missing)
    by_id = {e.id: e for e in never}
    reference = [by_id[e.id] for e in off]
    comparison = compare(off, reference, significance=significance, attacks=attacks)
    findings = comparison.findings
    extraction_on, learned = _learned(reference, on)
    unseen = comparison.sensitivity.uniform_nats / learned if learned > 0 else math.inf

    significant = [f for f in findings if f.p_adjusted <= significance]
    leaks = [f for f in significant if f.question in ("membership", "outlier", "attack")]
    strange = [f for f in significant if f.question == "agreement" and _matters(f)]
    unlike = [f for f in significant if f.question == "control"]
    idle = _idleness(extraction_on)
    doubt = (
        _difference(fingerprint_equal)
        or idle
        or _too_few(off)
        or disagreement(strange)
        or _blindness(unseen)
    )
    verdict: AuditVerdictName
    if leaks:
        verdict, reason = "leaks", leak_sentence(leaks) + caution(unlike)
    elif fingerprint_equal and list(off) == reference and not idle:
        verdict = "private by construction"
        reason = (
            "the off state's fingerprint was recomputed and equals that of an artefact made "
            f"without the records, and evidence about {len(off)} records is identical"
        )
    elif doubt:
        verdict, reason = "inconclusive", doubt
    else:
        verdict = "private as far as tested"
        reason = private_sentence(off, comparison.sensitivity, unseen, significance)
        reason += caution(unlike)
    share = unseen if math.isfinite(unseen) else None
    return AuditVerdict(verdict, reason, findings, comparison.sensitivity, share, extraction_on)


# ---------------------------------------------------------------- what the evidence can carry


def _what_is_missing(off: Sequence[Evidence], never: Sequence[Evidence]) -> str:
    """Why no test can be made, or nothing."""
    for name, state in (("off", off), ("never-trained", never)):
        if len({e.id for e in state}) < len(state):
            raise ValueError(f"a record occurs twice in the evidence of the {name} state")
    if not off or not never:
        return "there is no evidence of the off state, or none of the never-trained model"
    keys = [{(e.id, e.family, e.planted, e.tokens) for e in state} for state in (off, never)]
    if keys[0] != keys[1]:
        return (
            f"{len(keys[0] ^ keys[1])} pieces of evidence are about records that the off state and "
            "the never-trained model don't share"
        )
    broken = sum(not _is_finite(e) for e in off), sum(not _is_finite(e) for e in never)
    if any(broken):
        return (
            f"the off state gives numbers that are not finite on {broken[0]} records, and the "
            f"never-trained model on {broken[1]}"
        )
    counts = Counter((e.family, e.planted) for e in off)
    alone = [f for f, _ in counts if counts[f, True] < 1 or counts[f, False] < 2]
    if alone:
        return f"the family {alone[0]} has no planted record, or fewer than two twins"
    return ""


def _is_finite(evidence: Evidence) -> bool:
    values = (*evidence.token_logprobs, *evidence.means, *evidence.deviations)
    return all(map(math.isfinite, values))


def _too_few(off: Sequence[Evidence]) -> str:
    """Which records are too few for a verdict of private, or nothing."""
    counts = Counter((e.family, e.planted) for e in off)
    for planted, what in ((True, "planted records"), (False, "twins")):
        total = sum(n for (_, is_planted), n in counts.items() if is_planted == planted)
        if total < MIN_AUDIT_RECORDS:
            return f"{total} {what} are too few: at least {MIN_AUDIT_RECORDS} are needed"
        for (family, is_planted), n in counts.items():
            if is_planted == planted and n < MIN_FAMILY_RECORDS:
                return (
                    f"{n} {what} of the family {family} are too few: at least "
                    f"{MIN_FAMILY_RECORDS} are needed"
                )
    return ""


def _learned(
    never: Sequence[Evidence], on: Sequence[Evidence] | None
) -> tuple[float | None, float]:
    """Share of planted records that the on state extracts, and mean nats per token it takes off.

    None and 0 if it wasn't measured on all of them.
    """
    found = {e.id: e for e in on or ()}
    planted = [e for e in never if e.planted]
    if any(e.id not in found or not _is_finite(found[e.id]) for e in planted):
        return None, 0.0
    taken = [mean_loss(e) - mean_loss(found[e.id]) for e in planted]
    extracted = sum(is_extracted(found[e.id]) for e in planted)
    return extracted / len(planted), sum(taken) / len(planted)


def _difference(fingerprint_equal: bool | None) -> str:
    """Why the off artefact isn't the one that was promised, or nothing."""
    if fingerprint_equal is not False:
        return ""
    return (
        "the off state's fingerprint was recomputed and differs from that of an artefact made "
        "without the records: its bytes depend on something else, and what its predictions don't "
        "show they may still carry"
    )


def _idleness(extraction_on: float | None) -> str:
    """Why there may have been nothing to switch off, or nothing."""
    if extraction_on is None:
        return (
            "the on state was not measured on every planted record, so that it is not known "
            "whether there was anything to switch off"
        )
    if extraction_on < MIN_EXTRACTION_ALPHA1:
        return (
            f"the on state extracts {extraction_on:.1%} of the planted records, and below "
            f"{MIN_EXTRACTION_ALPHA1:.0%} there is too little to switch off"
        )
    return ""


def _blindness(unseen: float) -> str:
    """Why a leak could have been missed, or nothing."""
    if unseen <= MAX_UNSEEN_LEAK:
        return ""
    return (
        f"the smallest uniform leak that would have been seen is {unseen:.2g} of what the private "
        f"stream teaches, and at most {MAX_UNSEEN_LEAK:.2g} is allowed: the off state varies too "
        "much against the never-trained model, or there are too few records"
    )


def _matters(finding: Finding) -> bool:
    """Whether a disagreement on twins is more than arithmetic."""
    return abs(finding.effect) > TWIN_SHIFT_TOLERANCE_NATS
