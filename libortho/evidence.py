"""Evidence: everything that one batched forward pass says about a record.

Knows models and records, and of text only how far it compresses. It judges nothing and compares
nothing: scores are `membership`'s, verdicts are `audit`'s.

Evidence is as confidential as the secrets. Under a public model the exact log-probability of a
token, or its rank, tells which token it was; so evidence stays in memory, and results carry what
is computed from many records.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from tqdm import tqdm

from libortho.batching import halving
from libortho.records import EncodedRecord, RecordSet, encode
from libortho.scoring import losses_by_record, secret_logits, shared_prompt_logits

T = TypeVar("T")


@dataclass(frozen=True)
class Evidence:
    """What one model predicts at the secret tokens of one record; `repr` shows no prediction.

    The four tuples have one value a secret token. Two pieces of evidence are equal if and only if
    every value is, bit by bit.

    planted: whether the record was trained into the private stream; False for a twin
    token_logprobs: log-probability of the true token, given the true tokens before it, nats
    ranks: how many tokens the model puts before the true one; 0 = it is the argmax
    means: mean of the log-probability under the model's own distribution, nats (minus the entropy)
    deviations: standard deviation of the same, nats
    similarity: Levenshtein similarity, over tokens and from 0 to 1, of the secret and the argmaxes
        after its true tokens; 1 if and only if all ranks are 0
    zlib_bytes: compressed size of the secret's text, see `compressed_bytes`

    Raises:
        ValueError: no token, tuples of different lengths, a negative rank, a similarity that
            contradicts the ranks, or `zlib_bytes` < 1.
    """

    id: str
    family: str
    planted: bool
    token_logprobs: tuple[float, ...] = field(repr=False)
    ranks: tuple[int, ...] = field(repr=False)
    means: tuple[float, ...] = field(repr=False)
    deviations: tuple[float, ...] = field(repr=False)
    similarity: float = field(repr=False)
    zlib_bytes: int

    def __post_init__(self) -> None:
        """Refuse evidence that contradicts itself."""
        lengths = [len(v) for v in (self.token_logprobs, self.ranks, self.means, self.deviations)]
        if lengths[0] == 0 or len(set(lengths)) > 1:
            raise ValueError(f"evidence needs one value of each kind per token, found {lengths}")
        if min(self.ranks) < 0 or self.zlib_bytes < 1:
            raise ValueError("ranks start at 0 and no text compresses to less than one byte")
        if not 0 <= self.similarity <= 1 or (self.similarity == 1) == any(self.ranks):
            raise ValueError("a similarity lies in [0, 1], and is 1 just where every rank is 0")

    @property
    def tokens(self) -> int:
        """Number of secret tokens."""
        return len(self.token_logprobs)


def compressed_bytes(text: str) -> int:
    """Size of a text after zlib at its default level, bytes; the empty text takes 8."""
    return len(zlib.compress(text.encode()))


def collect_set(
    model: Any, tokenizer: Any, records: RecordSet, *, batch_size: int = 8, title: str = "evidence"
) -> list[Evidence]:
    """Evidence about a whole set: its planted records, then its twins.

    Args:
        model: a causal language model in the state that is examined.
        tokenizer: the model's.
        records: planted records and twins.
        batch_size: records a forward pass, to begin with; out of memory halves it.
        title: what the progress bar says.

    Raises:
        RecordError: a record gives no token, or too many for the model's context.
    """
    evidence = []
    for planted, group in ((True, records.planted), (False, records.twins)):
        evidence += collect(
            model,
            encode(tokenizer, group, model.config.max_position_embeddings),
            planted=planted,
            zlib_bytes=[compressed_bytes(record.secret) for record in group],
            batch_size=batch_size,
            title=f"{title}, {'planted' if planted else 'twins'}",
        )
    return evidence


@torch.inference_mode()
def collect(
    model: Any,
    encoded: Sequence[EncodedRecord],
    *,
    planted: bool,
    zlib_bytes: Sequence[int],
    batch_size: int = 8,
    title: str = "collecting evidence",
) -> list[Evidence]:
    """Evidence of each record in its order, one forward pass a batch. Out of memory halves it.

    Args:
        model: a causal language model in the state that is examined.
        encoded: the records, all planted or all twins.
        planted: which of the two they are.
        zlib_bytes: for each record the compressed size of its secret's text.
        batch_size: records a forward pass, to begin with.
        title: what the progress bar says.

    Raises:
        ValueError: `zlib_bytes` and `encoded` differ in length.
    """
    if len(zlib_bytes) != len(encoded):
        raise ValueError(
            f"one compressed size per record is needed: found {len(zlib_bytes)} for {len(encoded)}"
        )
    sizes = dict(zip((record.id for record in encoded), zlib_bytes, strict=True))

    def run(size: int) -> list[Evidence]:
        return [
            _of_record(record, planted, rows, sizes[record.id])
            for batch in _batches(encoded, size, title)
            for record, rows in zip(batch, _by_record(model, batch), strict=True)
        ]

    return halving(run, batch_size)


@torch.inference_mode()
def collect_from_states(
    model: Any,
    encoded: Sequence[EncodedRecord],
    states: Sequence[Tensor],
    *,
    planted: Sequence[bool],
    zlib_bytes: Sequence[int],
) -> list[Evidence]:
    """Evidence of each record from a forward pass that was made already.

    Args:
        model: that made it; only its output head is used.
        encoded: the records.
        states: for each record what the head reads before each secret token, `[tokens, hidden]`.
        planted: whether each was planted.
        zlib_bytes: for each the compressed size of its secret's text.

    Raises:
        ValueError: a record has another number of states than of secret tokens.
    """
    head = model.get_output_embeddings()
    found = []
    for record, hidden, flag, size in zip(encoded, states, planted, zlib_bytes, strict=True):
        targets = torch.tensor(record.input_ids[record.secret_start :], device=model.device)
        if len(hidden) != len(targets):
            raise ValueError(f"{len(targets)} secret tokens need as many states: {len(hidden)}")
        logits = head(hidden.to(model.device))
        columns = (targets, logits.argmax(-1), *_predictions(logits, targets))
        found.append(_of_record(record, flag, [c.tolist() for c in columns], size))
    return found


@torch.inference_mode()
def reference_losses(
    model: Any,
    references: Mapping[str, Sequence[EncodedRecord]],
    *,
    batch_size: int = 2,
    title: str = "scoring references",
) -> dict[str, tuple[float, ...]]:
    """Total nats of each record's reference secrets, for `membership.exposure`.

    Args:
        model: a causal language model in the state that is examined.
        references: for each record's id, its prompt followed by secrets drawn like its own.
        batch_size: records whose references share a forward pass, to begin with; out of memory
            halves it.
        title: what the progress bar says.

    Raises:
        ValueError: one record's references have different prompts.
    """
    groups = [group for group in references.values() if group]

    def run(size: int) -> list[float]:
        losses = []
        for batch in _batches(groups, size, title):
            flat = [record for group in batch for record in group]
            means = losses_by_record(shared_prompt_logits(model, batch), len(flat)).tolist()
            losses += [
                mean * (len(record.input_ids) - record.secret_start)
                for mean, record in zip(means, flat, strict=True)
            ]
        return losses

    losses = iter(halving(run, batch_size))
    return {key: tuple(next(losses) for _ in group) for key, group in references.items()}


def _batches(items: Sequence[T], size: int, title: str) -> Iterator[Sequence[T]]:
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=title, unit="batch", disable=None, leave=False):
        yield items[start : start + size]


def _by_record(model: Any, batch: Sequence[EncodedRecord]) -> Iterator[list[Any]]:
    """For each record its targets, argmaxes, log-probabilities, ranks, means and deviations."""
    logits, targets, _ = secret_logits(model, batch)
    predictions = (targets, logits.argmax(-1), *_predictions(logits, targets))
    counts = [len(record.input_ids) - record.secret_start for record in batch]
    columns = [values.split(counts) for values in predictions]
    return ([part.tolist() for part in row] for row in zip(*columns, strict=True))


def _of_record(
    record: EncodedRecord, planted: bool, rows: Sequence[list[Any]], zlib_bytes: int
) -> Evidence:
    targets, argmaxes, logprobs, ranks, means, deviations = rows
    return Evidence(
        record.id,
        record.family,
        planted,
        tuple(logprobs),
        tuple(ranks),
        tuple(means),
        tuple(deviations),
        Levenshtein.normalized_similarity(argmaxes, targets),
        zlib_bytes,
    )


def _predictions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, ranks, means and deviations, each `[tokens]`, of logits `[tokens, V]`."""
    target_logits = logits.gather(-1, targets[:, None])
    ranks = (logits > target_logits).sum(-1)
    # In half precision the largest logit is often shared; greedy decoding takes one of them.
    ranks[(ranks == 0) & (logits.argmax(-1) != targets)] = 1
    logprobs = logits.float().log_softmax(-1)
    probabilities = logprobs.exp()
    # A token of probability 0 has log-probability -inf and adds nothing.
    logprobs_or_zero = logprobs.masked_fill(probabilities == 0, 0.0)
    means = (probabilities * logprobs_or_zero).sum(-1)
    variances = (probabilities * (logprobs_or_zero - means[:, None]).square()).sum(-1)
    token_logprobs = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    return token_logprobs, ranks, means, variances.sqrt()
