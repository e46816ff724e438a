"""Have a few records gained far more than any twin? Ranks can't see a few, so tails must.

Pure functions on gains, in nats of log-probability of whole secrets over a reference model. They
know no models and no records.

No test of single records holds without a bound on what chance does to one. If the reference is
calibrated, Markov's inequality gives a gain of t nats a probability of at most e^-t when nothing
leaks. Where the twins' gains vary by more, their tail is taken for exponential, its scale estimated
by their standard deviation s. From m twins that is known with d = (m - 1) / 2 degrees of freedom
only, which makes the tail Pareto's: (1 + t / (d * s))^-d. The heavier of the two counts.

Beyond the highest twin such a tail has no memory: of n planted records and m twins the next is a
planted one with odds of n / m, and it lies an exponential step further. So the highest planted
record leads the highest twin by t with probability 1 / (1 + m / n / tail(t)), and all leads of
planted records add up to more than t with probability q * tail((1 - q) * t), q = n / (n + m): a
geometric number of such steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# By how much the twins' standard deviation is raised: of gains that really are exponential it is
# more often too small than its degrees of freedom say. With it the tests keep their level down to
# p = 0.001 for exponential, Laplace and normal gains of 10 twins and more.
TAIL_MARGIN = 1.25


@dataclass(frozen=True)
class Outliers:
    """By how much planted records exceed the highest twin, nats, and how probable that is.

    lead: of the highest planted record; negative if a twin is higher
    total: of all planted records that are above it
    p_lead, p_total: one-sided p-values of the two, each for itself
    """

    lead: float
    total: float
    p_lead: float
    p_total: float


def find_outliers(planted: Floats, twins: Floats) -> Outliers:
    """Test the gains of planted records, shape (n,), against those of twins, shape (m,).

    Raises:
        ValueError: no planted record, or fewer than two twins.
    """
    n, m = _sizes(planted, twins)
    leads = planted - twins.max()
    lead, total = float(leads.max()), float(leads.clip(min=0).sum())
    if lead <= 0:  # where ties are common a lead of 0 says nothing
        return Outliers(lead, total, 1.0, 1.0)
    odds, share = n / m, n / (n + m)
    tail = odds * _tail(lead, twins)
    return Outliers(lead, total, tail / (1 + tail), share * _tail((1 - share) * total, twins))


def sure_gain(planted: int, twins: Floats, level: float) -> float:
    """Gain of one of so many planted records, nats, from which its `p_lead` is at most `level`.

    Raises:
        ValueError: no planted record, fewer than two twins, or `level` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, found {level}")
    n, m = _sizes(np.zeros(planted), twins)
    rarity = m / n * level / (1 - level)
    degrees, scale = _spread(twins)
    pareto = degrees * scale * (rarity ** (-1 / degrees) - 1)
    return float(twins.max()) + max(0.0, -math.log(rarity), pareto)


def _tail(nats: float, twins: Floats) -> float:
    """Probability of a gain that is larger by `nats`, when nothing leaks."""
    degrees, scale = _spread(twins)
    pareto = (1 + nats / (degrees * scale)) ** -degrees if scale > 0 else 0.0
    return max(math.exp(-nats), pareto)


def _spread(twins: Floats) -> tuple[float, float]:
    """Degrees of freedom, and the raised standard deviation in nats."""
    return (len(twins) - 1) / 2, TAIL_MARGIN * float(twins.std(ddof=1))


def _sizes(planted: Floats, twins: Floats) -> tuple[int, int]:
    n, m = len(planted), len(twins)
    if n < 1 or m < 2:
        raise ValueError(f"outliers need a planted record and two twins: found {n} and {m}")
    return n, m
