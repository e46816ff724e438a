"""Real generation in batches: prompts of different lengths, and no settings but one's own.

Knows transformers models and token ids, not records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

HORIZON = 16
"""Tokens of a secret, from its first on, that are really generated. What is longer counts as hit
once these are: that is easier than the whole, and takes a quarter of the time of a passage."""


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 `[prompts, longest]`, so that all prompts end together.

    Padding goes before a prompt, because a model continues the last position.
    """
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def pad_id_of(tokenizer: Any) -> int:
    """The padding token's id, or the end token's; 0 where there is neither."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Drop a model's own defaults (top-k, penalties, a low temperature) while a block runs.

    `generate` fills whatever a call leaves unset from the model's `generation_config`.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@torch.inference_mode()
def continuations(
    model: Any, prompts: Sequence[Sequence[int]], *, pad_id: int, **options: Any
) -> tuple[Tensor, Any]:
    """New token ids `[sequences, new tokens]` after left-padded prompts, and `generate`'s output.

    options: fields of `GenerationConfig`, and `logits_processor`
    """
    ids, mask = left_padded(prompts, pad_id)
    processor = options.pop("logits_processor", None)
    config = GenerationConfig(pad_token_id=pad_id, return_dict_in_generate=True, **options)
    with neutral_generation(model):
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processor,
        )
    return out.sequences[:, ids.shape[1] :], out
