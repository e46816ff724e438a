"""A batch that halves itself where memory runs out.

Knows a function of a batch size and nothing of what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import find_executable_batch_size

T = TypeVar("T")


def halving(run: Callable[[int], T], batch_size: int) -> T:
    """`run(batch_size)`, again with half of it after each out-of-memory error.

    Without a rule of its own `find_executable_batch_size` takes a tenth off, and then tries a
    dozen sizes that fail where three would do.

    Raises:
        RuntimeError: not even one item fits; and whatever else `run` raises, at once.
    """
    size = batch_size

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    search = find_executable_batch_size(
        run, starting_batch_size=batch_size, reduce_batch_size_fn=halve
    )
    result: T = search()
    return result
