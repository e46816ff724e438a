"""The figures of a results file, one by one: what each is called, its unit, limits and direction.

Knows results. What shows figures (`report`) or compares them (`compare`) takes them from here, so
that a figure has one name, one unit and one direction everywhere. Computes nothing.

A name is the figure's path in the file, such as `exp2_null_test.arms.alpha1.ratio`; a throughput
case, which is an item of a list there, goes by arm and phase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from .results import KillSwitchResult, NullTestResult, Results, ThroughputResult

Better = Literal["higher", "lower"]
Unit = Literal["share", "nats/token", "perplexity", "x", "bits/weight", "tokens/s", "s", "MiB", "p"]
Noise = Literal["counts", "interval", "exact", "derived", "unknown"]
"""What a file says about a figure's chance variation.

counts: hits of n, so that any two can be tested
interval: 95 % limits stand beside it
exact: a repetition gives the same value
derived: it follows from other figures, which are tested
unknown: nothing is said
"""


ARM_NAMES = {
    "reference": "unquantised",
    "alpha1": "alpha = 1",
    "alpha0": "alpha = 0",
    "never-trained": "never trained",
    "plain": "round to nearest, no ortho",
    "nf4": "bitsandbytes NF4",
    "int8": "bitsandbytes LLM.int8",
}


_MOST_RECORDS = 1_000_000
"""No experiment asks about more; an exact test of more would not end either."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number.

    name: path in the file
    title: the same in words
    value: None if it was not measured, and `reason` says why
    low, high: two-sided 95 % limits, None if the file has none
    counts: (hits, n) where it is a share of records
    better: which direction is an improvement, None if neither is
    conditions: what it was measured under; figures under different ones are not comparable
    """

    name: str
    title: str
    unit: Unit
    value: float | None
    noise: Noise
    reason: str = ""
    low: float | None = None
    high: float | None = None
    counts: tuple[int, int] | None = None
    better: Better | None = None
    conditions: dict[str, Any] = field(default_factory=dict)


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a run by name, in the order of the file."""
    found: list[Figure] = []
    if results.exp1_kill_switch is not None:
        found += _kill_switch(results.exp1_kill_switch)
    if results.exp2_null_test is not None:
        found += _null_test(results.exp2_null_test)
    found += _throughput(results.throughput)
    return {figure.name: figure for figure in found}


def arm_name(arm: str) -> str:
    """An arm in words; its own name if there are none for it."""
    return ARM_NAMES.get(arm, arm)


def _reason(result: Any, name: str) -> str:
    return result.reasons.get(name, "") if getattr(result, name) is None else ""


def _counts(hits: int, n: int) -> tuple[int, int] | None:
    """The pair, or None if no experiment could have given it."""
    return (hits, n) if 0 <= hits <= n and 0 < n <= _MOST_RECORDS else None


def _counts_of_rate(rate: float | None, n: int) -> tuple[int, int] | None:
    return _counts(round(rate * n), n) if rate is not None and 0 <= rate <= 1 else None


def _kill_switch(result: KillSwitchResult) -> Iterator[Figure]:
    def figure(name: str, title: str, unit: Unit, **more: Any) -> Figure:
        return Figure(
            name=f"exp1_kill_switch.{name}",
            title=title,
            unit=unit,
            value=getattr(result, name),
            reason=_reason(result, name),
            **more,
        )

    n = result.n_planted
    yield figure(
        "extraction_rate_alpha1",
        "planted records extracted, alpha = 1",
        "share",
        noise="counts",
        counts=_counts(result.hits_alpha1, n),
        low=result.extraction_rate_alpha1_low95,
        high=result.extraction_rate_alpha1_high95,
        better="higher",
    )
    yield figure(
        "extraction_rate_alpha0",
        "planted records extracted, alpha = 0",
        "share",
        noise="counts",
        counts=_counts(result.hits_alpha0, n),
        low=result.extraction_rate_alpha0_low95,
        high=result.extraction_rate_alpha0_high95,
        better="lower",
    )
    yield from _families(result)
    yield figure(
        "extraction_rate_never_trained",
        "planted records extracted, never trained",
        "share",
        noise="counts",
        counts=_counts_of_rate(result.extraction_rate_never_trained, n),
    )
    yield figure(
        "extraction_rate_twins_alpha1",
        "twins extracted, alpha = 1",
        "share",
        noise="counts",
        counts=_counts_of_rate(result.extraction_rate_twins_alpha1, result.n_twins),
    )
    yield figure("privacy_ratio", "privacy ratio", "x", noise="derived", better="higher")
    yield figure(
        "privacy_ratio_lower95",
        "privacy ratio, 95 % lower limit",
        "x",
        noise="derived",
        better="higher",
    )
    yield figure("mcnemar_p", "McNemar's p, alpha = 1 against 0", "p", noise="derived")
    for state, words in (("alpha1", "alpha = 1"), ("alpha0", "alpha = 0")):
        for group in ("planted", "twins"):
            title = f"loss on {group}, {words}"
            yield figure(f"loss_{group}_{state}", title, "nats/token", noise="unknown")
    yield figure(
        "loss_planted_never_trained",
        "loss on planted, never trained",
        "nats/token",
        noise="interval",
        low=result.loss_planted_never_trained_low95,
        high=result.loss_planted_never_trained_high95,
    )


def _families(result: KillSwitchResult) -> Iterator[Figure]:
    for family, found in result.per_family.items():
        states: tuple[tuple[str, str, int, Better], ...] = (
            ("hits_alpha1", "alpha = 1", found.hits_alpha1, "higher"),
            ("hits_alpha0", "alpha = 0", found.hits_alpha0, "lower"),
        )
        for name, words, hits, better in states:
            n = found.n_planted
            yield Figure(
                name=f"exp1_kill_switch.per_family.{family}.{name}",
                title=f"{family} extracted, {words}",
                unit="share",
                value=hits / n if n > 0 else None,
                reason="" if n > 0 else "no record of this family was planted",
                noise="counts",
                counts=_counts(hits, n),
                better=better,
            )


def _null_test(result: NullTestResult) -> Iterator[Figure]:
    for name, arm in result.arms.items():
        for field_name, title, unit, more in (
            ("ppl", f"perplexity, {arm_name(name)}", "perplexity", {"noise": "derived"}),
            (
                "ratio",
                f"perplexity over the reference's, {arm_name(name)}",
                "x",
                {"noise": "interval", "low": arm.ratio_low95, "high": arm.ratio_high95},
            ),
            (
                "bits_per_linear_weight",
                f"bits per linear weight, {arm_name(name)}",
                "bits/weight",
                {"noise": "exact"},
            ),
        ):
            yield Figure(
                name=f"exp2_null_test.arms.{name}.{field_name}",
                title=title,
                unit=unit,  # type: ignore[arg-type]
                value=getattr(arm, field_name),
                reason=_reason(arm, field_name),
                better="lower",
                **more,  # type: ignore[arg-type]
            )


def _throughput(cases: tuple[ThroughputResult, ...]) -> Iterator[Figure]:
    seen: Counter[tuple[str, str]] = Counter()
    for case in cases:
        seen[case.arm, case.phase] += 1
        copy = seen[case.arm, case.phase]
        number = f" #{copy}" if copy > 1 else ""
        where = f"{case.arm}.{case.phase}{number.strip()}"
        for name, words, unit, better in (
            ("tokens_per_s", "", "tokens/s", "higher"),
            ("median_s", ", median time", "s", "lower"),
            ("peak_memory_mib", ", peak memory", "MiB", "lower"),
        ):
            # Tokens per second are the median time in other words.
            told = name == "median_s" and case.tokens_per_s is not None
            yield Figure(
                name=f"throughput.{where}.{name}",
                title=f"{case.phase}, {arm_name(case.arm)}{words}{number}",
                unit=unit,  # type: ignore[arg-type]
                value=getattr(case, name),
                reason=_reason(case, name),
                noise="derived" if told else "unknown",
                better=better,  # type: ignore[arg-type]
                conditions=case.conditions,
            )
