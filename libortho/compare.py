"""What changed between two runs beyond noise, and whether the two can be compared at all.

Pure functions of results. They judge with what the files hold, and say by which rule:

counts: hits of n are tested, paired (McNemar, exact) where both runs asked about the same records
    under the same salt, else as two samples (Fisher, exact); changed if p < 0.05
intervals: changed if the two 95 % intervals do not overlap. That is stricter than a test at 5 %:
    with intervals of equal width it calls a chance difference a change in 0.6 % of cases (Schenker
    and Gentleman, The American Statistician 55, 2001). It is stricter still for perplexity, because
    runs over the same windows vary together
no interval in the file: changed from a factor on, see `DEFAULT_FACTOR`
exact figures, such as bits per weight: any difference is a change
verdicts: a gate that passed and passes no more is worse by itself, and the other way round better
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import scipy  # which imports its parts when they are used

from .comparability import differences, obstacles
from .figures import Figure, figures
from .figures.audits import audit_names
from .results import KillSwitchResult, Results
from .statistics import mcnemar_exact

Outcome = Literal["better", "worse", "changed", "same", "not judged"]

SIGNIFICANCE = 0.05
"""Two-sided p below which counts differ. Each figure is tested by itself: of twenty that did not
change, one may be named by chance."""

DEFAULT_FACTOR = 2.0
"""Figures without an interval count as changed from this factor on, up or down. That of
github-action-benchmark's default alert threshold, 200 %."""


_PASSING = ("passes", "private")
"""How the verdicts begin that make a gate green."""


@dataclass(frozen=True)
class Change:
    """One figure in both runs. `rule` says how it was judged, `outcome` what came of it."""

    before: Figure
    after: Figure
    outcome: Outcome
    rule: str

    @property
    def relative(self) -> float | None:
        """(after - before) / before; None where that has no meaning."""
        if self.before.value is None or self.after.value is None or self.before.value == 0:
            return None
        return (self.after.value - self.before.value) / abs(self.before.value)


@dataclass(frozen=True)
class VerdictChange:
    """A gate's verdict in both runs."""

    gate: str
    before: str
    after: str
    outcome: Outcome


@dataclass(frozen=True)
class Comparison:
    """Two runs against each other.

    obstacles: why they can't be compared, as sentences; empty if they can
    notes: conditions that differ and don't hinder
    verdicts, changes: empty if there are obstacles that were not waived
    """

    obstacles: tuple[str, ...]
    notes: tuple[str, ...]
    verdicts: tuple[VerdictChange, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether figures were compared."""
        return bool(self.verdicts or self.changes) or not self.obstacles

    @property
    def is_worse(self) -> bool:
        """Whether anything is worse beyond noise."""
        everything: Sequence[VerdictChange | Change] = (*self.verdicts, *self.changes)
        return any(change.outcome == "worse" for change in everything)


def compare(
    before: Results, after: Results, *, anyway: bool = False, factor: float = DEFAULT_FACTOR
) -> Comparison:
    """Compare two runs, figure by figure.

    Args:
        before: the run to compare with.
        after: the run that is judged.
        anyway: compare also what can't be compared; the obstacles are still named.
        factor: from which factor on a figure without an interval counts as changed.

    Raises:
        ValueError: `factor` is not a finite number above 1.
    """
    if not (math.isfinite(factor) and factor > 1):
        raise ValueError(f"factor must be a finite number above 1, found {factor}")
    hindering = tuple(obstacles(before, after))
    notes = tuple(differences(before, after))
    if hindering and not anyway:
        return Comparison(hindering, notes)
    paired = _paired_outcomes(before.exp1_kill_switch, after.exp1_kill_switch)
    old, new = figures(before), figures(after)
    changes = [
        _judge(old.get(name, _absent(figure)), new.get(name, _absent(figure)), paired, factor)
        for name, figure in (old | new).items()
    ]
    return Comparison(hindering, notes, tuple(_verdicts(before, after)), tuple(changes))


# ---------------------------------------------------------------- what changed?


def _verdicts(before: Results, after: Results) -> Iterator[VerdictChange]:
    old, new = _gates(before), _gates(after)
    for gate in (name for name in old if name in new):
        one, two = old[gate], new[gate]
        outcome: Outcome = "same"
        if one != two:
            passed, passes = (any(map(v.startswith, _PASSING)) for v in (one, two))
            outcome = "changed" if passed == passes else "better" if passes else "worse"
        yield VerdictChange(gate, one, two, outcome)


def _gates(results: Results) -> dict[str, str]:
    verdicts = {}
    if results.exp1_kill_switch is not None:
        verdicts["privacy"] = str(results.exp1_kill_switch.verdict)
    if results.exp2_null_test is not None:
        verdicts["perplexity"] = str(results.exp2_null_test.verdict)
    for name, audit in zip(audit_names(results.audits), results.audits, strict=True):
        verdicts[f"audit of {name}"] = str(audit.verdict)
    return verdicts


def _absent(figure: Figure) -> Figure:
    reason = "the file has no such figure"
    return replace(figure, value=None, low=None, high=None, counts=None, reason=reason)


def _judge(before: Figure, after: Figure, paired: Mapping[str, float], factor: float) -> Change:
    one, two = before.value, after.value
    if one is None or two is None:
        missing = before if one is None else after
        reason = missing.reason or "no reason given"
        which = "first" if one is None else "second"
        return Change(before, after, "not judged", f"not measured in the {which} run: {reason}")
    if before.noise == "derived":
        return Change(before, after, "not judged", "follows from other figures")
    changed, rule = _is_change(before, after, one, two, paired.get(before.name), factor)
    if not changed:
        return Change(before, after, "same", rule)
    if before.better is None:
        return Change(before, after, "changed", rule)
    improved = (two > one) == (before.better == "higher")
    return Change(before, after, "better" if improved else "worse", rule)


def _is_change(
    before: Figure, after: Figure, one: float, two: float, paired: float | None, factor: float
) -> tuple[bool, str]:
    if before.noise == "exact":
        return one != two, "exact: any difference counts"
    if before.counts and after.counts:
        if paired is not None:
            return paired < SIGNIFICANCE, f"McNemar on the same records, p = {paired:.2g}"
        p = _fisher(before.counts, after.counts)
        return p < SIGNIFICANCE, f"Fisher, p = {p:.2g}"
    if before.noise == "interval":
        limits = (before.low, before.high, after.low, after.high)
        if not any(limit is None for limit in limits):
            low, high, other_low, other_high = (float(limit or 0.0) for limit in limits)
            apart = high < other_low or other_high < low
            return apart, f"95 % intervals {'do not overlap' if apart else 'overlap'}"
    small, large = sorted((abs(one), abs(two)))
    different_sign = one * two < 0
    changed = one != two and (different_sign or small == 0 or large / small >= factor)
    return changed, f"no interval in the file: a factor of {factor:g} counts"


def _fisher(one: tuple[int, int], two: tuple[int, int]) -> float:
    """Two-sided p of Fisher's exact test on two pairs (hits, n)."""
    table = [[hits, max(n - hits, 0)] for hits, n in (one, two)]
    return float(scipy.stats.fisher_exact(table)[1])


def _paired_outcomes(
    before: KillSwitchResult | None, after: KillSwitchResult | None
) -> dict[str, float]:
    """McNemar's p by figure, where both runs asked about the very same records."""
    if before is None or after is None:
        return {}
    one, two = ({(r.id, r.salted_hash): r for r in k.record_hashes} for k in (before, after))
    whole = len(one) == len(before.record_hashes) == before.n_planted
    if not one or one.keys() != two.keys() or not whole or len(after.record_hashes) != len(two):
        return {}
    p: dict[str, float] = {}
    for state in ("alpha1", "alpha0"):
        for family in (None, *before.per_family):
            keys = [key for key, r in one.items() if family in (None, r.family)]
            if not keys:
                continue
            outcomes = [[getattr(run[k], f"extracted_{state}") for k in keys] for run in (one, two)]
            name = (
                f"exp1_kill_switch.extraction_rate_{state}"
                if family is None
                else f"exp1_kill_switch.per_family.{family}.hits_{state}"
            )
            p[name] = mcnemar_exact(*outcomes)
    return p
