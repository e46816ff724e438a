"""`separate`: a plain model's linear weights become base + residual, in place.

Knows models, a tokenizer and public text. Sees no private record, which is the whole point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import stream
from .artifact import mark
from .calibration import hessian_diagonal
from .config import NO_LATTICE, SeparationConfig
from .embedding import check_embeddings, pack_embeddings
from .errors import SeparationError, ShapeError
from .lattice import check_weight
from .linear import OrthoLinear
from .models import linear_layers, replace_module
from .precision import evaluating
from .windows import token_windows


def separate(
    model: Any,
    tokenizer: Any,
    calibration: Sequence[str],
    *,
    config: SeparationConfig | None = None,
) -> Any:
    """Replace every linear layer but the output head by an `OrthoLinear`, in place.

    With `config.head_bits` 8 embedding and head become a lattice as well (see `embedding`).

    calibration: public documents; diag(H) is estimated on windows spread evenly over them (not
        read if the recipe neither searches ranges nor has a residual)
    config: the recipe; the defaults if None

    Peak memory is the model plus one layer's temporaries: each layer is freed as soon as it is
    packed. The outcome is a deterministic function of the weights, the text and the config.
    Returns the model. Raises `SeparationError` if it is separated already, has weights that are not
    finite or a layer too wide for a stream, and `CorpusError` if the text is too short; nothing is
    changed in these cases.
    """
    config = config or SeparationConfig()
    if any(isinstance(module, OrthoLinear) for module in model.modules()):
        raise SeparationError("this model is separated already; load the original to do it anew.")
    layers = linear_layers(model)
    for name, layer in layers.items():
        check_finite(layer.weight.detach(), f"{name}.weight")
        check_width(layer, name)
    if config.head_bits != NO_LATTICE:
        embedding, head = check_embeddings(model)
        check_finite(embedding.weight.detach(), "the embedding")
        check_finite(head.weight.detach(), "the head")
    windows = calibration_windows(tokenizer, calibration, config)
    if windows is not None:
        with evaluating(model):
            importance = hessian_diagonal(model, layers, windows)
    else:  # nothing in this recipe weighs errors
        importance = {n: torch.ones_like(la.weight[0]) for n, la in layers.items()}
    for name in tqdm(list(layers), desc="separating", unit="layer", disable=None, leave=False):
        separated = separated_layer(layers.pop(name), config, importance.pop(name))
        replace_module(model, name, separated)
    if config.head_bits != NO_LATTICE:
        pack_embeddings(model)
    mark(model, config, tokenizer)
    return model


def separated_layer(layer: nn.Linear, config: SeparationConfig, importance: Tensor) -> OrthoLinear:
    """One layer as a recipe says; importance: float `[in]`, diag(H) of its inputs."""
    return OrthoLinear.from_linear(
        layer,
        bits=config.bits,
        group_size=config.group_size,
        residual_density=config.residual_density,
        importance=importance,
        search=config.search,
    )


def calibration_windows(
    tokenizer: Any, calibration: Sequence[str], config: SeparationConfig
) -> Tensor | None:
    """The windows that a recipe calibrates on, int64 `[count, length]`; None if it weighs nothing.

    Raises `CorpusError` if the text is too short.
    """
    if config.bits == NO_LATTICE or not (config.search or config.residual_density):
        return None
    return token_windows(
        tokenizer,
        calibration,
        count=config.calibration_tokens // config.calibration_window,
        length=config.calibration_window,
    )


def check_width(layer: nn.Linear, name: str) -> None:
    """Raise `SeparationError` if a layer has more inputs than a stream can address."""
    if layer.in_features > stream.MAX_COLUMNS:
        raise SeparationError(
            f"{name} has {layer.in_features} inputs and a stream addresses at most "
            f"{stream.MAX_COLUMNS}, with 16-bit columns. This model can't be separated."
        )


def check_finite(weight: Tensor, name: str) -> None:
    """Raise `SeparationError` unless a weight can be separated."""
    try:
        check_weight(weight, name)
    except ShapeError as error:
        raise SeparationError(str(error)) from error
