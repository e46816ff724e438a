"""The statistics against published values, brute force and exact coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from libortho.statistics import (
    bounded_mean_interval,
    holm,
    mcnemar_exact,
    mean_difference_interval,
    mean_interval,
    paired_bootstrap_ratio,
    privacy_ratio,
    proportion_interval,
)


@pytest.mark.parametrize(
    ("on", "off", "n", "lower"),
    [(20, 0, 20, 6.1), (40, 0, 40, 11.3), (100, 0, 100, 26.9), (200, 0, 200, 52.9)],
)
def test_what_n_records_can_prove(on: int, off: int, n: int, lower: float) -> None:
    estimate = privacy_ratio(on, n, off, n)
    assert estimate.lower == pytest.approx(lower, abs=0.05)
    assert estimate.ratio == pytest.approx(2 * n)
    assert estimate.censored
    assert estimate.upper == math.inf


def test_a_point_of_eight_from_few_records_proves_little() -> None:
    estimate = privacy_ratio(16, 20, 2, 20)
    assert estimate.ratio == pytest.approx(8.0)
    assert estimate.lower == pytest.approx(2.5, abs=0.05)
    assert not estimate.censored


def test_limits_are_ordered_and_finite_for_all_small_counts() -> None:
    sizes = [1, 2, 3, 5, 8, 12]
    for n_on, n_off in itertools.product(sizes, sizes):
        for on, off in itertools.product(range(n_on + 1), range(n_off + 1)):
            estimate = privacy_ratio(on, n_on, off, n_off)
            where = (on, n_on, off, n_off, estimate)
            assert math.isfinite(estimate.ratio), where
            assert math.isfinite(estimate.lower), where
            assert 0 <= estimate.lower <= estimate.ratio <= estimate.upper, where
            assert math.isfinite(estimate.upper) == (off > 0), where
            assert estimate.censored == (off == 0), where
            assert (estimate.lower == 0) == (on == 0), where


@pytest.mark.parametrize("n", [20, 40])
def test_agrees_with_the_closed_form_where_that_is_sound(n: int) -> None:
    for on, off in itertools.product(range(n // 2, n, 3), range(1, n // 2, 3)):
        estimate = privacy_ratio(on, n, off, n)
        low, high = confint_proportions_2indep(on, n, off, n, compare="ratio", method="score")
        assert estimate.lower == pytest.approx(low, rel=1e-6)
        assert estimate.upper == pytest.approx(high, rel=1e-6)


def test_lower_limit_covers_at_the_corner_where_the_closed_form_fails() -> None:
    # All of one extracted against one of three: no evidence of any ratio above 1.
    assert privacy_ratio(1, 1, 1, 3).lower < 1


@given(n=st.integers(2, 60), data=st.data())
@settings(max_examples=40, deadline=None)
def test_more_extractions_when_off_never_raise_the_lower_limit(n: int, data: st.DataObject) -> None:
    on = data.draw(st.integers(1, n))
    off = data.draw(st.integers(0, n - 1))
    assert privacy_ratio(on, n, off + 1, n).lower <= privacy_ratio(on, n, off, n).lower + 1e-9


def test_clopper_pearson_published_values() -> None:
    interval = proportion_interval(0, 40)
    assert interval.low == 0
    assert interval.high == pytest.approx(1 - 0.025 ** (1 / 40))
    assert proportion_interval(40, 40).low == pytest.approx(0.025 ** (1 / 40))
    assert proportion_interval(40, 40).high == 1
    # R: binom.test(7, 20)
    assert proportion_interval(7, 20).low == pytest.approx(0.1539092, abs=1e-6)
    assert proportion_interval(7, 20).high == pytest.approx(0.5921885, abs=1e-6)


@pytest.mark.parametrize("n", [5, 20])
def test_clopper_pearson_covers_at_least_its_confidence(n: int) -> None:
    intervals = [proportion_interval(hits, n, 0.9) for hits in range(n + 1)]
    for rate in np.linspace(0.005, 0.995, 100):
        inside = [i.low <= rate <= i.high for i in intervals]
        coverage = stats.binom.pmf(np.arange(n + 1), n, rate)[inside].sum()
        assert coverage >= 0.9 - 1e-12, rate


@pytest.mark.parametrize("counts", [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="count"):
        proportion_interval(*counts)
    with pytest.raises(ValueError, match="count"):
        privacy_ratio(1, 1, *counts)
    with pytest.raises(ValueError, match="count"):
        privacy_ratio(*counts, 1, 1)


def test_confidence_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        proportion_interval(1, 2, 95)
    with pytest.raises(ValueError, match="confidence"):
        privacy_ratio(1, 2, 0, 2, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected)


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        mcnemar_exact([True], [True, False])
    with pytest.raises(ValueError, match="pairs"):
        mcnemar_exact([], [])


def test_identical_losses_have_ratio_one_and_no_width() -> None:
    losses = np.linspace(2, 4, 50)
    estimate = paired_bootstrap_ratio(losses, losses)
    assert (estimate.ratio, estimate.lower, estimate.upper) == (1.0, 1.0, 1.0)


def test_bootstrap_is_paired_and_near_the_t_interval() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(3, 1, 200)  # wide between windows, so an unpaired interval is wide
    difference = rng.normal(0.05, 0.02, 200)
    estimate = paired_bootstrap_ratio(reference + difference, reference)
    _, interval = mean_interval(difference)
    assert estimate.ratio == pytest.approx(math.exp(difference.mean()))
    assert math.log(estimate.lower) == pytest.approx(interval.low, abs=5e-4)
    assert math.log(estimate.upper) == pytest.approx(interval.high, abs=5e-4)


def test_bootstrap_weighs_windows_by_their_tokens_and_repeats() -> None:
    losses, reference, tokens = [1.0, 2.0, 3.0], [0.5, 2.5, 2.0], [100, 300, 600]
    estimate = paired_bootstrap_ratio(losses, reference, tokens, seed=3)
    assert estimate.ratio == pytest.approx(math.exp((0.5 * 100 - 0.5 * 300 + 600) / 1000))
    assert estimate.lower <= estimate.ratio <= estimate.upper
    assert estimate == paired_bootstrap_ratio(losses, reference, tokens, seed=3)


def test_bootstrap_survives_data_that_bca_does_not() -> None:
    estimate = paired_bootstrap_ratio([1.0, 1.0], [1.0, 1.1], resamples=99)
    assert math.isfinite(estimate.lower)
    assert math.isfinite(estimate.upper)
    assert estimate.lower <= estimate.ratio <= estimate.upper


def test_mean_interval_is_students_t() -> None:
    mean, interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    half = 2.7764451 * math.sqrt(2.5 / 5)  # t(0.975, 4) from tables
    assert interval.low == pytest.approx(3 - half)
    assert interval.high == pytest.approx(3 + half)
    with pytest.raises(ValueError, match="two or more"):
        mean_interval([1.0])


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_bounded_mean_of_hits_is_a_proportion(outcomes: list[bool]) -> None:
    mean, interval = bounded_mean_interval([float(hit) for hit in outcomes])
    assert mean == pytest.approx(sum(outcomes) / len(outcomes))
    expected = proportion_interval(sum(outcomes), len(outcomes))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.3), (0.5, 0.02), (4.0, 1.0)])
def test_an_interval_of_a_bounded_mean_covers(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        _, interval = bounded_mean_interval(rng.beta(a, b, 25))
        inside += interval.low <= a / (a + b) <= interval.high
    assert inside >= stats.binom.ppf(0.001, 300, 0.95)


def test_a_bounded_mean_of_like_values_has_a_width() -> None:
    assert bounded_mean_interval([0.0] * 20) == (0.0, proportion_interval(0, 20))
    for bad in ([], [1.1], [-0.1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            bounded_mean_interval(bad)


def test_difference_of_means_is_welchs() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 1, 12), rng.normal(1, 4, 30)
    difference, interval = mean_difference_interval(first, second)
    compared = CompareMeans(DescrStatsW(first), DescrStatsW(second))
    low, high = compared.tconfint_diff(usevar="unequal")
    assert difference == pytest.approx(first.mean() - second.mean())
    assert (interval.low, interval.high) == pytest.approx((low, high))
    constant = mean_difference_interval([2.0, 2.0], [0.5, 0.5])
    assert (constant[0], constant[1].low, constant[1].high) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="found 1 and 2"):
        mean_difference_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_holm_is_that_of_statsmodels(n: int) -> None:
    rng = np.random.default_rng(n)
    p_values = (rng.random(n) ** 3).round(2)  # with ties, zeros and ones above Holm's clip
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_needs_p_values() -> None:
    for bad in ([], [1.5], [-0.1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            holm(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named_by_index(bad: float) -> None:
    with pytest.raises(ValueError, match=r"values\[2\]"):
        mean_interval([1.0, 2.0, bad])
    with pytest.raises(ValueError, match=r"reference\[1\]"):
        paired_bootstrap_ratio([1.0, 2.0], [1.0, bad])


def test_windows_must_pair_up() -> None:
    with pytest.raises(ValueError, match="same for all"):
        paired_bootstrap_ratio([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"tokens\[1\]"):
        paired_bootstrap_ratio([1.0, 2.0], [1.0, 2.5], [10, 0])
