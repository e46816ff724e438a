"""From counts and losses to estimates with intervals.

Pure functions on numbers: no tensors, no files, no thresholds. The methods are those of scipy and
statsmodels; what is added here is what to do at the corners (no hits, all hits, no variation),
where such functions like to warn, return nan or be wrong. statsmodels brings pandas along, so it is
imported at the first estimate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which imports its parts when they are used
from numpy.typing import ArrayLike, NDArray

# Bounds on a ratio are searched for up to this many natural-log units from the estimate: a factor
# of 7e10, beyond any that counts could support.
_LOG_SEARCH_WIDTH = 25.0


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval, in the unit of what it bounds."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class RatioEstimate:
    """A ratio with the limits of its two-sided interval (`upper` may be infinite).

    `censored` says that the denominator had no hits and half a hit stood in for it, so that
    `ratio` is a convention and only `lower` is evidence.
    """

    ratio: float
    lower: float
    upper: float
    censored: bool
    confidence: float


def proportion_interval(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a proportion (Biometrika 26, 1934): never covers too little.

    Raises:
        ValueError: `n` < 1, `hits` outside 0..n, or `confidence` outside (0, 1).
    """
    _check_counts("hits", hits, n)
    _check_confidence(confidence)
    return _clopper_pearson(hits, n, confidence)


def privacy_ratio(
    hits_on: int, n_on: int, hits_off: int, n_off: int, confidence: float = 0.95
) -> RatioEstimate:
    """The extraction rate with the private stream on over the rate with it off.

    With no hits when off, half a hit takes their place in the point estimate, `censored` is true
    and `upper` is infinite. The limits are those of the two-sided score interval of the ratio
    (Miettinen and Nurminen, Statistics in Medicine 4, 1985), so at 95 % the lower one is exceeded
    by chance in 2.5 % of repetitions. They are found by inverting statsmodels' score test: its
    closed form, `confint_proportions_2indep(compare="ratio", method="score")`, agrees at most
    counts, but at 1/1 against 1/3 its lower limit is 2.0 where the test's is 0.35, and at other
    corners it is nan.

    Args:
        hits_on: records extracted with the stream on, of `n_on`.
        n_on: records tried with the stream on.
        hits_off: records extracted with the stream off, of `n_off`.
        n_off: records tried with the stream off.
        confidence: two-sided confidence level.

    Raises:
        ValueError: an `n` < 1, hits outside 0..n, or `confidence` outside (0, 1).
    """
    _check_counts("hits_on", hits_on, n_on)
    _check_counts("hits_off", hits_off, n_off)
    _check_confidence(confidence)
    from statsmodels.stats.proportion import score_test_proportions_2indep  # noqa: PLC0415

    critical = float(scipy.stats.norm.ppf(0.5 + confidence / 2))
    rate_off = (hits_off or 0.5) / n_off
    ratio = (hits_on / n_on) / rate_off

    def excess(log_ratio: float, target: float) -> float:
        value = math.exp(log_ratio)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            statistic, _ = score_test_proportions_2indep(
                hits_on, n_on, hits_off, n_off, value=value, compare="ratio", correction=True
            )
        # Variance 0 over difference 0: the hypothesis is the estimate itself.
        return (0.0 if np.isnan(statistic) else float(statistic)) - target

    # The statistic falls as the hypothesised ratio grows, and is 0 at the estimate.
    center = math.log((hits_on or 0.5) / n_on / rate_off)
    lower, upper = 0.0, math.inf
    if hits_on:
        low = center - _LOG_SEARCH_WIDTH
        lower = math.exp(scipy.optimize.brentq(excess, low, center, args=(critical,)))
    if hits_off:
        high = center + _LOG_SEARCH_WIDTH
        upper = math.exp(scipy.optimize.brentq(excess, center, high, args=(-critical,)))
    return RatioEstimate(ratio, lower, upper, hits_off == 0, confidence)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test on paired yes-or-no outcomes (1947).

    1.0 if no pair differs.

    Raises:
        ValueError: no pairs, or different numbers of outcomes.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"McNemar's test needs pairs: found {len(first)} outcomes and {len(second)}"
        )
    table = np.zeros((2, 2), dtype=int)
    for one, other in zip(first, second, strict=True):
        table[int(bool(one)), int(bool(other))] += 1
    if table[0, 1] + table[1, 0] == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar  # noqa: PLC0415

    return float(mcnemar(table, exact=True).pvalue)


def paired_bootstrap_ratio(
    losses: ArrayLike,
    reference: ArrayLike,
    tokens: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> RatioEstimate:
    """Ratio of two perplexities on the same windows, with a bootstrap interval over windows.

    The ratio is exp(mean(losses) - mean(reference)), means weighted by `tokens`. The interval is
    BCa (Efron, JASA 82, 1987), or the percentile interval where BCa is undefined; a ratio that is
    the same in every window has an interval of no width.

    Args:
        losses: mean loss of each window in nats per token, shape (windows,).
        reference: the same windows' losses under the reference, shape (windows,).
        tokens: predicted tokens of each window, shape (windows,); None if all are alike.
        confidence: two-sided confidence level.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: shapes differ, fewer than two windows, a value that is not finite, or a token
            count that is not positive.
    """
    _check_confidence(confidence)
    first = _finite_vector("losses", losses)
    second = _finite_vector("reference", reference)
    weights = _finite_vector("tokens", np.ones_like(first) if tokens is None else tokens)
    if not len(first) == len(second) == len(weights) >= 2:
        raise ValueError(
            "a paired bootstrap needs two or more windows, the same for all: found "
            f"{len(first)} losses, {len(second)} reference losses, {len(weights)} token counts"
        )
    if (weights <= 0).any():
        raise ValueError(f"tokens[{int((weights <= 0).argmax())}] is not positive")

    def log_ratio(
        difference: NDArray[np.float64], weight: NDArray[np.float64], axis: int
    ) -> NDArray[np.float64]:
        return (difference * weight).sum(axis) / weight.sum(axis)

    difference = first - second
    point = math.exp(float(log_ratio(difference, weights, axis=-1)))
    if np.ptp(difference) == 0:
        return RatioEstimate(point, point, point, False, confidence)

    def limits(method: str) -> tuple[float, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            result = scipy.stats.bootstrap(
                (difference, weights),
                log_ratio,
                paired=True,
                vectorized=True,
                n_resamples=resamples,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            )
        interval = result.confidence_interval
        return float(interval.low), float(interval.high)

    low, high = limits("BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = limits("percentile")
    return RatioEstimate(point, math.exp(low), math.exp(high), False, confidence)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, Interval]:
    """Mean with Student's t interval; values are taken as independent.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    _check_confidence(confidence)
    sample = _finite_vector("values", values)
    if len(sample) < 2:
        raise ValueError(f"an interval of a mean needs two or more values, found {len(sample)}")
    mean = float(sample.mean())
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, len(sample) - 1) * scipy.stats.sem(sample))
    return mean, Interval(mean - half, mean + half, confidence)


def bounded_mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, Interval]:
    """Mean of values in [0, 1] with Clopper and Pearson's interval, their sum taken for the hits.

    Of all variables in [0, 1] with the same mean, one that is 0 or 1 varies most, so the interval
    is wider than need be for others. Unlike Student's it has a width where all values are alike.

    Raises:
        ValueError: no value, one outside [0, 1], or `confidence` outside (0, 1).
    """
    _check_confidence(confidence)
    sample = _finite_vector("values", values)
    if not len(sample) or sample.min() < 0 or sample.max() > 1:
        raise ValueError("a bounded mean needs one or more values, all from 0 to 1")
    total = min(float(sample.sum()), float(len(sample)))  # rounding may exceed it
    return float(sample.mean()), _clopper_pearson(total, len(sample), confidence)


def mean_difference_interval(
    first: ArrayLike, second: ArrayLike, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Mean of `first` minus mean of `second`, independent samples, with Welch's interval (1947).

    No width if neither sample varies.

    Raises:
        ValueError: fewer than two values in a sample, one that is not finite, or `confidence`
            outside (0, 1).
    """
    _check_confidence(confidence)
    one, other = _finite_vector("first", first), _finite_vector("second", second)
    if min(len(one), len(other)) < 2:
        raise ValueError(
            f"a difference of means needs two or more values of each: found {len(one)} and "
            f"{len(other)}"
        )
    difference = float(one.mean() - other.mean())
    if np.ptp(one) == np.ptp(other) == 0:
        return difference, Interval(difference, difference, confidence)
    limits = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(confidence)
    return difference, Interval(float(limits.low), float(limits.high), confidence)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values after Holm's correction (Scandinavian Journal of Statistics 6, 1979), in order.

    Those below alpha keep the probability of any false positive below alpha, however the tests
    depend on each other. statsmodels has the same in `multipletests`, with a run of the garbage
    collector in every call: a quarter of a second once torch is loaded.

    Raises:
        ValueError: no p-value, or one outside [0, 1].
    """
    sample = _finite_vector("p_values", p_values)
    if not len(sample) or sample.min() < 0 or sample.max() > 1:
        raise ValueError("Holm's correction needs one or more p-values, all from 0 to 1")
    order = np.argsort(sample, kind="stable")
    steps = np.maximum.accumulate(sample[order] * np.arange(len(sample), 0, -1))
    adjusted = np.empty_like(sample)
    adjusted[order] = steps.clip(max=1)
    return adjusted


def _finite_vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, found shape {vector.shape}")
    bad = ~np.isfinite(vector)
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(f"{name}[{index}] is {vector[index]}, which is not finite")
    return vector


def _clopper_pearson(hits: float, n: int, confidence: float) -> Interval:
    from statsmodels.stats.proportion import proportion_confint  # noqa: PLC0415

    low, high = proportion_confint(hits, n, alpha=1 - confidence, method="beta")
    return Interval(float(low), float(high), confidence)


def _check_counts(name: str, hits: int, n: int) -> None:
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{name} must be a count out of at least one: found {hits} of {n}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
