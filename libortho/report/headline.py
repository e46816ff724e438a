"""The verdict in one sentence.

Knows the gates of a run. A gate that is added later is one more item of `gates`.
"""

from __future__ import annotations

from dataclasses import dataclass

from libortho.verdict import VerdictName

from .blocks import Headline, Tone
from .run import Run


@dataclass(frozen=True)
class Gate:
    """One gate of a run.

    verdict: None if the gate did not run
    reason: what decided it, or why it did not run
    short: the figures of a gate that passes, as a clause
    """

    name: str
    verdict: VerdictName | None
    reason: str
    short: str = ""


def headline(run: Run) -> Headline:
    """The sentence that stands first: the worst verdict decides its tone."""
    found = gates(run)
    ran = [gate for gate in found if gate.verdict is not None]
    idle = [gate for gate in found if gate.verdict is None]
    if not ran:
        why = "; ".join(f"the {gate.name} gate: {gate.reason}" for gate in idle)
        return Headline("missing", "No verdict", f"No gate ran ({why}).")
    left_out = "".join(f"; the {gate.name} gate did not run ({gate.reason})" for gate in idle)
    tones: tuple[tuple[VerdictName, str], ...] = (
        ("fails", "fails"),
        ("inconclusive", "is inconclusive at"),
    )
    for verdict, verb in tones:
        red = [gate for gate in ran if gate.verdict == verdict]
        if red:
            told = "; ".join(f"{verb} the {gate.name} gate: {gate.reason}" for gate in red)
            tone: Tone = verdict
            return Headline(tone, verdict.capitalize(), f"{run.subject} {told}{left_out}.")
    which = f"the {ran[0].name} gate" if len(ran) == 1 else "both gates"
    if len(ran) > 2:
        which = f"all {len(ran)} gates"
    word = "Passes" if not idle else f"Passes, {' and '.join(gate.name for gate in ran)} only"
    clauses = ", and ".join(gate.short for gate in ran)
    return Headline("passes", word, f"{run.subject} passes {which}: {clauses}{left_out}.")


def gates(run: Run) -> list[Gate]:
    """Every gate, whether it ran or not; of audits the first, which is what a release is."""
    return [_privacy(run), *_audit(run), _perplexity(run)]


def _privacy(run: Run) -> Gate:
    result = run.results.exp1_kill_switch
    if result is None:
        return Gate("privacy", None, _why_missing(run, "exp1_kill_switch"))
    short = (
        f"it recites {result.hits_alpha1} of {result.n_planted} planted records at alpha = 1 and "
        f"{result.hits_alpha0} at alpha = 0"
    )
    if result.fingerprint_equal:
        short += ", where its fingerprint is that of before tuning"
    return Gate("privacy", result.verdict, result.verdict_reason, short)


def _audit(run: Run) -> list[Gate]:
    if not run.results.audits:
        return []  # an audit takes long, and is asked for by itself
    audit = run.results.audits[0]
    verdict: VerdictName = "inconclusive"
    if audit.verdict.startswith("private"):
        verdict = "passes"
    elif audit.verdict == "leaks":
        verdict = "fails"
    short = f"an audit with {audit.n_planted} planted records finds it {audit.verdict}"
    return [Gate("audit", verdict, audit.verdict_reason, short)]


def _perplexity(run: Run) -> Gate:
    result = run.results.exp2_null_test
    if result is None:
        return Gate("perplexity", None, _why_missing(run, "exp2_null_test"))
    ratio = run.value("exp2_null_test.arms.alpha1.ratio")
    short = (
        "its perplexity at alpha = 1 is within the limit"
        if ratio is None
        else f"its perplexity at alpha = 1 is {ratio:.3f} times the unquantised model's"
    )
    return Gate("perplexity", result.verdict, result.verdict_reason, short)


def _why_missing(run: Run, section: str) -> str:
    return run.results.reasons.get(section) or "no reason given"
