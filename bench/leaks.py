"""Off states that are known to be bad, made from a real one: what an audit must never let pass.

Each is a loader in place of the method's own. They know separated models, and nothing of audits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from libortho.methods import TwoStates
from libortho.switch import ortho_layers

Spoil = Callable[[Any, torch.Generator], None]


def stream_left_in(share: float) -> Spoil:
    """A share of the private stream's entries, chosen by chance, is not switched off."""

    def spoil(model: Any, generator: torch.Generator) -> None:
        for layer in ortho_layers(model).values():
            values = layer.private_values
            kept = torch.rand(values.shape, generator=generator).to(values.device) < share
            layer.set_private(layer.private_columns, values * kept)

    return spoil


def noise(model: Any, generator: torch.Generator) -> None:
    """The off state is broken: its last norm is scrambled, and it predicts next to nothing."""
    for layer in ortho_layers(model).values():
        columns = layer.private_columns[:0]
        layer.set_private(columns, layer.private_values[:0])
    weight = model.base_model.norm.weight
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    weight.data = weight.data[order] * torch.where(order % 2 == 0, 1.0, -1.0).to(weight.dtype)


LEAKS: dict[str, Spoil] = {
    "1 % of the stream left in": stream_left_in(0.01),
    "5 % of the stream left in": stream_left_in(0.05),
    "25 % of the stream left in": stream_left_in(0.25),
    "an off state that emits noise": noise,
}


def spoiled(states: TwoStates, spoil: Spoil, seed: int = 0) -> Callable[[], Any]:
    """A loader of the method's on state, spoiled, in the place of its off state."""

    def load() -> Any:
        model = states.on_loader()
        spoil(model, torch.Generator().manual_seed(seed))
        return model

    return load
