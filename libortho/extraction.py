"""Extraction: which secrets a model would recite, and how well it knows the others.

Knows models and encoded records; makes numbers, judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .batching import halving
from .records import EncodedRecord
from .scoring import mean_by_owner, secret_logits


@dataclass(frozen=True)
class RecordScore:
    """What one model knows of one record.

    extracted: greedy decoding from the prompt gives the secret exactly (discoverable extraction,
        Carlini et al. 2023)
    loss: mean nats per secret token
    tokens: secret tokens
    """

    id: str
    family: str
    extracted: bool
    loss: float
    tokens: int


@torch.inference_mode()
def score_records(
    model: Any, records: Sequence[EncodedRecord], *, batch_size: int = 8, title: str = "extracting"
) -> list[RecordScore]:
    """Score records in their order, one forward pass a batch.

    No decoding is needed: greedy decoding recites a secret if and only if, given the true tokens
    before, each secret token is the argmax. Out of memory halves the batch.
    """

    def run(size: int) -> list[RecordScore]:
        scores: list[RecordScore] = []
        starts = range(0, len(records), size)
        for start in tqdm(starts, desc=title, unit="batch", disable=None, leave=False):
            batch = records[start : start + size]
            logits, targets, owner = secret_logits(model, batch)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            missed = (logits.argmax(-1) != targets).float()
            means = mean_by_owner(losses, owner, len(batch)).tolist()
            misses = mean_by_owner(missed, owner, len(batch)).tolist()
            for record, loss, miss in zip(batch, means, misses, strict=True):
                tokens = len(record.input_ids) - record.secret_start
                scores.append(RecordScore(record.id, record.family, miss == 0.0, loss, tokens))
        return scores

    return halving(run, batch_size)


@torch.inference_mode()
def recites(model: Any, record: EncodedRecord) -> bool:
    """Whether greedy `generate` from the prompt alone gives the secret, token for token.

    The slow way to what `score_records` and `evidence.collect` tell from one forward pass.
    """
    prompt = torch.tensor([record.input_ids[: record.secret_start]], device=model.device)
    secret = record.input_ids[record.secret_start :]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(secret),
        do_sample=False,
        repetition_penalty=1.0,
    )
    # Shorter if the model ended the text: then it did not say the secret.
    return bool(out[0, record.secret_start :].tolist() == secret)


def hits(scores: Sequence[RecordScore]) -> int:
    """Number of extracted records."""
    return sum(score.extracted for score in scores)


def mean_loss(scores: Sequence[RecordScore]) -> float:
    """Mean over records of the mean nats per secret token."""
    return sum(score.loss for score in scores) / len(scores)
