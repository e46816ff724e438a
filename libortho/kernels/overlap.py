"""A launch before the one ahead of it has ended: programmatic dependent launch, in captured steps.

A step is hundreds of short launches in a row, and between two of them a card idles: the last
programs of one end, the first of the next begin, and only then is anything read. From compute
capability 9.0 on a kernel may begin while the one ahead still runs, read what nobody writes
(weights), and wait before it touches anything else. While `overlapped` is open, that is how this
package's kernels are launched.

Every kernel so launched calls `wait` before it reads what an earlier one wrote, and before it
writes: then all earlier ones have ended, since each of them waited for its own. Only for work that
is being captured, where nothing writes to weights: outside of it an optimiser may have, one launch
ago.

Knows Triton; imports on a machine without CUDA, for the interpreter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are Triton's, and typed by it.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

OVERLAPPED: dict[str, Any] = {"OVERLAP": True, "launch_pdl": True}
"""Arguments of a launch that overlaps: the kernel's own, and the launcher's flag."""
_LEAST_CAPABILITY = (9, 0)
_open = False


@triton.jit
def let_go(OVERLAP: tl.constexpr):
    """The next kernel may begin, once every program of this one came here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Go on once all earlier kernels have ended, and what they wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def why_not(device: torch.device) -> str | None:
    """Why launches on a device can't overlap, or None if they can."""
    if device.type != "cuda":
        return f"there are no launches on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 9.0"
    return None


@contextmanager
def overlapped(device: torch.device) -> Iterator[None]:
    """Run a block whose launches overlap, where the device can do it."""
    global _open  # noqa: PLW0603 - launches are made deep below
    before, _open = _open, why_not(device) is None
    try:
        yield
    finally:
        _open = before


def options() -> dict[str, Any]:
    """Arguments of a launch made now."""
    return OVERLAPPED if _open else {"OVERLAP": False}
