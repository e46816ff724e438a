"""A model for a while with plain linear layers of whatever weights, and then as it was.

Whoever holds an artefact can unpack it: into floating-point weights that can be quantised anew or
fine-tuned. Knows separated, plain and bitsandbytes layers, and no records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from libortho.errors import SeparationError
from libortho.linear import OrthoLinear
from libortho.models import replace_module
from libortho.peers import unpacked

_ADAPTER = "lora_"
"""In the names of peft's trained matrices: switched off, and no part of what is handed out."""


def public_weight(layer: Any) -> Tensor:
    """The weight that a linear layer multiplies with now, float32 `[out, in]`, a copy.

    Of a separated layer that is base + residual + alpha * private at its present alpha.
    """
    if isinstance(layer, OrthoLinear):
        return layer.effective_weight().clone()
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        weight = unpacked(weight)
    elif type(weight) is not nn.Parameter:
        # Takes more than a second, for layers that few models have.
        from transformers.integrations.bitsandbytes import (  # noqa: PLC0415
            dequantize_bnb_weight,
        )

        weight = dequantize_bnb_weight(weight, getattr(layer, "state", None))
    return weight.detach().to(torch.float32, copy=True)


@contextmanager
def plain_linears(
    model: Any, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[str, nn.Linear]]:
    """Replace every linear layer but the head by a plain one; the originals come back afterwards.

    dtype: of the weights in the block
    change: what becomes of each weight, float32 `[out, in]`; nothing if None

    Yields the plain layers by name. Raises `SeparationError` if the model has none.
    """
    head = model.get_output_embeddings()
    originals = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (OrthoLinear, nn.Linear))
        and module is not head
        and _ADAPTER not in name
    }
    if not originals:
        raise SeparationError(
            f"{type(model).__name__} has no linear layer besides its head, so its weights can't be "
            "unpacked. Leave re-quantisation and relearning out for this model."
        )
    plain: dict[str, nn.Linear] = {}
    try:
        for name, module in originals.items():
            weight = public_weight(module)
            weight = (change(weight) if change else weight).to(dtype)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            bias = module.bias
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
            plain[name] = layer
            replace_module(model, name, layer)
        yield plain
    finally:
        for name, module in originals.items():
            replace_module(model, name, module)
