"""The figures of both experiments and of throughput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from libortho.results import KillSwitchResult, NullTestResult, ThroughputResult

from .figure import Better, Figure, Unit, arm_name, counts_of, counts_of_rate, reason_of


def kill_switch_figures(result: KillSwitchResult) -> Iterator[Figure]:
    def figure(name: str, title: str, unit: Unit, **more: Any) -> Figure:
        return Figure(
            name=f"exp1_kill_switch.{name}",
            title=title,
            unit=unit,
            value=getattr(result, name),
            reason=reason_of(result, name),
            **more,
        )

    n = result.n_planted
    yield figure(
        "extraction_rate_alpha1",
        "planted records extracted, alpha = 1",
        "share",
        noise="counts",
        counts=counts_of(result.hits_alpha1, n),
        low=result.extraction_rate_alpha1_low95,
        high=result.extraction_rate_alpha1_high95,
        better="higher",
    )
    yield figure(
        "extraction_rate_alpha0",
        "planted records extracted, alpha = 0",
        "share",
        noise="counts",
        counts=counts_of(result.hits_alpha0, n),
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
        counts=counts_of_rate(result.extraction_rate_never_trained, n),
    )
    yield figure(
        "extraction_rate_twins_alpha1",
        "twins extracted, alpha = 1",
        "share",
        noise="counts",
        counts=counts_of_rate(result.extraction_rate_twins_alpha1, result.n_twins),
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
                counts=counts_of(hits, n),
                better=better,
            )


def null_test_figures(result: NullTestResult) -> Iterator[Figure]:
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
                reason=reason_of(arm, field_name),
                better="lower",
                **more,  # type: ignore[arg-type]
            )


def throughput_figures(cases: tuple[ThroughputResult, ...]) -> Iterator[Figure]:
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
                reason=reason_of(case, name),
                noise="derived" if told else "unknown",
                better=better,  # type: ignore[arg-type]
                conditions=case.conditions,
            )
