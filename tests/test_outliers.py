"""Outliers: how probable leads are when nothing leaks, by formula and by drawing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from libortho.outliers import TAIL_MARGIN, find_outliers, sure_gain

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

CLEAN: dict[str, Draw] = {
    "exponential of 1 nat": lambda rng, n: rng.exponential(1, n),
    "exponential of 3 nats": lambda rng, n: rng.exponential(3, n),
    "normal": lambda rng, n: rng.normal(0, 2, n),
    "Laplace": lambda rng, n: rng.laplace(0, 3, n),
    "equal": lambda _, n: np.zeros(n),
}


def test_leads_are_over_the_highest_twin() -> None:
    twins = np.array([0.5, 1.0, 0.0])
    found = find_outliers(np.array([0.0, 5.0, 8.0]), twins)
    assert (found.lead, found.total) == (7.0, 11.0)
    # Two degrees of freedom in all make a heavier tail than a nat's exponential.
    scale = TAIL_MARGIN * np.std(twins, ddof=1)
    assert found.p_lead == pytest.approx(1 / (1 + (1 + 7 / scale)))
    assert found.p_total == pytest.approx(0.5 / (1 + 11 / 2 / scale))


def test_equal_twins_leave_markovs_bound() -> None:
    found = find_outliers(np.array([6.0, 2.0]), np.zeros(6))
    assert found.p_lead == pytest.approx(1 / (1 + 3 * math.exp(6)))
    assert found.p_total == pytest.approx(0.25 * math.exp(-0.75 * 8))


@pytest.mark.parametrize("highest", [1.0, 2.0])
def test_without_a_lead_there_is_nothing_to_see(highest: float) -> None:
    found = find_outliers(np.array([highest, 0.0]), np.array([2.0, 0.0]))
    assert (found.total, found.p_lead, found.p_total) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("sizes", [(20, 20), (10, 40), (40, 10)])
@pytest.mark.parametrize("kind", CLEAN)
def test_clean_gains_have_outliers_no_more_often_than_claimed(
    kind: str, sizes: tuple[int, int]
) -> None:
    rng = np.random.default_rng(sum(sizes))
    repeats = 1500
    found = [find_outliers(*(CLEAN[kind](rng, n) for n in sizes)) for _ in range(repeats)]
    for p_values in ([f.p_lead for f in found], [f.p_total for f in found]):
        for level in (0.1, 0.01):
            alarms = sum(p <= level for p in p_values)
            # Ten twins don't quite tell the scale of an exponential: a tenth more is let pass.
            assert alarms <= stats.binom.ppf(0.999, repeats, 1.1 * level)


def test_exponential_gains_have_outliers_about_as_often_as_claimed() -> None:
    """The bound is no wider than it must be: else it would see too little."""
    rng = np.random.default_rng(0)
    repeats = 2000
    found = [
        find_outliers(rng.exponential(size=80), rng.exponential(size=80)) for _ in range(repeats)
    ]
    for p_values in ([f.p_lead for f in found], [f.p_total for f in found]):
        assert 0.06 < np.mean(np.array(p_values) <= 0.1) < 0.12


def test_many_small_leads_add_up() -> None:
    twins = np.zeros(40)
    one = find_outliers(np.array([4.0] + [0.0] * 39), twins)
    many = find_outliers(np.array([4.0] * 8 + [0.0] * 32), twins)
    assert one.p_lead == many.p_lead > 0.01
    assert many.p_total < 1e-6 < one.p_total


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("level", [0.05, 1e-3])
def test_a_sure_gain_is_just_significant(scale: float, level: float) -> None:
    twins = np.random.default_rng(0).normal(0, scale, 25)
    gain = sure_gain(20, twins, level)
    planted = np.full(20, twins.max() - 1)
    planted[0] = gain
    assert find_outliers(planted, twins).p_lead == pytest.approx(level)
    planted[0] = gain - 0.1
    assert find_outliers(planted, twins).p_lead > level


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="found 0 and 2"):
        find_outliers(np.array([]), np.zeros(2))
    with pytest.raises(ValueError, match="found 1 and 1"):
        sure_gain(1, np.zeros(1), 0.05)
    with pytest.raises(ValueError, match="level"):
        sure_gain(1, np.zeros(2), 1.0)
