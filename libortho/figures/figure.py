"""`Figure`: one number with its name, unit, limits and direction; how arms are called in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["higher", "lower"]
Unit = Literal[
    "share", "nats/token", "perplexity", "x", "bits/weight", "tokens/s", "s", "MiB", "p", ""
]
Noise = Literal["counts", "interval", "exact", "derived", "unknown"]
"""What a file says about a figure's chance variation.

counts: hits of n, so that any two can be tested
interval: 95 % limits stand beside it
exact: a repetition gives the same value
derived: it follows from other figures, which are tested
unknown: nothing is said
"""

_MOST_RECORDS = 1_000_000
"""No experiment asks about more; an exact test of more would not end either."""

ARM_NAMES = {
    "reference": "unquantised",
    "alpha1": "alpha = 1",
    "alpha0": "alpha = 0",
    "never-trained": "never trained",
    "plain": "round to nearest, no ortho",
    "nf4": "bitsandbytes NF4",
    "int8": "bitsandbytes LLM.int8",
}


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


def arm_name(arm: str) -> str:
    """An arm in words; its own name if there are none for it."""
    return ARM_NAMES.get(arm, arm)


def reason_of(result: Any, name: str) -> str:
    """Why a field is null, by its record's `reasons`; "" if it isn't."""
    return result.reasons.get(name, "") if getattr(result, name) is None else ""


def counts_of(hits: int, n: int) -> tuple[int, int] | None:
    """The pair, or None if no experiment could have given it."""
    return (hits, n) if 0 <= hits <= n and 0 < n <= _MOST_RECORDS else None


def counts_of_rate(rate: float | None, n: int) -> tuple[int, int] | None:
    """The pair behind a share, or None as for `counts_of`."""
    return counts_of(round(rate * n), n) if rate is not None and 0 <= rate <= 1 else None
