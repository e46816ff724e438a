"""Every test of the off state against the never-trained model, made once more by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from libortho.contrast import ALL_FAMILIES, ARITHMETIC_NATS, Comparison, Finding, compare
from libortho.evidence import Evidence
from libortho.membership import RECORD_SCORES, mean_loss, total_logprob
from libortho.outliers import find_outliers
from libortho.simulation import OffState, SimulatedFamily, SimulatedStates, simulate

FAMILIES = (
    SimulatedFamily("codes", 5, 0.5),
    SimulatedFamily("people", 8, 2.5),
    SimulatedFamily("traps", 12, 1.5),
)
LEVEL = 0.05


def drawn(
    off: OffState | None = None,
    *,
    seed: int = 0,
    per_family: int = 12,
    families: Sequence[SimulatedFamily] = FAMILIES,
) -> SimulatedStates:
    rng = np.random.default_rng(seed)
    return simulate(rng, off, per_family=per_family, families=families, vocabulary=16)


def findings(comparison: Comparison, **wanted: str) -> list[Finding]:
    return [
        f
        for f in comparison.findings
        if all(getattr(f, name) == value for name, value in wanted.items())
    ]


def shifted(evidence: Evidence, nats: float) -> Evidence:
    """The same evidence with `nats` more log-probability at every token."""
    return replace(evidence, token_logprobs=tuple(p + nats for p in evidence.token_logprobs))


Score = Callable[[Evidence], float]


def gains(states: SimulatedStates, score: Score, family: str, planted: bool) -> list[float]:
    return [
        score(a) - score(b)
        for a, b in zip(states.off, states.never, strict=True)
        if a.family == family and a.planted == planted
    ]


@pytest.fixture(scope="module")
def leaky() -> SimulatedStates:
    """A leak that is weak enough for p-values between 0 and 1, and gains with ties."""
    return drawn(OffState(leak=0.05, wander=0.3))


def test_membership_is_mann_and_whitneys_test_of_gains(leaky: SimulatedStates) -> None:
    comparison = compare(leaky.off, leaky.never, significance=LEVEL)
    for family in FAMILIES:
        for metric, (score, unit) in RECORD_SCORES.items():
            planted = gains(leaky, score, family.name, True)
            twins = gains(leaky, score, family.name, False)
            expected = stats.mannwhitneyu(planted, twins, method="asymptotic").pvalue
            if len({*planted, *twins}) == 1:  # all tie: SciPy says 1 or, from 1.18 on, nan
                expected = 1.0
            (found,) = findings(
                comparison, question="membership", metric=metric, family=family.name
            )
            assert found.p_value == pytest.approx(expected)
            won = np.mean([(p > t) + (p == t) / 2 for p in planted for t in twins])
            assert found.auc == pytest.approx(won)
            assert found.effect == pytest.approx(np.mean(planted) - np.mean(twins))
            assert (found.unit, found.n_planted, found.n_twins) == (unit, 12, 12)


def test_families_are_pooled_by_ranks_within_them(leaky: SimulatedStates) -> None:
    comparison = compare(leaky.off, leaky.never, significance=LEVEL)
    score, _ = RECORD_SCORES["loss"]
    ranks: dict[bool, list[float]] = {True: [], False: []}
    for family in FAMILIES:
        known, guessed = (gains(leaky, score, family.name, planted) for planted in (True, False))
        for is_planted, values in ((True, known), (False, guessed)):
            below = [sum(w < v for w in known + guessed) for v in values]
            ranks[is_planted] += [b / len(known + guessed) for b in below]  # no ties in this score
    expected = stats.mannwhitneyu(ranks[True], ranks[False], method="asymptotic")
    (found,) = findings(comparison, question="membership", metric="loss", family=ALL_FAMILIES)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.n_planted == found.n_twins == 36


def test_agreement_is_wilcoxons_test_on_twins(leaky: SimulatedStates) -> None:
    comparison = compare(leaky.off, leaky.never, significance=LEVEL)
    for family in FAMILIES:
        twins = [-loss for loss in gains(leaky, mean_loss, family.name, False)]
        (found,) = findings(comparison, question="agreement", family=family.name)
        assert found.p_value == pytest.approx(stats.wilcoxon(twins, method="asymptotic").pvalue)
        assert found.effect == pytest.approx(np.mean(twins))


def test_holms_correction_is_over_every_finding_and_attacks_too(leaky: SimulatedStates) -> None:
    attack = Finding("attack", "sampling", "codes", 0.2, "of the records", None, 1e-3, 1, 12, 12)
    comparison = compare(leaky.off, leaky.never, significance=LEVEL, attacks=[attack])
    # 3 families with 8 scores, 2 outlier tests and agreement; 9 for all; the control; the attack.
    assert len(comparison.findings) == comparison.sensitivity.tests == 3 * 11 + 9 + 1 + 1
    p_values = [f.p_value for f in comparison.findings]
    expected = multipletests(p_values, method="holm")[1]
    assert [f.p_adjusted for f in comparison.findings] == pytest.approx(expected)
    (found,) = findings(comparison, question="attack")
    assert found.p_value == 1e-3 < found.p_adjusted < 1


def test_one_family_is_not_tested_twice() -> None:
    states = drawn(families=FAMILIES[:1])
    comparison = compare(states.off, states.never, significance=LEVEL)
    assert comparison.sensitivity.tests == 12
    assert {f.family for f in comparison.findings if f.question != "control"} == {"codes"}


# ---------------------------------------------------------------- what counts as a change


def test_arithmetic_is_no_change() -> None:
    states = drawn()
    # All planted records on one side of their twins, by less than what arithmetic may do.
    off = [shifted(e, ARITHMETIC_NATS * 0.9 * (1 if e.planted else -1)) for e in states.never]
    comparison = compare(off, states.never, significance=LEVEL)
    assert {f.p_value for f in comparison.findings if f.question != "control"} == {1.0}
    assert comparison.sensitivity.uniform_nats == ARITHMETIC_NATS


def test_a_change_beyond_arithmetic_is_seen() -> None:
    states = drawn()
    off = [shifted(e, ARITHMETIC_NATS * 1.1 * e.planted) for e in states.never]
    comparison = compare(off, states.never, significance=LEVEL)
    (found,) = findings(comparison, question="membership", metric="loss", family=ALL_FAMILIES)
    assert found.p_adjusted < 1e-6
    assert found.auc == 1


def test_one_token_that_changed_is_a_change() -> None:
    states = drawn()
    off = [
        replace(e, token_logprobs=(*e.token_logprobs[:-1], e.token_logprobs[-1] + 0.5))
        if e.planted
        else e
        for e in states.never
    ]
    (found,) = findings(
        compare(off, states.never, significance=LEVEL), metric="loss", family=ALL_FAMILIES
    )
    assert found.p_adjusted < 1e-6


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    states = drawn()
    first = states.off[0]
    broken = replace(first, token_logprobs=(value, *first.token_logprobs[1:]))
    with pytest.raises(ValueError, match="finite"):
        compare([broken, *states.off[1:]], states.never, significance=LEVEL)


def test_states_about_other_records_are_refused() -> None:
    states = drawn()
    for off, never in (
        (states.off, states.never[::-1]),
        (states.off[1:], states.never),
        ([], []),
    ):
        with pytest.raises(ValueError, match="same records"):
            compare(off, never, significance=LEVEL)
    few = [e for e in states.off if e.planted or e.family != "codes"]
    with pytest.raises(ValueError, match="two twins: found one with 12 and 0"):
        compare(few, few, significance=LEVEL)


def test_outliers_are_those_of_total_gains(leaky: SimulatedStates) -> None:
    comparison = compare(leaky.off, leaky.never, significance=LEVEL)
    for family in FAMILIES:
        expected = find_outliers(
            *(
                np.array(gains(leaky, total_logprob, family.name, planted))
                for planted in (True, False)
            )
        )
        (largest,) = findings(comparison, metric="largest gain", family=family.name)
        (summed,) = findings(comparison, metric="gains above any twin", family=family.name)
        assert (largest.effect, largest.p_value) == (expected.lead, expected.p_lead)
        assert (summed.effect, summed.p_value) == (expected.total, expected.p_total)


# ---------------------------------------------------------------- control and power


def test_the_control_sees_twins_that_were_drawn_unlike() -> None:
    states = drawn()
    (fair,) = findings(compare(states.off, states.never, significance=LEVEL), question="control")
    assert fair.p_adjusted > LEVEL
    never = [shifted(e, 3.0 * e.planted) for e in states.never]  # known better before training
    comparison = compare(never, never, significance=LEVEL)
    (unfair,) = findings(comparison, question="control")
    assert unfair.p_adjusted < 1e-6
    assert unfair.effect == pytest.approx(3 + fair.effect)
    assert unfair.auc is not None
    assert unfair.auc > 0.9
    assert all(f.p_adjusted == 1 for f in comparison.findings if f.question != "control")


def test_more_records_and_less_noise_make_it_more_sensitive() -> None:
    def uniform(per_family: int, wander: float) -> float:
        states = drawn(OffState(wander=wander), per_family=per_family)
        return compare(states.off, states.never, significance=LEVEL).sensitivity.uniform_nats

    assert uniform(12, 0.1) / uniform(48, 0.1) == pytest.approx(2, rel=0.3)
    assert uniform(12, 0.2) / uniform(12, 0.1) == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("family", [f.name for f in FAMILIES])
def test_a_record_with_the_stated_gain_is_an_outlier(family: str) -> None:
    states = drawn(OffState(wander=0.2))
    stated = compare(states.off, states.never, significance=LEVEL).sensitivity.record_nats
    at = next(i for i, e in enumerate(states.off) if e.family == family and e.planted)
    missing = stated - (total_logprob(states.off[at]) - total_logprob(states.never[at]))
    off = list(states.off)
    off[at] = shifted(off[at], (missing + 1e-6) / off[at].tokens)
    comparison = compare(off, states.never, significance=LEVEL)
    (found,) = findings(comparison, metric="largest gain", family=family)
    assert found.p_adjusted <= LEVEL


def test_scores_that_all_tie_have_a_p_value_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's variance is 0 then, of which scipy 1.17 makes 1 and scipy 1.18 makes nan."""
    real = stats.mannwhitneyu

    def undefined_for_ties(x: np.ndarray, y: np.ndarray, **options: object) -> SimpleNamespace:
        result = real(x, y, **options)
        tied = np.ptp(np.concatenate([x, y], axis=-1), axis=-1) == 0
        return SimpleNamespace(
            statistic=result.statistic, pvalue=np.where(tied, math.nan, result.pvalue)
        )

    monkeypatch.setattr(stats, "mannwhitneyu", undefined_for_ties)
    states = drawn()
    comparison = compare(states.never, states.never, significance=LEVEL)
    tested = findings(comparison, question="membership")
    assert tested
    assert all((f.p_value, f.auc) == (1.0, 0.5) for f in tested)
