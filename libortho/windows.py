"""Text into windows of tokens.

Knows a tokenizer and public documents; every consumer of running text (calibration, replay,
perplexity) cuts it here, so that they agree on what a window is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import CorpusError

SEPARATOR = "\n\n"


def tokenize(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """All documents as one run of token ids, int64 `[tokens]`, without special tokens."""
    text = SEPARATOR.join(documents)
    # A whole corpus is longer than the context on purpose; `verbose` silences the warning on it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def token_windows(
    tokenizer: Any, documents: Iterable[str], *, count: int, length: int, fewer: bool = False
) -> Tensor:
    """`count` windows of `length` tokens, int64 `[count, length]`, spread evenly over the text.

    Windows never overlap. Raises `CorpusError` if the text is too short for that many, or, with
    `fewer`, for a single one.
    """
    ids = tokenize(tokenizer, documents)
    available = len(ids) // length
    if fewer and available:
        count = min(count, available)
    if available < count:
        raise CorpusError(
            f"the text gives {available} windows of {length} tokens ({len(ids)} tokens in all) and "
            f"{count} are needed. Ask for fewer windows, or use a longer text."
        )
    starts = [i * available // count * length for i in range(count)]
    return torch.stack([ids[s : s + length] for s in starts])
