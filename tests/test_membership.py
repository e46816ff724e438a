"""Scores of memorisation against plain loops, scikit-learn and scipy, and intervals that cover."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_curve

from libortho.evidence import Evidence
from libortho.membership import (
    RECORD_SCORES,
    attack_auc,
    discovery_probability,
    exposure,
    extraction_strength,
    forced_similarity,
    is_extracted,
    ks_distance,
    loss_score,
    max_exposure,
    mean_loss,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    total_logprob,
    true_positive_rate,
    zlib_score,
)


@st.composite
def some_evidence(draw: st.DrawFn, tokens: int | None = None) -> Evidence:
    n = tokens or draw(st.integers(1, 25))

    def some(low: float, high: float) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.floats(low, high), min_size=n, max_size=n)))

    ranks = tuple(draw(st.lists(st.sampled_from([0, 0, 0, 1, 7]), min_size=n, max_size=n)))
    similarity = draw(st.floats(0, 0.99)) if any(ranks) else 1.0
    size = draw(st.integers(8, 200))
    return Evidence("a", "f", True, some(-20, 0), ranks, some(-9, 0), some(0, 4), similarity, size)


def made(logprobs: list[float], ranks: list[int] | None = None, **changes: Any) -> Evidence:
    """Evidence with these log-probabilities and ranks, and nothing special otherwise."""
    ranks = ranks or [1] * len(logprobs)
    similarity = 0.5 if any(ranks) else 1.0
    ones = (1.0,) * len(logprobs)
    means = (-2.0,) * len(logprobs)
    found = Evidence("a", "f", True, tuple(logprobs), tuple(ranks), means, ones, similarity, 10)
    return replace(found, **changes)


scores = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=30)  # with many ties


# ---------------------------------------------------------------- scores of one record


@given(some_evidence())
@settings(max_examples=60)
def test_scores_are_those_of_plain_loops(evidence: Evidence) -> None:
    logprobs = evidence.token_logprobs
    loss = -sum(logprobs) / len(logprobs)
    assert mean_loss(evidence) == pytest.approx(loss)
    assert total_logprob(evidence) == pytest.approx(sum(logprobs))
    assert loss_score(evidence) == pytest.approx(-loss)
    assert zlib_score(evidence) == pytest.approx(-loss / evidence.zlib_bytes)

    k = max(1, len(logprobs) * 20 // 100)
    assert min_k_score(evidence) == pytest.approx(sum(sorted(logprobs)[:k]) / k)
    standard = sorted(
        (p - mean) / max(deviation, 1e-6)
        for p, mean, deviation in zip(logprobs, evidence.means, evidence.deviations, strict=True)
    )
    assert min_k_plus_plus_score(evidence) == pytest.approx(sum(standard[:k]) / k)


@given(some_evidence())
def test_extraction_strength_is_the_shortest_hint_that_completes(evidence: Evidence) -> None:
    n = evidence.tokens
    hint = next(k for k in range(n + 1) if all(rank == 0 for rank in evidence.ranks[k:]))
    assert extraction_strength(evidence) == pytest.approx(1 - hint / n)
    assert (extraction_strength(evidence) == 1) == is_extracted(evidence)
    assert is_extracted(evidence) == (forced_similarity(evidence) == 1)


def test_extraction_strength_is_0_if_not_even_the_last_token_follows() -> None:
    assert extraction_strength(made([-1.0] * 4, [0, 0, 0, 1])) == 0
    assert extraction_strength(made([-1.0] * 4, [2, 0, 0, 0])) == 0.75


@given(logprob=st.floats(-40, 0), draws=st.integers(1, 10_000))
def test_discovery_is_one_hit_or_more_of_a_binomial(logprob: float, draws: int) -> None:
    expected = stats.binom.sf(0, draws, math.exp(logprob))
    assert discovery_probability(made([logprob / 2] * 2), draws) == pytest.approx(
        expected, rel=1e-6, abs=1e-12
    )


def test_discovery_of_the_certain_the_hopeless_and_the_rare() -> None:
    assert discovery_probability(made([1e-7, 0.0])) == 1.0  # a sum that rounding took above 0
    assert discovery_probability(made([-800.0])) == 0.0
    # 1 - (1 - p)^n in float64 would be 0: p = 1e-20 is lost beside 1.
    assert discovery_probability(made([-20 * math.log(10)])) == pytest.approx(
        1e-17, rel=1e-6, abs=0
    )
    with pytest.raises(ValueError, match="at least one draw"):
        discovery_probability(made([-1.0]), 0)


def test_ratio_is_what_the_never_trained_model_loses_more() -> None:
    state, never = made([-1.0, -3.0]), made([-4.0, -5.0])
    assert ratio_score(state, never) == pytest.approx(2.5)
    for other in (replace(never, id="b"), made([-4.0])):
        with pytest.raises(ValueError, match="same record"):
            ratio_score(state, other)


@pytest.mark.parametrize("metric", RECORD_SCORES)
def test_every_score_rises_with_knowledge(metric: str) -> None:
    score, _ = RECORD_SCORES[metric]
    known = made([-0.001] * 5, [0] * 5)
    assert score(known) > score(made([-9.0] * 5))


# ---------------------------------------------------------------- exposure


@given(
    references=st.lists(st.integers(0, 9).map(float), min_size=1, max_size=40),
    loss=st.integers(0, 9),
)
def test_exposure_is_by_rank_and_ties_count_against_it(references: list[float], loss: int) -> None:
    rank = 1
    for reference in references:
        rank += reference <= loss
    found = exposure(loss, references)
    assert found == pytest.approx(math.log2((len(references) + 1) / rank))
    assert 0 <= found <= max_exposure(len(references))


def test_exposure_of_the_best_the_worst_and_the_indistinct() -> None:
    assert exposure(1.0, [2.0] * 7) == 3.0 == max_exposure(7)
    assert exposure(3.0, [2.0] * 7) == 0.0
    assert exposure(2.0, [2.0] * 7) == 0.0
    with pytest.raises(ValueError, match="finite"):
        exposure(math.nan, [1.0])
    with pytest.raises(ValueError, match="finite"):
        exposure(1.0, [])


def test_two_to_the_minus_exposure_is_a_p_value() -> None:
    rng = np.random.default_rng(0)
    p = [2.0 ** -exposure(*(x := rng.normal(size=16))[:1], x[1:]) for _ in range(4000)]
    for level in (1 / 16, 1 / 4, 1 / 2):
        assert np.mean(np.array(p) <= level + 1e-12) == pytest.approx(level, abs=0.03)


# ---------------------------------------------------------------- attacks on many records


@given(planted=scores, twins=scores)
def test_auc_counts_pairs(planted: list[float], twins: list[float]) -> None:
    won = sum((p > t) + (p == t) / 2 for p in planted for t in twins)
    found = attack_auc(planted, twins)
    assert found.value == pytest.approx(won / len(planted) / len(twins))
    assert found.interval.low <= found.value <= found.interval.high
    assert found.interval.high - found.interval.low > 0.01
    mirrored = attack_auc(twins, planted)
    assert mirrored.value == pytest.approx(1 - found.value)
    assert mirrored.interval.low == pytest.approx(1 - found.interval.high, abs=1e-6)


@pytest.mark.parametrize("auc", [0.5, 0.8, 0.97])
def test_auc_interval_covers(auc: float) -> None:
    rng = np.random.default_rng(1)
    shift = math.sqrt(2) * stats.norm.ppf(auc)  # of two normal distributions with this AUC
    repeats = 250
    inside = 0
    for _ in range(repeats):
        interval = attack_auc(rng.normal(shift, 1, 30), rng.normal(0, 1, 30)).interval
        inside += interval.low <= auc <= interval.high
    assert stats.binom.ppf(0.001, repeats, 0.95) <= inside <= repeats


@given(planted=scores, twins=scores, rate=st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.5, 0.9]))
def test_true_positive_rate_is_the_best_on_the_roc_curve(
    planted: list[float], twins: list[float], rate: float
) -> None:
    labels = [1] * len(planted) + [0] * len(twins)
    false, true, _ = roc_curve(labels, [*planted, *twins], drop_intermediate=False)
    found = true_positive_rate(planted, twins, rate)
    assert found.value == pytest.approx(true[false <= rate + 1e-12].max())
    assert found.interval.low <= found.value <= found.interval.high


def test_allowed_false_positives_survive_rounding() -> None:
    twins = np.arange(100.0)
    planted = np.array([70.5, 71.5])  # 29 twins are above 70, and 0.29 * 100 is 28.999...
    assert true_positive_rate(planted, twins, 0.29).value == 1.0
    assert true_positive_rate(planted, twins, 0.28).value == 0.5
    with pytest.raises(ValueError, match="false-positive rate"):
        true_positive_rate(planted, twins, 1.0)


@given(first=scores, second=scores)
def test_ks_distance_is_the_largest_gap_of_two_step_functions(
    first: list[float], second: list[float]
) -> None:
    gaps = [
        abs(sum(x <= at for x in first) / len(first) - sum(x <= at for x in second) / len(second))
        for at in [*first, *second]
    ]
    found = ks_distance(first, second)
    assert found.value == pytest.approx(max(gaps))
    assert 0 <= found.interval.low <= found.value <= found.interval.high <= 1


def test_ks_interval_holds_a_true_distance_and_narrows() -> None:
    rng = np.random.default_rng(2)
    truth = 2 * stats.norm.cdf(0.5) - 1  # of two normal distributions one deviation apart
    widths = []
    for n in (40, 160, 640):
        interval = ks_distance(rng.normal(0, 1, n), rng.normal(1, 1, n)).interval
        assert interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    assert all(wide / narrow == pytest.approx(2, rel=0.2) for wide, narrow in pairwise(widths[1:]))


@pytest.mark.parametrize("function", [attack_auc, true_positive_rate, ks_distance])
@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_scores_that_are_none_are_refused(function: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        function(bad, [1.0])
    with pytest.raises(ValueError, match="finite"):
        function([1.0], bad)


@pytest.mark.parametrize("function", [attack_auc, ks_distance])
def test_confidence_outside_its_range_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="confidence"):
        function([1.0], [2.0], 95)


def test_shares_of_tokens_outside_their_range_are_refused() -> None:
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share"):
            min_k_score(made([-1.0]), share)
