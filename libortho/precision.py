"""Run a model in another floating-point type for a while, and give it back bit for bit.

Knows torch modules only. Parameters are converted; buffers are not, because the ones that
matter (rotary frequencies, the streams) lose positions or records when they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Hold all floating-point parameters in `dtype` inside the block; the originals come back."""
    originals = [
        (p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype
    ]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        yield model
    finally:
        for parameter, data in originals:
            parameter.data = data


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
