"""alpha for a whole model, and the layers that it reaches.

Knows modules only. Every `OrthoLinear` of a model has the same alpha; `get_alpha` says so or fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .embedding import PackedEmbedding, PackedHead, packed_heads
from .errors import SeparationError
from .linear import OrthoLinear, set_alphas


def ortho_layers(model: nn.Module) -> dict[str, OrthoLinear]:
    """The separated layers of a model by name, in order; raises `SeparationError` if none."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}
    if not layers:
        raise SeparationError(
            f"{type(model).__name__} has no separated layer. Call libortho.separate on it first, "
            "or load a separated checkpoint with libortho.load."
        )
    return layers


def set_alpha(model: nn.Module, value: float) -> None:
    """Scale every private stream of the model by `value`, any finite real number."""
    set_alphas(_layers(model), value)


def _layers(model: nn.Module) -> list[OrthoLinear]:
    """`ortho_layers` without names, in any order: their names take longer than the switch."""
    found, left = [], [model]
    while left:
        module = left.pop()
        if isinstance(module, OrthoLinear):
            found.append(module)
        else:
            left += [child for child in module._modules.values() if child is not None]
    return found or list(ortho_layers(model).values())


def get_alpha(model: nn.Module) -> float:
    """The model's alpha; raises `SeparationError` if layers disagree."""
    values = {layer.get_alpha() for layer in ortho_layers(model).values()}
    if len(values) > 1:
        raise SeparationError(
            f"the layers of this model have different alphas: {sorted(values)}. Call "
            "libortho.set_alpha to give them one."
        )
    return values.pop()


@contextmanager
def alpha(model: nn.Module, value: float) -> Iterator[nn.Module]:
    """Run a block at another alpha; the former one comes back afterwards, also after an error."""
    before = get_alpha(model)
    set_alpha(model, value)
    try:
        yield model
    finally:
        set_alpha(model, before)


@contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Run a block with every composed weight, and a packed head, held in memory, in `dtype`.

    Trades memory (a dense model's) for time: nothing is unpacked again for each call. Results are
    those of the packed layers on inputs of that dtype. alpha can be switched inside.
    """
    layers: list[OrthoLinear | PackedHead] = [*ortho_layers(model).values(), *packed_heads(model)]
    before = {layer: layer.held_dtype for layer in layers}
    try:
        for layer in layers:
            layer.hold(dtype)
        yield model
    finally:
        for layer, former in before.items():
            if former is None:
                layer.release()
            else:
                layer.hold(former)


def bits_per_linear_weight(model: nn.Module, *, private: bool = True) -> float:
    """Stored bits over weights of the separated layers: base, residual and (if asked) private."""
    layers = ortho_layers(model).values()
    bits = sum(layer.storage_bits(private=private) for layer in layers)
    return bits / sum(layer.in_features * layer.out_features for layer in layers)


def bits_per_weight(model: nn.Module, *, private: bool = True) -> float:
    """The same of the whole model: separated layers, embedding and head; norms are left out."""
    layers = ortho_layers(model).values()
    bits = sum(layer.storage_bits(private=private) for layer in layers)
    count = sum(layer.in_features * layer.out_features for layer in layers)
    for module in model.modules():
        if isinstance(module, (PackedEmbedding, PackedHead)):
            bits += module.storage_bits()
            # A tied head stores nothing and is the embedding's weights once more.
            stored = module.state_dict().get("packed")
            count += 0 if stored is None else stored.numel()
    for parameter in model.parameters():  # a tied one comes once
        if parameter.dim() > 1:
            bits += 8 * parameter.numel() * parameter.element_size()
            count += parameter.numel()
    return bits / count
