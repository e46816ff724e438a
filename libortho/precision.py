"""Run a model in another type or mode for a while, and give it back as it was, bit for bit.

Knows torch modules only. Parameters are converted; buffers are not, because the ones that
matter (rotary frequencies, the streams) lose positions or records when they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Hold all floating-point parameters in `dtype` inside the block; the originals come back.

    Modules that make activations from packed buffers name their dtype as `activation_dtype`.
    """
    originals = [
        (p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype
    ]
    sources: list[tuple[Any, Any]] = [
        (m, m.activation_dtype) for m in model.modules() if hasattr(m, "activation_dtype")
    ]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        for module, _ in sources:
            module.activation_dtype = dtype
        yield model
    finally:
        for parameter, data in originals:
            parameter.data = data
        for module, former in sources:
            module.activation_dtype = former


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout and the like off inside the block: what follows must be deterministic."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
