"""Perplexity on windows of public text.

Knows models and token windows; makes numbers, judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batching import halving
from .scoring import window_losses


@dataclass(frozen=True)
class WindowLosses:
    """Mean nats per token of each window, and the batch size that memory allowed."""

    losses: tuple[float, ...]
    batch_size: int

    @property
    def ppl(self) -> float:
        """exp of the mean over windows: all windows have the same number of tokens."""
        return math.exp(sum(self.losses) / len(self.losses))


@torch.inference_mode()
def measure_perplexity(
    model: Any, windows: Tensor, *, batch_size: int = 1, title: str = "perplexity"
) -> WindowLosses:
    """Losses of windows int64 `[count, length]`; out of memory halves the batch."""

    def run(size: int) -> WindowLosses:
        losses: list[float] = []
        batches: Sequence[Tensor] = windows.split(size)
        for batch in tqdm(batches, desc=title, unit="window", disable=None, leave=False):
            losses += window_losses(model, batch).tolist()
        return WindowLosses(tuple(losses), size)

    return halving(run, batch_size)
