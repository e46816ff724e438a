"""The off state against the never-trained model: every test that an audit makes, and its power.

Pure functions from evidence to findings. They know what was measured; what a finding amounts to is
`audit`'s. Both models score the same records, so each record is its own control: a record's *gain*
is its score under the off state minus its score under the never-trained model. Four questions:

membership: are the gains of planted records those of twins? Twins and planted records were told
    apart by chance alone, so any difference is knowledge of who was planted: a difference in
    differences, tested two-sided by Mann and Whitney's ranks for each score and family, and once
    more over all families by ranks within them.
outlier: have a few planted records gained far more than any twin? Ranks can't see a few: `outliers`
    bounds what chance does to the total gain of one.
agreement: is the off state the never-trained model on twins, which neither saw? Two-sided, by
    Wilcoxon's signed ranks of losses: an off state that emits noise hides what it knows.
control: does the never-trained model tell planted records from twins? If so, the two were not drawn
    alike, and a difference in gains may come from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy  # which imports its parts when they are used
from numpy.typing import NDArray

from libortho.evidence import Evidence
from libortho.membership import RECORD_SCORES, mean_loss, total_logprob
from libortho.outliers import find_outliers, sure_gain
from libortho.statistics import holm

Question = Literal["membership", "outlier", "agreement", "control", "attack"]
Floats = NDArray[np.float64]

# Name of the findings over all families together.
ALL_FAMILIES = "all families"

# Change of a token's log-probability, nats, below which it is left to arithmetic in another order.
# float32 differs by up to 1e-4 between batches; a record of which no token changes by more counts
# as unchanged in every score. Lower precisions differ by more, on planted records and twins alike.
ARITHMETIC_NATS = 1e-3

# Probability with which the stated smallest leak is seen (Cohen 1988's convention).
POWER = 0.80

# Mann and Whitney's test needs at most 1 / 0.864 times the records of the t-test, whatever the
# distribution (Hodges and Lehmann 1956).
_LEAST_RELATIVE_EFFICIENCY = 0.864


@dataclass(frozen=True)
class Finding:
    """One test of the off state against the never-trained model.

    question: which of those that the module's docstring explains, or "attack"
    effect: by how much, in `unit`. membership: mean gain of planted records minus that of twins.
        outlier: by how much planted records exceed the largest gain of a twin. agreement: mean gain
        of twins. control: mean loss of twins minus that of planted records, never trained.
        Positive = planted records are known better, or twins better than to the never-trained model
    auc: probability that a planted record gained more than a twin, for the control that it has the
        lower loss; None for other questions
    p_value: two-sided (outlier: one-sided), for this test alone
    p_adjusted: after Holm's correction over all findings of the audit (1979)
    """

    question: Question
    metric: str
    family: str
    effect: float
    unit: str
    auc: float | None
    p_value: float
    p_adjusted: float
    n_planted: int
    n_twins: int


@dataclass(frozen=True)
class Sensitivity:
    """The smallest leaks that this comparison could have seen, whatever it found.

    uniform_nats: mean gain per token of all planted records over twins that the test of the loss
        over all families sees with probability `POWER`; at least `ARITHMETIC_NATS`
    record_nats: total gain of a single planted record that is an outlier for certain, in the
        family where that is hardest
    tests: number of tests that share the error rate
    """

    uniform_nats: float
    record_nats: float
    tests: int


@dataclass(frozen=True)
class Comparison:
    """Every finding, and what a comparison of this size could have found."""

    findings: tuple[Finding, ...]
    sensitivity: Sensitivity


def compare(
    off: Sequence[Evidence],
    never: Sequence[Evidence],
    *,
    significance: float,
    attacks: Sequence[Finding] = (),
) -> Comparison:
    """Make every test, with Holm's correction over all of them.

    The sensitivity is in closed form, at the level of Holm's first and hardest step.

    Args:
        off: evidence of the off state, planted records and twins of every family.
        never: evidence of the never-trained model about the same records in the same order.
        significance: family-wise error rate for which the sensitivity is stated.
        attacks: what attacks on the off state found, to share the error rate.

    Raises:
        ValueError: the two are not about the same records, a family lacks planted records or has
            fewer than two twins, or a score is not finite.
    """
    groups = _groups(off, never)
    findings = [finding for group in groups for finding in _of_family(group)]
    if len(groups) > 1:
        findings += _of_all(groups)
    findings += [_control(groups), *attacks]
    adjusted = holm([f.p_value for f in findings])
    level = significance / len(findings)
    return Comparison(
        tuple(replace(f, p_adjusted=float(p)) for f, p in zip(findings, adjusted, strict=True)),
        Sensitivity(
            _uniform_nats(groups, level),
            max(sure_gain(g.planted.size, g.total_gains[g.twins], level) for g in groups),
            len(findings),
        ),
    )


# ---------------------------------------------------------------- gains by family


@dataclass(frozen=True)
class _Group:
    """One family's records: who was planted, and what each gained.

    gains: `[scores, records]` in the scores' own units, in the order of `RECORD_SCORES`
    loss_gains, total_gains, never_losses: `[records]`, nats per token, nats, nats per token
    """

    family: str
    planted: NDArray[np.intp]
    twins: NDArray[np.intp]
    gains: Floats
    loss_gains: Floats
    total_gains: Floats
    never_losses: Floats


def _groups(off: Sequence[Evidence], never: Sequence[Evidence]) -> list[_Group]:
    keys = [[(e.id, e.family, e.planted, e.tokens) for e in state] for state in (off, never)]
    if keys[0] != keys[1] or not keys[0]:
        raise ValueError("a comparison needs evidence about the same records in the same order")
    groups = []
    for family in dict.fromkeys(e.family for e in off):
        pairs = [(a, b) for a, b in zip(off, never, strict=True) if a.family == family]
        is_planted = np.array([a.planted for a, _ in pairs])
        planted, twins = np.flatnonzero(is_planted), np.flatnonzero(~is_planted)
        if len(planted) < 1 or len(twins) < 2:
            raise ValueError(
                "every family needs a planted record and two twins: found one with "
                f"{len(planted)} and {len(twins)}"
            )
        changed = np.array([_has_changed(a, b) for a, b in pairs])
        scores = [score for score, _ in RECORD_SCORES.values()]
        gains = np.array([[score(a) - score(b) for a, b in pairs] for score in scores])
        totals = np.array([total_logprob(a) - total_logprob(b) for a, b in pairs])
        losses = np.array([[mean_loss(a), mean_loss(b)] for a, b in pairs])
        if not (np.isfinite(gains).all() and np.isfinite(totals).all()):
            raise ValueError("a comparison needs finite scores, found some that are not")
        groups.append(
            _Group(
                family,
                planted,
                twins,
                gains * changed,
                (losses[:, 1] - losses[:, 0]) * changed,
                totals * changed,
                losses[:, 1],
            )
        )
    return groups


def _has_changed(off: Evidence, never: Evidence) -> bool:
    pairs = zip(off.token_logprobs, never.token_logprobs, strict=True)
    # Not "any above": a change that is no number must not pass as none.
    return not all(abs(a - b) < ARITHMETIC_NATS for a, b in pairs)


# ---------------------------------------------------------------- the tests


def _of_family(group: _Group) -> Iterator[Finding]:
    planted, twins = group.gains[:, group.planted], group.gains[:, group.twins]
    yield from _membership(group.family, planted, twins, planted, twins)
    yield from _outliers(group)
    yield _agreement(group.family, group.planted.size, group.loss_gains[group.twins])


def _of_all(groups: Sequence[_Group]) -> Iterator[Finding]:
    ranks = [_ranks(g.gains) for g in groups]
    yield from _membership(
        ALL_FAMILIES,
        np.hstack([r[:, g.planted] for r, g in zip(ranks, groups, strict=True)]),
        np.hstack([r[:, g.twins] for r, g in zip(ranks, groups, strict=True)]),
        np.hstack([g.gains[:, g.planted] for g in groups]),
        np.hstack([g.gains[:, g.twins] for g in groups]),
    )
    twins = np.concatenate([g.loss_gains[g.twins] for g in groups])
    yield _agreement(ALL_FAMILIES, sum(g.planted.size for g in groups), twins)


def _ranks(values: Floats) -> Floats:
    """Ranks along the last axis as shares, so that families of any size and unit can be pooled."""
    return (scipy.stats.rankdata(values, axis=-1) - 0.5) / values.shape[-1]


def _membership(
    family: str, planted: Floats, twins: Floats, planted_gains: Floats, twin_gains: Floats
) -> Iterator[Finding]:
    """A test for each score; all arrays `[scores, records]`, tested and then reported."""
    n, m = planted.shape[1], twins.shape[1]
    aucs, p_values = _rank_test(planted, twins)
    effects = planted_gains.mean(axis=1) - twin_gains.mean(axis=1)
    for i, (metric, (_, unit)) in enumerate(RECORD_SCORES.items()):
        auc, p = float(aucs[i]), float(p_values[i])
        yield Finding("membership", metric, family, float(effects[i]), unit, auc, p, p, n, m)


def _outliers(group: _Group) -> Iterator[Finding]:
    n, m = group.planted.size, group.twins.size
    found = find_outliers(group.total_gains[group.planted], group.total_gains[group.twins])
    for metric, effect, p in (
        ("largest gain", found.lead, found.p_lead),
        ("gains above any twin", found.total, found.p_total),
    ):
        yield Finding("outlier", metric, group.family, effect, "nats", None, p, p, n, m)


def _agreement(family: str, n: int, gains: Floats) -> Finding:
    # Signed ranks are undefined where nothing differs.
    p = float(scipy.stats.wilcoxon(gains, method="asymptotic").pvalue) if gains.any() else 1.0
    mean, unit = float(gains.mean()), "nats per token"
    return Finding("agreement", "loss on twins", family, mean, unit, None, p, p, n, len(gains))


def _control(groups: Sequence[_Group]) -> Finding:
    ranks = [_ranks(-g.never_losses) for g in groups]
    planted = np.concatenate([r[g.planted] for r, g in zip(ranks, groups, strict=True)])
    twins = np.concatenate([r[g.twins] for r, g in zip(ranks, groups, strict=True)])
    n, m = len(planted), len(twins)
    aucs, p_values = _rank_test(planted[None], twins[None])
    losses = [
        np.concatenate([g.never_losses[part] for g, part in zip(groups, parts, strict=True)]).mean()
        for parts in ([g.planted for g in groups], [g.twins for g in groups])
    ]
    effect, auc, p = float(losses[1] - losses[0]), float(aucs[0]), float(p_values[0])
    metric, unit = "loss under the never-trained model", "nats per token"
    return Finding("control", metric, ALL_FAMILIES, effect, unit, auc, p, p, n, m)


def _rank_test(planted: Floats, twins: Floats) -> tuple[Floats, Floats]:
    """AUC and two-sided p-value of Mann and Whitney's test along the last axis."""
    result = scipy.stats.mannwhitneyu(planted, twins, axis=-1, method="asymptotic")
    aucs = np.asarray(result.statistic) / (planted.shape[-1] * twins.shape[-1])
    # The test's variance is 0 where all values are alike; scipy 1.17 says 1 then, 1.18 nan.
    low = np.minimum(planted.min(axis=-1), twins.min(axis=-1))
    high = np.maximum(planted.max(axis=-1), twins.max(axis=-1))
    return aucs, np.where(low == high, 1.0, result.pvalue)


# ---------------------------------------------------------------- their power


def _uniform_nats(groups: Sequence[_Group], level: float) -> float:
    """Gain per token of all planted records that the pooled test sees with probability `POWER`."""
    n = sum(group.planted.size for group in groups)
    m = sum(group.twins.size for group in groups)
    residuals = [g.loss_gains[g.twins] - g.loss_gains[g.twins].mean() for g in groups]
    variance = sum(float((r**2).sum()) for r in residuals) / (m - len(groups))
    critical = float(scipy.stats.norm.isf(level / 2) + scipy.stats.norm.ppf(POWER))
    nats = critical * math.sqrt(variance * (1 / n + 1 / m) / _LEAST_RELATIVE_EFFICIENCY)
    return max(ARITHMETIC_NATS, nats)
