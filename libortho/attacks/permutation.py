"""Are the gains of planted records those of twins? A permutation test over many scores at once.

Pure functions on numbers. Planted records and twins were told apart by chance alone, so that
exchanging the two labels within a family changes nothing if a model doesn't know who was planted:
the test draws such exchanges, and holds for any distribution, any ties and any number of records
(Fisher 1935; with the observed labels counted among the draws, Phipson and Smyth 2010).

A *cell* is one score in one family, or in all of them together by ranks within each. The statistic
of a cell is the rank sum of planted records, in its own standard deviations. The largest over all
cells is compared with the largest of each draw, which corrects for the number of cells without
taking them for independent (Westfall and Young 1993, "maxT").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which imports its parts when they are used
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALL_FAMILIES = "all families"
"""Name of the cells over all families together."""

RESAMPLES = 9999
"""Exchanges that are drawn: the least p-value is 1e-4, below 5 % over 500 corrected tests."""

_CHUNK = 1000
"""Exchanges that are held at once."""

_ROUNDING = 1e-9
"""Statistics that differ by less are taken for equal: only the order of a sum differs."""


@dataclass(frozen=True)
class Cell:
    """One score in one family.

    score: its row; family: or `ALL_FAMILIES`
    effect: mean gain of planted records minus that of twins, in the score's unit
    auc: probability that a planted record gained more than a twin, half for a tie
    p_value: two-sided, for this cell alone
    """

    score: int
    family: str
    effect: float
    auc: float
    p_value: float


@dataclass(frozen=True)
class MembershipTest:
    """All cells, and the two-sided p-value of the most extreme one, corrected for their number."""

    cells: tuple[Cell, ...]
    p_value: float

    @property
    def strongest(self) -> Cell:
        """The cell of the least p-value; of several, the one whose AUC is farthest from 1/2."""
        return min(self.cells, key=lambda c: (c.p_value, -abs(c.auc - 0.5)))


def membership_test(
    gains: Floats,
    families: Sequence[str],
    planted: Sequence[bool],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MembershipTest:
    """Test every score in every family, and over all families.

    Args:
        gains: `[scores, records]`, the off state's score minus the never-trained model's.
        families: of each record.
        planted: whether each record was planted.
        resamples: exchanges of labels that are drawn.
        seed: of the draws.

    Raises:
        ValueError: a family lacks planted records or twins, a gain is not finite, or no exchange
            is asked for.
    """
    if not np.isfinite(gains).all() or resamples < 1:
        raise ValueError("a permutation test needs finite gains and at least one resample")
    labels, names = np.array(planted, dtype=bool), list(dict.fromkeys(families))
    members = [np.array([f == name for f in families]) for name in names]
    strata = [_Stratum.of(gains[:, m], labels[m]) for m in members]
    cells = [s.cell(i, n) for n, s in zip(names, strata, strict=True) for i in range(len(gains))]
    if len(names) > 1:
        cells += [_pooled(strata, i) for i in range(len(gains))]
    observed = _statistics(strata, [s.labels[None] for s in strata])[0]

    rng = np.random.default_rng(seed)
    beyond = np.ones(len(cells))  # the observed labels are one of the draws
    beyond_any = 1
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = [rng.permuted(np.tile(s.labels, (count, 1)), axis=1) for s in strata]
        values = np.abs(_statistics(strata, drawn))  # [draws, cells]
        beyond += (values >= np.abs(observed) - _ROUNDING).sum(0)
        beyond_any += int((values.max(1) >= np.abs(observed).max() - _ROUNDING).sum())
    tested = tuple(
        Cell(c.score, c.family, c.effect, c.auc, float(p))
        for c, p in zip(cells, beyond / (resamples + 1), strict=True)
    )
    return MembershipTest(tested, beyond_any / (resamples + 1))


@dataclass(frozen=True, eq=False)
class _Stratum:
    """One family: gains, their centred ranks as shares of the family, and who was planted."""

    gains: Floats  # [scores, records]
    ranks: Floats  # [scores, records], mean 0, in (-1/2, 1/2)
    labels: NDArray[np.bool_]
    variances: Floats  # [scores], of the rank sum of planted records under exchange

    @classmethod
    def of(cls, gains: Floats, labels: NDArray[np.bool_]) -> _Stratum:
        n, total = int(labels.sum()), len(labels)
        if not 0 < n < total:
            raise ValueError(f"a family has {n} planted records and {total - n} twins")
        ranks = (scipy.stats.rankdata(gains, axis=1) - (total + 1) / 2) / total
        # A sample of n without replacement from `total` (Cochran 1977, theorem 2.2).
        variances = ranks.var(axis=1) * n * (total - n) / (total - 1)
        return cls(gains, ranks, labels, variances)

    @property
    def pairs(self) -> int:
        """Pairs of a planted record and a twin."""
        return int(self.labels.sum() * (~self.labels).sum())

    def auc(self, score: int) -> float:
        total = len(self.labels)
        return 0.5 + float(self.ranks[score, self.labels].sum()) * total / self.pairs

    def effect(self, score: int) -> float:
        gains = self.gains[score]
        return float(gains[self.labels].mean() - gains[~self.labels].mean())

    def cell(self, score: int, family: str) -> Cell:
        return Cell(score, family, self.effect(score), self.auc(score), 1.0)


def _pooled(strata: Sequence[_Stratum], score: int) -> Cell:
    """Families weighted by their planted records, their AUCs by their pairs."""
    planted, pairs = [s.labels.sum() for s in strata], [s.pairs for s in strata]
    effect = np.average([s.effect(score) for s in strata], weights=planted)
    auc = np.average([s.auc(score) for s in strata], weights=pairs)
    return Cell(score, ALL_FAMILIES, float(effect), float(auc), 1.0)


def _statistics(strata: Sequence[_Stratum], labels: Sequence[NDArray[np.bool_]]) -> Floats:
    """Standardised rank sums, `[draws, cells]`, of labels `[draws, records]` for each family.

    A cell whose gains are all alike tells nothing: 0.
    """
    sums = [drawn @ s.ranks.T for s, drawn in zip(strata, labels, strict=True)]
    variances = [s.variances for s in strata]
    if len(strata) > 1:
        sums.append(np.sum(sums, axis=0))
        variances.append(np.sum(variances, axis=0))
    total, variance = np.hstack(sums), np.hstack(variances)
    return np.divide(total, np.sqrt(variance), out=np.zeros_like(total), where=variance > 0)
