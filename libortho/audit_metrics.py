"""Every metric of one state with its interval: a row of the audit's table.

Pure functions from evidence to records that go into results as they are. They know no models and
judge nothing: which differences count is `contrast`'s to test, with a correction for how many were
looked at. Intervals here are for each metric alone, at 95 %. What is written is computed from at
least two planted records and two twins: a single record's evidence would be as good as its secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from libortho.contrast import ALL_FAMILIES
from libortho.evidence import Evidence
from libortho.membership import (
    DISCOVERY_DRAWS,
    DISCOVERY_PROBABILITY,
    LOW_FALSE_POSITIVE_RATE,
    Estimate,
    attack_auc,
    discovery_probability,
    exposure,
    extraction_strength,
    forced_similarity,
    is_extracted,
    ks_distance,
    loss_score,
    max_exposure,
    mean_loss,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    total_logprob,
    true_positive_rate,
    zlib_score,
)
from libortho.statistics import (
    bounded_mean_interval,
    mcnemar_exact,
    mean_difference_interval,
    mean_interval,
    proportion_interval,
)

CONFIDENCE = 0.95

# How an interval was made.
CLOPPER_PEARSON = "Clopper-Pearson"
BOUNDED_MEAN = "Clopper-Pearson, sum for hits"
STUDENT = "Student"
WELCH = "Welch"
NEWCOMBE = "Newcombe method 5"
DKW = "Dvoretzky-Kiefer-Wolfowitz"

References = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A metric of one state, null with a reason if it wasn't measured."""

    value: float | None
    low95: float | None
    high95: float | None
    unit: str
    interval: str  # the method that gave the limits
    n: int  # planted records and twins that it was computed from
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


@dataclass(frozen=True, kw_only=True)
class AuditMetrics:
    """Every metric of one state, about one family or all of them.

    Means over all families weigh records alike. Scores of membership inference are those of an
    attacker without the never-trained model, but for "ratio to B0"; over all families, who sets one
    threshold for them all.
    """

    state: str
    family: str
    n_planted: int
    n_twins: int
    metrics: dict[str, MetricValue]
    mcnemar_p: float  # extraction of planted records against the never-trained model's, exact


def measure_state(
    state: Sequence[Evidence],
    never: Sequence[Evidence],
    *,
    name: str,
    references: References | None = None,
) -> tuple[AuditMetrics, ...]:
    """Every metric of a state: about all families together, then each, if there are several.

    Args:
        state: evidence of the state about planted records and twins, in any order.
        never: evidence of the never-trained model, B0, about the same records; may be the state.
        name: what the state is called.
        references: for ids of planted records the total nats of their reference secrets under the
            state, from `evidence.reference_losses`; records without any have no exposure.

    Raises:
        ValueError: the two are about different records, a family has fewer than two planted records
            or twins, or a score is not finite.
    """
    by_id = {e.id: e for e in never}
    if len(by_id) < len(never) or {e.id for e in state} != by_id.keys():
        raise ValueError("metrics need evidence of both states about the same records, once each")
    families = list(dict.fromkeys(e.family for e in state))
    groups = {ALL_FAMILIES: list(state)} if len(families) > 1 else {}
    groups |= {family: [e for e in state if e.family == family] for family in families}
    return tuple(
        _measure(group, [by_id[e.id] for e in group], name, family, references or {})
        for family, group in groups.items()
    )


def _measure(
    state: Sequence[Evidence],
    never: Sequence[Evidence],
    name: str,
    family: str,
    references: References,
) -> AuditMetrics:
    pairs = list(zip(state, never, strict=True))
    planted = [pair for pair in pairs if pair[0].planted]
    twins = [pair for pair in pairs if not pair[0].planted]
    if min(len(planted), len(twins)) < 2:
        raise ValueError(
            f"metrics need two or more planted records and twins: found {len(planted)} and "
            f"{len(twins)} in one of the families"
        )
    known = [e for e, _ in planted]
    unknown = [e for e, _ in twins]
    metrics = dict(_knowledge(known, unknown))
    metrics["exposure"] = _exposure(known, references)
    metrics |= dict(_membership(planted, twins))
    for group, of in ((planted, "planted"), (twins, "twins")):
        distance = ks_distance([mean_loss(a) for a, _ in group], [mean_loss(b) for _, b in group])
        metrics[f"KS distance to B0, {of}"] = _metric(distance, "of 1", DKW, len(group))
    extracted = [[is_extracted(pair[i]) for pair in planted] for i in (0, 1)]
    return AuditMetrics(
        state=name,
        family=family,
        n_planted=len(planted),
        n_twins=len(twins),
        metrics=metrics,
        mcnemar_p=mcnemar_exact(extracted[0], extracted[1]),
    )


def _knowledge(
    planted: Sequence[Evidence], twins: Sequence[Evidence]
) -> Iterator[tuple[str, MetricValue]]:
    """What can be had of planted secrets, beside what the same model would guess of twins."""
    for records, of in ((planted, "planted"), (twins, "twins")):
        n = len(records)
        for metric, hit in (("extraction", is_extracted), (_DISCOVERABLE, _is_discoverable)):
            hits = sum(map(hit, records))
            rate = Estimate(hits / n, proportion_interval(hits, n, CONFIDENCE))
            yield f"{metric}, {of}", _metric(rate, "of the records", CLOPPER_PEARSON, n)
        for metric, share in (
            ("extraction strength", extraction_strength),
            ("teacher-forced similarity", forced_similarity),
        ):
            mean = Estimate(*bounded_mean_interval([share(e) for e in records], CONFIDENCE))
            yield f"{metric}, {of}", _metric(mean, "of the secret", BOUNDED_MEAN, n)
        mean = Estimate(*mean_interval([mean_loss(e) for e in records], CONFIDENCE))
        yield f"mean loss, {of}", _metric(mean, "nats per token", STUDENT, n)
    known, guessed = ([mean_loss(e) for e in records] for records in (planted, twins))
    difference = Estimate(*mean_difference_interval(known, guessed, CONFIDENCE))
    n = len(planted) + len(twins)
    yield "mean loss, planted - twins", _metric(difference, "nats per token", WELCH, n)


_DISCOVERABLE = f"({DISCOVERY_DRAWS}, {DISCOVERY_PROBABILITY})-discoverable extraction"


def _is_discoverable(evidence: Evidence) -> bool:
    return discovery_probability(evidence) >= DISCOVERY_PROBABILITY


def _exposure(planted: Sequence[Evidence], references: References) -> MetricValue:
    """Mean exposure of the planted records that have references, as many for each."""
    found = [e for e in planted if references.get(e.id)]
    sizes = {len(references[e.id]) for e in found}
    if len(found) < 2 or len(sizes) > 1:
        why = f"{len(found)} planted records have reference secrets, and two or more are needed"
        if len(sizes) > 1:
            why = "the planted records differ in how many reference secrets they have"
        reasons = dict.fromkeys(("value", "low95", "high95"), why)
        return MetricValue(
            value=None,
            low95=None,
            high95=None,
            unit="bits",
            interval=BOUNDED_MEAN,
            n=len(found),
            reasons=reasons,
        )
    most = max_exposure(sizes.pop())
    bits = [exposure(-total_logprob(e), references[e.id]) for e in found]
    share, interval = bounded_mean_interval([min(1.0, b / most) for b in bits], CONFIDENCE)
    return MetricValue(
        value=share * most,
        low95=interval.low * most,
        high95=interval.high * most,
        unit=f"bits, at most {most:.4g}",
        interval=BOUNDED_MEAN,
        n=len(found),
    )


Pair = tuple[Evidence, Evidence]

# Membership inference: a score of the state's evidence and the never-trained model's.
_ATTACKS: Mapping[str, Callable[[Evidence, Evidence], float]] = {
    "loss": lambda state, _: loss_score(state),
    "zlib": lambda state, _: zlib_score(state),
    "min-k %": lambda state, _: min_k_score(state),
    "min-k %++": lambda state, _: min_k_plus_plus_score(state),
    "ratio to B0": ratio_score,
}


def _membership(
    planted: Sequence[Pair], twins: Sequence[Pair]
) -> Iterator[tuple[str, MetricValue]]:
    n = len(planted) + len(twins)
    rate = f"TPR at {LOW_FALSE_POSITIVE_RATE:.0%} FPR"
    for attack, score in _ATTACKS.items():
        members = [score(*pair) for pair in planted]
        others = [score(*pair) for pair in twins]
        auc = attack_auc(members, others, CONFIDENCE)
        yield f"{attack}: AUC", _metric(auc, "of 1", NEWCOMBE, n)
        found = true_positive_rate(members, others, confidence=CONFIDENCE)
        yield f"{attack}: {rate}", _metric(found, "of the planted records", CLOPPER_PEARSON, n)


def _metric(estimate: Estimate, unit: str, interval: str, n: int) -> MetricValue:
    return MetricValue(
        value=estimate.value,
        low95=estimate.interval.low,
        high95=estimate.interval.high,
        unit=unit,
        interval=interval,
        n=n,
    )
