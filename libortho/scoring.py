"""What a model predicts for secrets and for running text, with the right tokens before each one.

Knows causal language models and token ids. Everything that needs a likelihood (tuning,
extraction, perplexity) takes it from here, so that one position means one thing everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .records import EncodedRecord


class SecretLogits(NamedTuple):
    """Predictions at every secret token of a batch, and nowhere else.

    logits: `[secret tokens, vocabulary]`, in the model's dtype
    targets: int64 `[secret tokens]`, the secrets' token ids
    owner: int64 `[secret tokens]`, the record of the batch that each belongs to
    """

    logits: Tensor
    targets: Tensor
    owner: Tensor


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states `[batch, tokens, hidden]` for token ids `[batch, tokens]`."""
    ids = ids.to(model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


class SecretPositions(NamedTuple):
    """A batch of records as one tensor, and where in it their secrets are predicted.

    ids: int64 `[records, longest]`, padded on the right; no mask is needed, because causal
        attention never looks there
    rows, columns: of the state that predicts each secret token, `[secret tokens]`
    targets: int64 `[secret tokens]`, the secrets' token ids
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def secret_positions(records: Sequence[EncodedRecord]) -> SecretPositions:
    """Where a batch of records has its secrets."""
    longest = max(len(r.input_ids) for r in records)
    return SecretPositions(
        torch.tensor([r.input_ids + [0] * (longest - len(r.input_ids)) for r in records]),
        torch.tensor([i for i, r in enumerate(records) for _ in r.input_ids[r.secret_start :]]),
        torch.tensor([t for r in records for t in range(r.secret_start - 1, len(r.input_ids) - 1)]),
        torch.tensor([t for r in records for t in r.input_ids[r.secret_start :]]),
    )


def secret_logits(model: Any, records: Sequence[EncodedRecord]) -> SecretLogits:
    """One forward pass over a batch of records; the output head sees only what is asked about."""
    ids, rows, columns, targets = secret_positions(records)
    hidden = hidden_states(model, ids)
    device = hidden.device
    rows = rows.to(device)
    hidden = hidden[rows, columns.to(device)]  # [secret tokens, hidden]
    return SecretLogits(model.get_output_embeddings()(hidden), targets.to(device), rows)


def mean_by_owner(values: Tensor, owner: Tensor, records: int) -> Tensor:
    """Mean of `values` `[secret tokens]` over each record's tokens, float32 `[records]`."""
    total = torch.zeros(records, device=values.device).index_add(0, owner, values.float())
    return total / torch.bincount(owner, minlength=records)


def secret_losses(model: Any, records: Sequence[EncodedRecord]) -> Tensor:
    """Mean nats per secret token of each record, float32 `[len(records)]`."""
    logits, targets, owner = secret_logits(model, records)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return mean_by_owner(losses, owner, len(records))


def window_losses(model: Any, windows: Tensor) -> Tensor:
    """Mean nats per token of each window `[count, length]`, float32 `[count]`.

    A window's first token has nothing before it and is not scored: length - 1 tokens are.
    """
    windows = windows.to(model.device)
    logits = model.get_output_embeddings()(hidden_states(model, windows)[:, :-1])
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    return losses.view(windows.shape[0], -1).mean(1)
