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


def packed_hidden_states(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states `[all tokens, hidden]` of sequences of any lengths, one after the other.

    They run as one row in which each attends to itself alone, so that no padding is computed.
    """
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    if len(sequences) == 1:
        return hidden_states(model, ids)[0]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    owner = torch.repeat_interleave(lengths)  # [all tokens]
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    allowed = (owner[:, None] == owner[None, :]).tril()
    # Additive and 4-D: the one form of mask that every attention of transformers takes as it is.
    mask = torch.zeros(allowed.shape, dtype=model.dtype)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    device = model.device
    return model.base_model(
        input_ids=ids.to(device),
        attention_mask=mask[None, None].to(device),
        position_ids=positions[None].to(device),
        use_cache=False,
    ).last_hidden_state[0]


def secret_logits(model: Any, records: Sequence[EncodedRecord]) -> SecretLogits:
    """One forward pass over a batch of records; the output head sees only what is asked about."""
    hidden = packed_hidden_states(model, [record.input_ids for record in records])
    return secret_logits_of(model, hidden, records)


def secret_logits_of(model: Any, hidden: Tensor, records: Sequence[EncodedRecord]) -> SecretLogits:
    """The same from the records' hidden states `[at least all tokens, hidden]`, packed in order."""
    places: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    start = 0
    for i, record in enumerate(records):
        ids, first = record.input_ids, record.secret_start
        places += range(start + first - 1, start + len(ids) - 1)
        targets += ids[first:]
        owner += [i] * (len(ids) - first)
        start += len(ids)
    device = hidden.device
    return SecretLogits(
        model.get_output_embeddings()(hidden[places]),  # [secret tokens, vocabulary]
        torch.tensor(targets, device=device),
        torch.tensor(owner, device=device),
    )


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
