"""A batch that halves itself where memory runs out.

Knows a function of a batch size and nothing of what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import find_executable_batch_size

from .errors import HardwareError

T = TypeVar("T")


def halving(run: Callable[[int], T], batch_size: int) -> T:
    """`run(batch_size)`, again with half of it after each out-of-memory error.

    Without a rule of its own `find_executable_batch_size` takes a tenth off, and then tries a
    dozen sizes that fail where three would do.

    Raises:
        HardwareError: not even one item fits. Whatever else `run` raises comes at once.
    """
    size = batch_size

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    search = find_executable_batch_size(
        run, starting_batch_size=batch_size, reduce_batch_size_fn=halve
    )
    try:
        result: T = search()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise HardwareError(
            "not even one sequence fits in the memory that is free. Choose fewer bits or a smaller "
            "model, close what else uses the memory, or run on the CPU."
        ) from error
    return result
