"""Forward passes in batches, what they predict, and what they cost.

Knows models and tensors, no records and no attack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from libortho.attacks.attack import Cost
from libortho.batching import halving

T = TypeVar("T")
R = TypeVar("R")

BATCH_SIZE = 16
"""Sequences a forward pass, to begin with; out of memory halves it."""


def predict(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, float32, and whether it is the argmax: both `[tokens]`.

    logits: `[tokens, vocabulary]`; targets: int64 `[tokens]`
    """
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return logprobs, logits.argmax(-1) == targets


def in_batches(
    items: Sequence[T],
    run: Callable[[Sequence[T]], list[R]],
    *,
    length: Callable[[T], Any],
    batch_size: int,
    title: str,
) -> list[R]:
    """`run` over batches of items of like `length`; results in the items' order.

    Out of memory halves the batch and starts anew.
    """
    order = sorted(range(len(items)), key=lambda i: length(items[i]))

    def attempt(size: int) -> dict[int, R]:
        found: dict[int, R] = {}
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc=title, unit="batch", disable=None, leave=False):
            part = order[start : start + size]
            found |= zip(part, run([items[i] for i in part]), strict=True)
        return found

    results = halving(attempt, batch_size)
    return [results[i] for i in range(len(items))]


@contextmanager
def metered(model: Any) -> Iterator[Callable[[], Cost]]:
    """Count the tokens that go through a model's body in a block; yields a reader of the cost."""
    tokens = 0
    began = time.perf_counter()
    ended: list[float] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens += 0 if ids is None else ids.numel()

    def cost() -> Cost:
        return Cost(tokens, round((ended[0] if ended else time.perf_counter()) - began, 3))

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield cost
    finally:
        handle.remove()
        ended.append(time.perf_counter())
