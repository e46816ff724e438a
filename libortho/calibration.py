"""diag(H): how much each input column of each linear layer matters, from public text.

Knows models and token windows; makes one vector a layer and keeps no activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import SeparationError


@torch.inference_mode()
def hessian_diagonal(
    model: Any, layers: Mapping[str, nn.Linear], windows: Tensor
) -> dict[str, Tensor]:
    """E[x**2] of every layer's input, float32 `[in]`, over `windows` `[count, length]`.

    For the squared error of a linear layer's output, H = 2 E[x x^T] (Hassibi and Stork 1993;
    Frantar et al. 2022, GPTQ); its diagonal, up to the factor, is all that a range search with
    independent errors needs. Sums are kept in float64, in the order of the windows.
    """
    with listening(layers) as sums:
        for window in tqdm(windows, desc="calibrating", unit="window", disable=None, leave=False):
            # The output head is not needed: only the body is run.
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    return diagonal_of(sums, windows.numel())


@contextmanager
def listening(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Add up the squares of what layers are given inside the block, float64 `[in]` each."""
    sums = {
        name: torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def listen(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] += x.square().sum(0, dtype=torch.float64)

        return hook

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def diagonal_of(sums: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The sums as means, float32; raises `SeparationError` for ones that are not finite."""
    diagonal = {name: (total / tokens).float() for name, total in sums.items()}
    for name, values in diagonal.items():
        if not bool(torch.isfinite(values).all()):
            raise SeparationError(
                f"calibration met NaN or infinite activations at {name}. Either the checkpoint is "
                "damaged or its weights overflow in this precision: load it in float32."
            )
        # A column that no public text excites still has weights: give it the smallest say.
        values.clamp_(min=float(values.mean()) * 1e-6)
    return diagonal
