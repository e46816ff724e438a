"""The dose curve: what a model with its private stream gives away at each alpha.

Not an attack on what is handed out: it needs the private stream, and whoever holds that holds the
secrets. It shows that alpha is a dose (how fast records fade, whether a negative alpha tells them
as well) and calibrates the attacks: a trace of the size that they see at alpha = 0.1, say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from libortho.attacks.attack import Cost
from libortho.attacks.comparison import Rate
from libortho.attacks.passes import BATCH_SIZE, metered
from libortho.attacks.target import Target
from libortho.linear import OrthoLinear
from libortho.perplexity import measure_perplexity
from libortho.records import RecordSet
from libortho.switch import alpha, dense_weights

DOSES = (-1.0, -0.5, 0.1, 0.25, 0.5, 0.75)
"""Values of alpha between and beyond 0 and 1, which an audit measures anyway."""

DOSE_RECORDS = 15
"""Planted records that are asked about at each alpha, and as many twins."""


@dataclass(frozen=True, kw_only=True)
class DosePoint:
    """A model at one alpha.

    planted, twins: records that greedy decoding recites, exactly
    loss_planted, loss_twins: mean nats per secret token, over records
    ppl: perplexity on the given windows; null without windows, and `reasons` says so
    """

    alpha: float
    planted: Rate
    twins: Rate
    loss_planted: float
    loss_twins: float
    ppl: float | None = None
    cost: Cost
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


def dose_curve(
    model: Any,
    tokenizer: Any,
    records: RecordSet,
    *,
    alphas: Sequence[float] = DOSES,
    dial: Callable[[Any, float], AbstractContextManager[Any]] = alpha,
    count: int | None = DOSE_RECORDS,
    windows: Tensor | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> tuple[DosePoint, ...]:
    """Measure a model at each alpha, which then is as before.

    dial: sets alpha for a block; `switch.alpha` is for separated models
    count: planted records that are asked about, chosen by `seed`; None = all
    windows: int64 `[count, length]` of public text, for perplexity

    Raises `RecordError` as `Target` does, and what the dial raises: `switch.alpha` a
    `SeparationError` for a model that is not separated.
    """
    target = Target(model, tokenizer, records, batch_size=batch_size)
    chosen = target.choose(count, seed)
    encoded = [target.asked[i].encoded for i in chosen]
    planted = [target.asked[i].planted for i in chosen]
    tokens = [len(target.asked[i].secret_ids) for i in chosen]
    points = []
    separated = any(isinstance(module, OrthoLinear) for module in model.modules())
    with dense_weights(model, model.dtype) if separated else nullcontext():
        for value in tqdm(alphas, desc="dose curve", unit="alpha", disable=None, leave=False):
            with dial(model, value), metered(model) as cost:
                nats, hits = target.score(encoded)
                ppl = None if windows is None else measure_perplexity(model, windows).ppl
            losses = [-n / size for n, size in zip(nats, tokens, strict=True)]
            points.append(
                DosePoint(
                    alpha=value,
                    planted=_rate(hits, planted, True),
                    twins=_rate(hits, planted, False),
                    loss_planted=_mean(losses, planted, True),
                    loss_twins=_mean(losses, planted, False),
                    ppl=ppl,
                    cost=cost(),
                    reasons={} if windows is not None else {"ppl": "no windows were given"},
                )
            )
    return tuple(points)


def _of(values: Sequence[Any], planted: Sequence[bool], wanted: bool) -> list[Any]:
    return [value for value, flag in zip(values, planted, strict=True) if flag == wanted]


def _rate(hits: Sequence[bool], planted: Sequence[bool], wanted: bool) -> Rate:
    own = _of(hits, planted, wanted)
    return Rate.of(sum(own), len(own))


def _mean(losses: Sequence[float], planted: Sequence[bool], wanted: bool) -> float:
    own = _of(losses, planted, wanted)
    return sum(own) / len(own)
