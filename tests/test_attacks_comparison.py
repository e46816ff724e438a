"""From two runs of an attack to its result: the tests' error rates, and what they see."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from libortho.attacks import AttackRun, Sampling, compare_runs
from libortho.attacks.comparison import Rate, outlier_p_value
from libortho.attacks.permutation import ALL_FAMILIES, membership_test

NATS_ATTACK = Sampling()


class RankAttack(Sampling):
    """Stands for attacks whose scores are no log-probabilities."""

    score_unit = "ranks"


def labels(planted: int, twins: int) -> list[bool]:
    return [True] * planted + [False] * twins


def run(scores: Any, families: list[str], planted: list[bool], hits: Any = None) -> AttackRun:
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    if hits is None:
        hits = np.zeros(scores.shape, dtype=bool)
    return AttackRun(
        tuple(f"r{i}" for i in range(len(planted))),
        tuple(families),
        tuple(planted),
        tuple(f"variant {v}" for v in range(len(scores))),
        scores,
        np.atleast_2d(hits),
        (sum(planted), len(planted) - sum(planted)),
    )


# --- the permutation test -----------------------------------------------------------------------


def test_one_cell_is_the_exact_rank_test() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.7, 1.5):
        gains = np.concatenate([rng.normal(shift, 1, 7), rng.normal(0, 1, 6)])
        exact = stats.mannwhitneyu(gains[:7], gains[7:], method="exact")
        ours = membership_test(gains[None], ["f"] * 13, labels(7, 6), resamples=20_000)
        (cell,) = ours.cells
        # 1,716 exchanges are possible; 20,000 draws of them have a standard error of 0.0035.
        assert cell.p_value == pytest.approx(exact.pvalue, abs=0.015)
        assert ours.p_value == cell.p_value  # with one cell there is nothing to correct
        assert cell.auc == pytest.approx(exact.statistic / 42)
        assert cell.effect == pytest.approx(gains[:7].mean() - gains[7:].mean())


def test_families_are_exchanged_apart() -> None:
    """Stratified: the reference permutes labels within families by scipy, pair by pair."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.8, 1, 6), rng.normal(0, 1, 6)
    # Families of one pair each: exchanging within a family is exchanging a pair.
    gains = np.ravel(np.column_stack([first, second]))
    families = [f"f{i}" for i in range(6) for _ in range(2)]
    ours = membership_test(gains[None], families, [True, False] * 6, resamples=20_000)
    (pooled,) = [c for c in ours.cells if c.family == ALL_FAMILIES]
    wins = int((first > second).sum())
    # The rank sum within pairs counts wins: a sign test.
    assert pooled.p_value == pytest.approx(stats.binomtest(wins, 6).pvalue, abs=0.015)
    assert pooled.auc == pytest.approx(wins / 6)


@given(
    values=st.lists(st.integers(-3, 3), min_size=6, max_size=14),
    planted=st.integers(2, 4),
)
def test_ties_and_areas_are_those_of_scikit_learn(values: list[int], planted: int) -> None:
    flags = labels(planted, len(values) - planted)
    test = membership_test(np.array([values], dtype=float), ["f"] * len(values), flags, resamples=9)
    assert test.cells[0].auc == pytest.approx(roc_auc_score(flags, values))
    if len(set(values)) == 1:
        assert test.p_value == 1.0
    assert 0.1 <= test.p_value <= 1.0  # the observed labels are one of the ten draws


def test_the_error_rate_holds_with_ties_and_uneven_families() -> None:
    rng = np.random.default_rng(2)
    families = ["a"] * 9 + ["b"] * 16
    flags = labels(4, 5) + labels(10, 6)
    false_alarms = 0
    audits = 300
    for audit in range(audits):
        gains = rng.normal(size=(3, 25)) * np.array([1.0] * 9 + [50.0] * 16)
        gains[1] = np.round(gains[1] / 20)  # mostly ties
        gains[2] = gains[0] + rng.normal(size=25) / 10  # all but the same score
        test = membership_test(gains, families, flags, resamples=199, seed=audit)
        false_alarms += test.p_value <= 0.05
    # 5 % of 300 are 15; more than 26 have a probability below 0.4 % if the rate is kept.
    assert stats.binom.sf(26, audits, 0.05) < 0.004
    assert 3 <= false_alarms <= 26


def test_one_leaking_family_of_five_is_named() -> None:
    rng = np.random.default_rng(3)
    families = [f"f{i // 20}" for i in range(100)]
    flags = (labels(10, 10)) * 5
    gains = rng.normal(size=(4, 100))
    leak = np.array(flags) & np.array([f == "f3" for f in families])
    gains[2, leak] += 3.0
    test = membership_test(gains, families, flags)
    assert test.p_value < 0.01
    assert (test.strongest.score, test.strongest.family) == (2, "f3")
    assert test.p_value >= test.strongest.p_value  # corrected for 4 scores in 6 groups


def test_a_permutation_test_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(ValueError, match="0 planted records and 3 twins"):
        membership_test(np.zeros((1, 3)), ["f"] * 3, labels(0, 3))
    with pytest.raises(ValueError, match="finite"):
        membership_test(np.full((1, 4), np.nan), ["f"] * 4, labels(2, 2))


# --- the outlier test ---------------------------------------------------------------------------


def test_five_leaked_records_of_200_are_seen_where_ranks_see_none() -> None:
    rng = np.random.default_rng(4)
    families, flags = ["f"] * 400, labels(200, 200)
    gains = rng.normal(0, 0.3, 400)
    gains[:5] += 15.0
    result = compare_runs(
        NATS_ATTACK, run(gains, families, flags), run(np.zeros(400), families, flags)
    )
    assert result.p_membership > 0.05
    assert result.p_outlier == pytest.approx(np.exp(-14), rel=5)
    assert result.p_value == pytest.approx(2 * result.p_outlier)
    assert result.beats_never


@pytest.mark.parametrize("draw", ["normal", "laplace", "exponential"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("twins", [5, 40])
def test_outliers_of_chance_are_no_alarm(draw: str, scale: float, twins: int) -> None:
    rng = np.random.default_rng(5)
    flags = labels(twins, twins)
    audits = 1000
    alarms = 0
    for _ in range(audits):
        gains = getattr(rng, draw)(scale=scale, size=(1, 2 * twins))
        p_value = outlier_p_value(gains, ["f"] * (2 * twins), flags)
        assert p_value is not None
        alarms += p_value <= 0.05
    assert alarms <= 70  # 5 % are 50; more than 70 have a probability of 0.2 %


def test_many_places_to_stand_out_are_corrected_for() -> None:
    gains = np.zeros((1, 20))
    gains[0, 0] = 6.0
    once = outlier_p_value(gains, ["f"] * 20, labels(10, 10))
    assert once == pytest.approx(1 / (1 + np.exp(6)))  # twins don't vary: Markov's bound alone
    often = outlier_p_value(
        np.vstack([gains] * 3 + [np.zeros((1, 20))]), ["f"] * 20, labels(10, 10)
    )
    assert often == pytest.approx(4 * once)


def test_scores_that_are_no_likelihoods_have_no_outlier_test() -> None:
    families, flags = ["f"] * 12, labels(6, 6)
    never = run(np.zeros(12), families, flags)
    result = compare_runs(RankAttack(), run(np.arange(12.0)[::-1], families, flags), never)
    assert result.p_outlier is None
    assert "ranks" in result.reasons["p_outlier"]
    assert result.p_value == result.p_membership
    few = labels(6, 4)
    result = compare_runs(
        NATS_ATTACK, run(np.arange(10.0), families[:10], few), run(np.zeros(10), families[:10], few)
    )
    assert result.p_outlier is None
    assert "fewer than 5 twins" in result.reasons["p_outlier"]


# --- results ------------------------------------------------------------------------------------


def test_knowing_planted_records_worse_is_a_trace_too() -> None:
    families, flags = ["f"] * 40, labels(20, 20)
    off = run(np.concatenate([np.full(20, -2.0), np.zeros(20)]), families, flags)
    result = compare_runs(NATS_ATTACK, off, run(np.zeros(40), families, flags))
    assert result.beats_never
    assert result.effect == -2.0
    assert result.auc == 0.0


def test_what_the_reference_knows_as_well_is_no_gain() -> None:
    families, flags = ["f"] * 40, labels(20, 20)
    hits = np.array([True] * 10 + [False] * 30)
    same = run(np.arange(40.0), families, flags, hits)
    result = compare_runs(NATS_ATTACK, same, same)
    assert result.p_value == 1.0
    assert (result.off_planted.hits, result.never_planted.hits) == (10, 10)


def test_rounding_is_no_gain() -> None:
    """Equal weights in other batches: every planted record a hair above every twin."""
    families, planted = ["f"] * 60, labels(30, 30)
    never = np.random.default_rng(0).normal(-80, 20, 60)
    hair = np.where(planted, 2e-4, -2e-4)
    result = compare_runs(
        NATS_ATTACK, run(never + hair, families, planted), run(never, families, planted)
    )
    assert (result.p_value, result.auc, result.effect) == (1.0, 0.5, 0.0)
    seen = compare_runs(
        NATS_ATTACK, run(never + 100 * hair, families, planted), run(never, families, planted)
    )
    assert seen.p_value < 1e-3


def test_hits_alone_can_tell() -> None:
    """An attack may get secrets whose scores say nothing."""
    families, flags = ["f"] * 40, labels(20, 20)
    flat = np.zeros(40)
    hits = np.array([True] * 12 + [False] * 28)
    result = compare_runs(
        RankAttack(), run(flat, families, flags, hits), run(flat, families, flags)
    )
    assert result.beats_never
    assert result.strongest == "whole secrets"
    assert result.effect == pytest.approx(0.6)
    assert result.variants[0].auc == 0.5


def test_rates_are_clopper_pearson() -> None:
    rate = Rate.of(2, 20)
    exact = stats.binomtest(2, 20).proportion_ci(0.95, method="exact")
    assert (rate.low95, rate.high95) == pytest.approx((exact.low, exact.high))


def test_ids_are_escaped_and_scores_not_shown() -> None:
    families, flags = ["f"] * 4, labels(2, 2)
    odd = run([0.123456, 2, 3, 4], families, flags, [True, False, False, False])
    odd = dataclasses.replace(odd, ids=("a\nb", "c", "d", "e"))
    assert "0.123" not in repr(odd)
    result = compare_runs(NATS_ATTACK, odd, odd)
    assert result.extracted == ("a\\u000ab",)


def test_runs_that_do_not_fit_are_refused() -> None:
    families, flags = ["f"] * 4, labels(2, 2)
    one = run(np.zeros(4), families, flags)
    with pytest.raises(ValueError, match="same records"):
        compare_runs(NATS_ATTACK, one, dataclasses.replace(one, ids=("w", "x", "y", "z")))
    with pytest.raises(ValueError, match="level"):
        compare_runs(NATS_ATTACK, one, one, level=0.0)
    with pytest.raises(ValueError, match="not finite"):
        run([np.inf, 0, 0, 0], families, flags)
    with pytest.raises(ValueError, match="shape"):
        dataclasses.replace(one, scores=np.zeros((1, 3)))
