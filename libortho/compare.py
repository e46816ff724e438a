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
from typing import Any, Literal

from scipy import stats

from .figures import Figure, figures
from .results import KillSwitchResult, NullTestResult, Results
from .statistics import mcnemar_exact

Outcome = Literal["better", "worse", "changed", "same", "not judged"]

SIGNIFICANCE = 0.05
"""Two-sided p below which counts differ. Each figure is tested by itself: of twenty that did not
change, one may be named by chance."""

DEFAULT_FACTOR = 2.0
"""Figures without an interval count as changed from this factor on, up or down. That of
github-action-benchmark's default alert threshold, 200 %."""

REFERENCE_TOLERANCE = 0.01
"""Relative difference of the unquantised reference's perplexity on the same windows and in the same
dtype, at most. Libraries and CPUs move it in the fourth digit; another checkpoint by more."""

WORKLOAD = ("batch", "prompt_tokens", "new_tokens", "tokens", "context_tokens")
"""Conditions of a throughput case that make it another case."""


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
    obstacles = tuple(_obstacles(before, after))
    notes = tuple(_notes(before, after))
    if obstacles and not anyway:
        return Comparison(obstacles, notes)
    paired = _paired_outcomes(before.exp1_kill_switch, after.exp1_kill_switch)
    old, new = figures(before), figures(after)
    changes = [
        _judge(old.get(name, _absent(figure)), new.get(name, _absent(figure)), paired, factor)
        for name, figure in (old | new).items()
    ]
    return Comparison(obstacles, notes, tuple(_verdicts(before, after)), tuple(changes))


# ---------------------------------------------------------------- can they be compared?


def _obstacles(before: Results, after: Results) -> Iterator[str]:
    yield from _differing(
        ("the device", before.provenance.device_name, after.provenance.device_name),
    )
    if before.provenance.device_name == after.provenance.device_name == "cpu":
        yield from _differing(("the CPU", before.provenance.cpu_model, after.provenance.cpu_model))
    sections = (
        ("experiment 1", before.exp1_kill_switch, after.exp1_kill_switch),
        ("experiment 2", before.exp2_null_test, after.exp2_null_test),
        ("throughput", before.throughput or None, after.throughput or None),
    )
    for name, first, second in sections:
        if (first is None) != (second is None):
            yield f"only the {'second' if first is None else 'first'} run has {name}"
    if before.exp1_kill_switch is not None and after.exp1_kill_switch is not None:
        yield from _kill_switch_obstacles(before.exp1_kill_switch, after.exp1_kill_switch)
    if before.exp2_null_test is not None and after.exp2_null_test is not None:
        same_dtype = before.provenance.compute_dtype == after.provenance.compute_dtype
        yield from _null_test_obstacles(before.exp2_null_test, after.exp2_null_test, same_dtype)
    yield from _workload_obstacles(before, after)


def _kill_switch_obstacles(first: KillSwitchResult, second: KillSwitchResult) -> Iterator[str]:
    yield from _differing(
        ("experiment 1's model", first.model, second.model),
        (
            "the families of records",
            ", ".join(sorted(first.per_family)),
            ", ".join(sorted(second.per_family)),
        ),
    )


def _null_test_obstacles(
    first: NullTestResult, second: NullTestResult, same_dtype: bool
) -> Iterator[str]:
    same = (
        ("experiment 2's model", first.model, second.model),
        ("the test text's SHA-256", first.corpus_sha256, second.corpus_sha256),
        ("the number of windows", first.windows, second.windows),
        ("the tokens of a window", first.window_tokens, second.window_tokens),
    )
    found = list(_differing(*same))
    yield from found
    one, other = first.ppl_fp16, second.ppl_fp16
    if found or not same_dtype or one is None or other is None:
        return
    if abs(other - one) > REFERENCE_TOLERANCE * abs(one):
        yield (
            f"the unquantised model has perplexity {one:.4f} in one run and {other:.4f} in the "
            "other on the same text, so these are different checkpoints of that name"
        )


def _workload_obstacles(before: Results, after: Results) -> Iterator[str]:
    old, new = figures(before), figures(after)
    told: set[str] = set()
    for name, figure in old.items():
        other, where = new.get(name), name.rpartition(".")[0]
        if other is None or where in told:
            continue
        for key in WORKLOAD:
            one, two = figure.conditions.get(key), other.conditions.get(key)
            if one != two:
                told.add(where)
                yield f"{where} was measured with {key} {one} in one run and {two} in the other"


def _differing(*facts: tuple[str, Any, Any]) -> Iterator[str]:
    for name, one, two in facts:
        if one != two:
            yield f"{name} is {one} in one run and {two} in the other"


def _notes(before: Results, after: Results) -> Iterator[str]:
    names = ("compute_dtype", "libortho", "git_commit", "torch", "transformers", "bitsandbytes")
    where = (before.provenance, after.provenance)
    yield from _differing(*((n, getattr(where[0], n), getattr(where[1], n)) for n in names))
    for title, one, two in (
        ("experiment 1", before.exp1_kill_switch, after.exp1_kill_switch),
        ("experiment 2", before.exp2_null_test, after.exp2_null_test),
    ):
        if one is None or two is None:
            continue
        for name in ("quantization_bits", "seed", "method", "base_fingerprint", "n_planted"):
            if hasattr(one, name):
                yield from _differing((f"{title}'s {name}", getattr(one, name), getattr(two, name)))
        yield from _config_notes(title, one.config, two.config)
    tests = before.exp2_null_test, after.exp2_null_test
    if tests[0] is not None and tests[1] is not None:
        first_hash, second_hash = (t.calibration_sha256 for t in tests if t is not None)
        yield from _differing(("the calibration text's SHA-256", first_hash, second_hash))


def _config_notes(where: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for key in sorted(one.keys() | two.keys()):
        first, second = one.get(key), two.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _config_notes(f"{where}, {key}", first, second)
        else:
            yield from _differing((f"{where}, {key}", first, second))


# ---------------------------------------------------------------- what changed?


def _verdicts(before: Results, after: Results) -> Iterator[VerdictChange]:
    for gate, one, two in (
        ("privacy", before.exp1_kill_switch, after.exp1_kill_switch),
        ("perplexity", before.exp2_null_test, after.exp2_null_test),
    ):
        if one is None or two is None:
            continue
        outcome: Outcome = "same"
        if one.verdict != two.verdict:
            outcome = "changed"
            if "passes" in (one.verdict, two.verdict):
                outcome = "better" if two.verdict == "passes" else "worse"
        yield VerdictChange(gate, one.verdict, two.verdict, outcome)


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
    return float(stats.fisher_exact(table)[1])


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
