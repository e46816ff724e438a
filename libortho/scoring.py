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

LOGITS_AT_ONCE = 1 << 23
"""Logits that are scored together, 80 MiB with their logarithms. A 6 GB card has little more to
spare beside an 8B model, and a product with fewer positions would be slower."""


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


def packed_inputs(model: Any, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the model's body takes to run sequences of any lengths as one row, on its device.

    Each attends to itself alone, so that no padding is computed. The mask is additive and 4-D, the
    one form that every attention of transformers takes as it is.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    owner = torch.repeat_interleave(lengths)  # [all tokens]
    inputs = {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "attention_mask": _mask((owner[:, None] == owner[None, :]).tril(), model.dtype),
    }
    if len(sequences) == 1:  # a plain causal pass has faster kernels without a mask
        del inputs["attention_mask"]
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive `[1, 1, tokens, tokens]`, from bool `[tokens, tokens]`: who may look at whom."""
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


def packed_hidden_states(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states `[all tokens, hidden]` of sequences of any lengths, in their order."""
    inputs = packed_inputs(model, sequences)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


class SecretPlaces(NamedTuple):
    """Where packed records have their secrets, int64 `[secret tokens]` each.

    places: of the states that predict secret tokens, in the row of all records
    targets: the secrets' token ids
    owner: the record of the batch that each belongs to
    """

    places: Tensor
    targets: Tensor
    owner: Tensor


def secret_places(records: Sequence[EncodedRecord]) -> SecretPlaces:
    """The places of a batch of records that run packed, in this order."""
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
    return SecretPlaces(*map(torch.tensor, (places, targets, owner)))


def secret_logits(model: Any, records: Sequence[EncodedRecord]) -> SecretLogits:
    """One forward pass over a batch of records; the output head sees only what is asked about."""
    hidden = packed_hidden_states(model, [record.input_ids for record in records])
    return secret_logits_of(model, hidden, records)


def secret_logits_of(model: Any, hidden: Tensor, records: Sequence[EncodedRecord]) -> SecretLogits:
    """The same from hidden states `[tokens, hidden]` that begin with the records', packed."""
    places, targets, owner = (t.to(hidden.device) for t in secret_places(records))
    logits = model.get_output_embeddings()(hidden[places])  # [secret tokens, vocabulary]
    return SecretLogits(logits, targets, owner)


def shared_prompt_logits(model: Any, groups: Sequence[Sequence[EncodedRecord]]) -> SecretLogits:
    """Predictions for groups of records, in their order, whose prompts are the same in a group.

    A prompt runs once, and each of its secrets sees it and itself alone.

    Raises:
        ValueError: the prompts of a group differ.
    """
    ids: list[int] = []
    positions: list[int] = []
    part: list[int] = []  # which prompt or secret each token belongs to
    before: list[int] = []  # and which prompt that one sees as well
    places: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    parts = records = 0
    for group in groups:
        prompts = {tuple(record.input_ids[: record.secret_start]) for record in group}
        if len(prompts) != 1:
            raise ValueError(f"a group shares one prompt, found {len(prompts)}")
        (prompt,) = prompts
        root, last = parts, len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        part += [root] * len(prompt)
        before += [root] * len(prompt)
        for record in group:
            parts += 1
            secret = record.input_ids[record.secret_start :]
            places += [last, *range(len(ids), len(ids) + len(secret) - 1)]
            ids += secret
            positions += range(record.secret_start, len(record.input_ids))
            part += [parts] * len(secret)
            before += [root] * len(secret)
            targets += secret
            owner += [records] * len(secret)
            records += 1
        parts += 1
    parts_of, before_of = torch.tensor(part), torch.tensor(before)
    seen = (parts_of[:, None] == parts_of) | (before_of[:, None] == parts_of)
    hidden = model.base_model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        attention_mask=_mask(seen.tril(), model.dtype).to(model.device),
        use_cache=False,
    ).last_hidden_state[0]
    at, of, whose = (torch.tensor(t, device=hidden.device) for t in (places, targets, owner))
    return SecretLogits(model.get_output_embeddings()(hidden[at]), of, whose)


def mean_by_owner(values: Tensor, owner: Tensor, records: int) -> Tensor:
    """Mean of `values` `[secret tokens]` over each record's tokens, float32 `[records]`."""
    total = torch.zeros(records, device=values.device).index_add(0, owner, values.float())
    return total / torch.bincount(owner, minlength=records)


def losses_by_record(predicted: SecretLogits, records: int) -> Tensor:
    """Mean nats per secret token of each record, float32 `[records]`."""
    logits, targets, owner = predicted
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return mean_by_owner(losses, owner, records)


def secret_losses(model: Any, records: Sequence[EncodedRecord]) -> Tensor:
    """The same of a batch of records, from a forward pass of their own."""
    return losses_by_record(secret_logits(model, records), len(records))


def window_losses(model: Any, windows: Tensor) -> Tensor:
    """Mean nats per token of each window `[count, length]`, float32 `[count]`.

    A window's first token has nothing before it and is not scored: length - 1 tokens are.
    """
    windows = windows.to(model.device)
    head = model.get_output_embeddings()
    hidden = hidden_states(model, windows)[:, :-1].flatten(0, 1)  # [count * (length - 1), hidden]
    targets = windows[:, 1:].flatten()
    step = positions_at_once(len(targets), head.out_features)
    losses = [
        F.cross_entropy(head(states).float(), wanted, reduction="none")
        for states, wanted in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(losses).view(windows.shape[0], -1).mean(1)


def positions_at_once(positions: int, vocabulary: int) -> int:
    """How many of the positions have their logits taken together."""
    return max(1, min(positions, LOGITS_AT_ONCE // vocabulary))
