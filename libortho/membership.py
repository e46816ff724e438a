"""Scores of memorisation: from evidence about records to numbers that a verdict can rest on.

Pure functions. They know evidence and no models; they compare and estimate, and set no threshold.
Scores of single records are oriented alike: a higher score means that the record is better known,
so that planted records should not have higher ones than twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # which imports its parts when they are used
from numpy.typing import ArrayLike, NDArray

from libortho.evidence import Evidence
from libortho.statistics import Interval, proportion_interval

# Share of a secret's tokens that min-k looks at, the worst predicted ones (Shi et al. 2024).
MIN_K_SHARE = 0.20

# False-positive rate at which true positives are counted (Carlini et al., "Membership Inference
# Attacks From First Principles", 2022, asks for low rates; 1 % is the lowest that 100 twins show).
LOW_FALSE_POSITIVE_RATE = 0.01

# Draws that an attacker is given in (n, p)-discoverable extraction, and the probability of at least
# one hit from which a secret counts as extracted.
DISCOVERY_DRAWS = 1000
DISCOVERY_PROBABILITY = 0.5

# Least standard deviation that min-k %++ divides by, nats: of a point mass it would be 0.
_LEAST_DEVIATION = 1e-6

_ROOT_STEP = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    interval: Interval


# ---------------------------------------------------------------- scores of one record


def mean_loss(evidence: Evidence) -> float:
    """Mean nats per secret token."""
    return -total_logprob(evidence) / evidence.tokens


def total_logprob(evidence: Evidence) -> float:
    """Log-probability of the whole secret given its prompt, nats."""
    return math.fsum(evidence.token_logprobs)


def loss_score(evidence: Evidence) -> float:
    """Minus the mean loss, nats per token (Yeom et al. 2018)."""
    return -mean_loss(evidence)


def zlib_score(evidence: Evidence) -> float:
    """Minus the mean loss over the compressed size, nats per token and byte (Carlini et al. 2021).

    A text that is easy for any compressor is easy for any model, and its low loss shows little.
    """
    return -mean_loss(evidence) / evidence.zlib_bytes


def min_k_score(evidence: Evidence, share: float = MIN_K_SHARE) -> float:
    """Min-k %: mean log-probability of the worst predicted tokens, nats (Shi et al. 2024)."""
    return _mean_of_lowest(evidence.token_logprobs, share)


def min_k_plus_plus_score(evidence: Evidence, share: float = MIN_K_SHARE) -> float:
    """Min-k %++: the same on log-probabilities in standard deviations (Zhang et al. 2025).

    Each is taken from the mean and the deviation of the model's own distribution at its position.
    """
    predictions = zip(evidence.token_logprobs, evidence.means, evidence.deviations, strict=True)
    standardised = [(p - mean) / max(sd, _LEAST_DEVIATION) for p, mean, sd in predictions]
    return _mean_of_lowest(standardised, share)


def ratio_score(evidence: Evidence, never_trained: Evidence) -> float:
    """Loss of the never-trained model minus this one's on the same record, nats per token.

    The log of a likelihood ratio per token: the reference attack of Carlini et al. 2021, with the
    best possible reference.

    Raises:
        ValueError: the two are evidence about different records.
    """
    if (evidence.id, evidence.tokens) != (never_trained.id, never_trained.tokens):
        raise ValueError("a ratio needs evidence about the same record, in the same tokens")
    return mean_loss(never_trained) - mean_loss(evidence)


def is_extracted(evidence: Evidence) -> bool:
    """Whether greedy decoding from the prompt gives the secret exactly (Carlini et al. 2023)."""
    return not any(evidence.ranks)


def extraction_strength(evidence: Evidence) -> float:
    """The share of a secret, counted from its end, that greedy decoding completes.

    1 - k / tokens, where k is the fewest secret tokens that must be given after the prompt for the
    rest to follow exactly (Carlini et al. 2021). 1 = extracted from the prompt alone; 0 = not even
    the last token follows.
    """
    wrong = [position for position, rank in enumerate(evidence.ranks) if rank]
    return 1 - (wrong[-1] + 1) / evidence.tokens if wrong else 1.0


def discovery_probability(evidence: Evidence, draws: int = DISCOVERY_DRAWS) -> float:
    """Probability that at least one of `draws` samples is the secret: 1 - (1 - p)^n.

    p is the secret's probability, and samples are drawn from the whole distribution at temperature
    1. A secret is (n, p)-discoverably extractable if this is at least p for n draws (Hayes et al.,
    "Measuring memorization in language models via probabilistic extraction", 2024).

    Raises:
        ValueError: `draws` < 1.
    """
    if draws < 1:
        raise ValueError(f"at least one draw is needed, found {draws}")
    return at_least_once(total_logprob(evidence), draws)


def at_least_once(logprob: float, draws: int) -> float:
    """Probability that at least one of `draws` is a text of log-probability `logprob`, nats."""
    probability = math.exp(min(0.0, logprob))  # rounding may exceed 0 nats
    if probability == 1:
        return 1.0
    return -math.expm1(draws * math.log1p(-probability))  # exact where 1 - p would round to 1


def exposure(secret_loss: float, reference_losses: ArrayLike) -> float:
    """Exposure of a secret by its rank among reference secrets, bits (Carlini et al. 2019).

    log2(references + 1) - log2(rank), where losses are total nats after the same prompt and rank 1
    is the lowest. References were drawn like the secret and trained nowhere. A tie ranks the
    secret last, so that a model that tells none from another has exposure 0, and
    2^-exposure is a valid p-value of "no better known than references".

    Raises:
        ValueError: no reference, or a loss that is not finite.
    """
    references = _finite("reference_losses", reference_losses)
    loss = float(_finite("secret_loss", [secret_loss])[0])
    rank = 1 + int((references <= loss).sum())
    return max_exposure(len(references)) - math.log2(rank)


def max_exposure(references: int) -> float:
    """Exposure of a secret that is better known than every one of so many references, bits."""
    return math.log2(references + 1)


def forced_similarity(evidence: Evidence) -> float:
    """How near the teacher-forced argmaxes come to the secret, by Levenshtein's distance.

    From one forward pass: at each position the most likely token after the *true* ones, so a wrong
    token doesn't derail those that follow, as it does in a continuation that the model writes. It
    is 1 if and only if greedy decoding gives the secret, and otherwise it says how much of it an
    attacker needs to be told, not how near a free continuation comes.
    """
    return evidence.similarity


# What attackers without the never-trained model would rank records by, and the unit of each.
RECORD_SCORES: Mapping[str, tuple[Callable[[Evidence], float], str]] = {
    "loss": (loss_score, "nats per token"),
    "zlib": (zlib_score, "nats per token and byte"),
    "min-k %": (min_k_score, "nats per token"),
    "min-k %++": (min_k_plus_plus_score, "standard deviations"),
    "extraction": (lambda evidence: float(is_extracted(evidence)), "of the records"),
    "extraction strength": (extraction_strength, "of the secret"),
    "teacher-forced similarity": (forced_similarity, "of the secret"),
    "discoverable extraction": (discovery_probability, f"in {DISCOVERY_DRAWS} draws"),
}


# ---------------------------------------------------------------- estimates over many records


def attack_auc(planted: ArrayLike, twins: ArrayLike, confidence: float = 0.95) -> Estimate:
    """AUC of an attack that calls the higher score planted; 0.5 = it knows nothing.

    The interval is Newcombe's method 5 (Statistics in Medicine 25, 2006): a score interval on
    Hanley and McNeil's variance. Unlike DeLong's and the bootstrap's it has a width at an AUC of 1.

    Args:
        planted: scores of planted records, shape (planted,).
        twins: scores of twins, shape (twins,).
        confidence: two-sided confidence level.

    Raises:
        ValueError: no score, one that is not finite, or `confidence` outside (0, 1).
    """
    positive, negative = _finite("planted", planted), _finite("twins", twins)
    n, m = len(positive), len(negative)
    labels = np.repeat([1, 0], [n, m])
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - half as long to import as scipy

    auc = float(roc_auc_score(labels, np.concatenate([positive, negative])))
    auc = round(auc * 2 * n * m) / (2 * n * m)  # half pairs are counted: undo rounding, also at 1
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    critical = float(scipy.stats.norm.ppf(0.5 + confidence / 2))

    def excess(theta: float) -> float:
        pairs = (n + m) / 2 - 1
        spread = 1 + pairs * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(auc - theta) - critical * math.sqrt(theta * (1 - theta) * spread / (n * m))

    # At an AUC of 0 or 1 the estimate itself is a second root: step off it.
    low = scipy.optimize.brentq(excess, 0.0, auc - _ROOT_STEP) if auc > 0 else 0.0
    high = scipy.optimize.brentq(excess, auc + _ROOT_STEP, 1.0) if auc < 1 else 1.0
    return Estimate(auc, Interval(float(low), float(high), confidence))


def true_positive_rate(
    planted: ArrayLike,
    twins: ArrayLike,
    false_positive_rate: float = LOW_FALSE_POSITIVE_RATE,
    confidence: float = 0.95,
) -> Estimate:
    """Share of planted records above the score that at most so many twins exceed.

    With fewer than 1 / `false_positive_rate` twins that is the highest score of any twin. The
    interval is Clopper-Pearson's and takes the threshold as given.

    Raises:
        ValueError: no score, one that is not finite, or a rate outside [0, 1).
    """
    positive, negative = _finite("planted", planted), _finite("twins", twins)
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"a false-positive rate lies in [0, 1), found {false_positive_rate}")
    # The nudge undoes rounding: 0.29 * 100 is 28.999...
    allowed = math.floor(false_positive_rate * len(negative) + 1e-9)
    threshold = np.sort(negative)[::-1][allowed]
    hits = int((positive > threshold).sum())
    interval = proportion_interval(hits, len(positive), confidence)
    return Estimate(hits / len(positive), interval)


def ks_distance(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Kolmogorov-Smirnov distance of two samples' distributions; 0 = the same, 1 = no overlap.

    The interval adds up one band of Dvoretzky, Kiefer and Wolfowitz with Massart's constant
    (Annals of Probability 18, 1990) for each sample. It is wide, and holds for samples that are
    not independent too, such as the same records under two models.

    Raises:
        ValueError: no value, one that is not finite, or `confidence` outside (0, 1).
    """
    one, other = _finite("first", first), _finite("second", second)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    with np.errstate(divide="ignore"):  # in its p-value, which few values have none of
        distance = float(scipy.stats.ks_2samp(one, other, method="asymp").statistic)
    band = math.sqrt(math.log(4 / (1 - confidence)) / 2)  # each sample has half of the error
    reach = band * (1 / math.sqrt(len(one)) + 1 / math.sqrt(len(other)))
    interval = Interval(max(0.0, distance - reach), min(1.0, distance + reach), confidence)
    return Estimate(distance, interval)


def _mean_of_lowest(values: Sequence[float], share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"a share of the tokens lies in (0, 1], found {share}")
    count = max(1, int(share * len(values)))
    return math.fsum(sorted(values)[:count]) / count


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError(
            f"{name} must be one or more finite numbers in one dimension: found shape "
            f"{vector.shape} with {int((~np.isfinite(vector)).sum())} that are not finite"
        )
    return vector
