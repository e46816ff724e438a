"""Evidence with a known leak: what the audit itself is examined with, and planned.

It knows how evidence comes about, and no models, records or verdicts. Nothing in here may stand in
for a measurement: it answers "would this audit have seen it, and how often does it cry wolf?", for
any number of records and any leak.

Every token has a distribution over a small vocabulary. The truth is drawn from one set of logits,
the never-trained model predicts with others that miss them by some noise, and other states change
the never-trained model's. So log-probabilities, ranks, means and deviations belong together as
those of a real model do, and ties, certain tokens and hopeless ones all occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.special import log_softmax, logit, softmax

from libortho.evidence import Evidence

Floats = NDArray[np.float64]

# Share of its loss on planted records that the on state has lost: all of them are extracted.
LEARNED = 0.998

# Bytes that zlib takes for a token of a secret, roughly.
_BYTES_PER_TOKEN = 3


@dataclass(frozen=True)
class SimulatedFamily:
    """Records that are alike: secret tokens of each, and how sharp their distributions are.

    spread: standard deviation of a distribution's logits, nats; 0 = uniform
    miss: standard deviation of the never-trained model's error about them, nats
    """

    name: str
    tokens: int
    spread: float
    miss: float = 1.0


# As far from each other in length and loss as codes and long traps are.
FAMILIES = (
    SimulatedFamily("codes", 9, 0.5),
    SimulatedFamily("uuids", 24, 1.0),
    SimulatedFamily("people", 16, 2.5),
    SimulatedFamily("passages", 20, 3.5),
    SimulatedFamily("traps", 48, 1.5),
)


@dataclass(frozen=True)
class OffState:
    """How an off state differs from the never-trained model. The default is clean.

    leak: share of the loss on planted secrets that is gone: 1 = known by heart; negative = known
        worse than before
    nats: in place of `leak`, the loss that is gone, nats per token, the same for every record
    families: the families that leak; None = all
    records: how many planted records leak, chosen at random; None = all
    format_share: share of the loss on planted secrets and twins alike that is gone, because the
        format was learned
    arithmetic: standard deviation of every logit's change, nats: another order of summation
    wander: the same, of changes that are not small: another quantiser, another training run
    noise: whether all predictions are noise
    """

    leak: float = 0.0
    nats: float = 0.0
    families: tuple[str, ...] | None = None
    records: int | None = None
    format_share: float = 0.0
    arithmetic: float = 1e-5
    wander: float = 0.0
    noise: bool = False


@dataclass(frozen=True)
class SimulatedStates:
    """Evidence of three states about the same planted records and twins."""

    off: list[Evidence]
    never: list[Evidence]
    on: list[Evidence]


def simulate(
    rng: np.random.Generator,
    off: OffState | None = None,
    *,
    per_family: int = 40,
    families: Sequence[SimulatedFamily] = FAMILIES,
    vocabulary: int = 64,
) -> SimulatedStates:
    """Draw records, and what the three states predict for them.

    Args:
        rng: source of all chance.
        off: how the off state was made; clean if None.
        per_family: planted records of each family, and as many twins.
        families: what kinds of records there are.
        vocabulary: tokens that a distribution spreads over.
    """
    off = off or OffState()
    states = SimulatedStates([], [], [])
    planted = np.arange(2 * per_family) < per_family
    leaking = _leaking(rng, off, per_family, families)
    for family, leaks in zip(families, leaking, strict=True):
        shape = (2 * per_family, family.tokens, vocabulary)
        truth = rng.normal(0, family.spread, shape)
        never = truth + rng.normal(0, family.miss, shape)
        targets = (truth + rng.gumbel(size=shape)).argmax(-1)  # one draw from each softmax
        losses = -np.take_along_axis(log_softmax(never, -1), targets[..., None], -1)[..., 0]
        share = np.full(2 * per_family, off.format_share)
        share[:per_family] += leaks * (off.leak + off.nats / losses[:per_family].mean(-1))
        changed = _taught(never, targets, share)
        changed = changed + rng.normal(0, 1, shape) * np.hypot(off.arithmetic, off.wander)
        if off.noise:
            changed = rng.normal(0, family.spread + family.miss, shape)
        learned = _taught(never, targets, np.where(planted, LEARNED, 0.0))
        for found, logits in ((states.off, changed), (states.never, never), (states.on, learned)):
            found.extend(_evidence(family.name, planted, logits, targets))
    return states


def _leaking(
    rng: np.random.Generator, off: OffState, per_family: int, families: Sequence[SimulatedFamily]
) -> NDArray[np.bool_]:
    """Which planted records leak, `[families, planted records]`."""
    open_families = [off.families is None or family.name in off.families for family in families]
    leaking = np.repeat(np.array(open_families)[:, None], per_family, axis=1)
    if off.records is not None:
        chosen = rng.choice(np.flatnonzero(leaking), off.records, replace=False)
        leaking = np.zeros_like(leaking)
        leaking.flat[chosen] = True
    return leaking


def _taught(logits: Floats, targets: NDArray[np.intp], share: Floats) -> Floats:
    """Logits under which every record's true tokens have lost `share` `[records]` of their loss."""
    probabilities = np.take_along_axis(softmax(logits, -1), targets[..., None], -1)
    wanted = probabilities ** (1 - share)[:, None, None]
    taught = logits.copy()
    here = np.take_along_axis(logits, targets[..., None], -1)
    there = here + logit(wanted.clip(max=1 - 1e-12)) - logit(probabilities.clip(max=1 - 1e-12))
    np.put_along_axis(taught, targets[..., None], there, -1)
    return taught


def _evidence(
    family: str, planted: NDArray[np.bool_], logits: Floats, targets: NDArray[np.intp]
) -> Iterator[Evidence]:
    logprobs = log_softmax(logits, -1)
    probabilities = np.exp(logprobs)
    means = (probabilities * logprobs).sum(-1)
    deviations = np.sqrt((probabilities * (logprobs - means[..., None]) ** 2).sum(-1))
    true = np.take_along_axis(logprobs, targets[..., None], -1)
    ranks = (logprobs > true).sum(-1)
    argmaxes = logprobs.argmax(-1)
    for i, is_planted in enumerate(planted):
        yield Evidence(
            f"{family}-{i:04d}",
            family,
            bool(is_planted),
            tuple(true[i, :, 0].tolist()),
            tuple(ranks[i].tolist()),
            tuple(means[i].tolist()),
            tuple(deviations[i].tolist()),
            Levenshtein.normalized_similarity(argmaxes[i].tolist(), targets[i].tolist()),
            _BYTES_PER_TOKEN * targets.shape[1],
        )
