"""The sentence that carries a verdict: what was found, how much of it, where, and what it rests on.

Pure functions from findings to text. They know what findings mean, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from libortho.contrast import ALL_FAMILIES, POWER, Finding, Sensitivity
from libortho.evidence import Evidence


def leak_sentence(leaks: Sequence[Finding]) -> str:
    """What the most significant finding saw, and in which families any saw something."""
    worst = min(leaks, key=lambda f: (f.p_adjusted, f.p_value))
    where = sorted({f.family for f in leaks} - {ALL_FAMILIES}) or [ALL_FAMILIES]
    if worst.question == "outlier":
        who = "one planted record" if worst.metric == "largest gain" else "planted records together"
        how = (
            f"over the never-trained model, {who} of {worst.family} gained {worst.effect:.1f} nats "
            "more than any twin"
        )
    elif worst.question == "attack":
        how = (
            f"the attack {worst.metric} gets {abs(worst.effect):.3g} {worst.unit} "
            f"{'more' if worst.effect > 0 else 'less'} out of {worst.family} than out of the "
            "never-trained model"
        )
    else:
        direction = "better" if (worst.auc or 0) > 0.5 else "worse"
        how = (
            f"by {worst.metric}, planted records of {worst.family} are known {direction} than "
            f"twins: {worst.effect:+.3g} {worst.unit} on average beyond the never-trained model "
            f"(AUC {worst.auc:.3f})"
        )
    return (
        f"{how}; p = {worst.p_adjusted:.1e} after correction, {worst.n_planted} planted records "
        f"and {worst.n_twins} twins. {len(leaks)} tests see a leak, in: {', '.join(where)}"
    )


def caution(unlike: Sequence[Finding]) -> str:
    """What weakens a comparison with these twins, or nothing."""
    if not unlike:
        return ""
    return (
        f". The never-trained model tells planted records from twins too (AUC {unlike[0].auc:.3f}):"
        " they were not drawn alike, and what differs between them may come from that"
    )


def disagreement(strange: Sequence[Finding]) -> str:
    """Why the off state isn't the never-trained model, or nothing."""
    if not strange:
        return ""
    worst = min(strange, key=lambda f: (f.p_adjusted, f.p_value))
    return (
        "the off state is not the never-trained model: on twins of "
        f"{worst.family}, which neither saw, the {worst.metric} gives {worst.effect:+.3g} "
        f"{worst.unit} (p = {worst.p_adjusted:.1e} after correction). What a changed or damaged "
        "off state doesn't tell in these tests, it may still carry"
    )


def private_sentence(
    off: Sequence[Evidence], seen: Sensitivity, unseen: float, significance: float
) -> str:
    """What was tested, and the smallest leaks that it would have shown."""
    planted = sum(e.planted for e in off)
    return (
        f"none of {seen.tests} tests tells who was planted, at a family-wise error rate of "
        f"{significance:.2g} (Holm). With "
        f"{planted} planted records and {len(off) - planted} twins, a uniform leak of "
        f"{seen.uniform_nats:.2g} nats per token ({unseen:.2g} of what the private stream teaches) "
        f"would have been seen with probability {POWER:.2f}, and a single record known better by "
        f"{seen.record_nats:.1f} nats in all"
    )
