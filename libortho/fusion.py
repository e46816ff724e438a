"""Layers that are given the same inputs, multiplied in one launch: q, k and v; gate and up.

Knows separated layers and which of a model's share their inputs. Their weights are laid out one
after the other along the output rows, and each layer's own tensors become views of that: nothing
is held twice, and what is saved is what was there before. Groups of the lattice lie along the
input and a stream's entries belong to a row, so every row is what it was. Streams, those of layers
by themselves as well, are laid out in pairs (`stream.paired`).

Doesn't know what multiplies (`kernels`). Only decoding is fused: for many tokens a dense weight is
composed, and one layer's is large enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import stream
from .config import NO_LATTICE
from .kernels import op
from .kernels.configs import MAX_TOKENS
from .linear import LAID_TOGETHER, OrthoLinear
from .switch import ortho_layers

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, within a block's module, of layers that are given the same inputs: those of Llama,
Mistral, Qwen, Gemma, Phi and SmolLM in transformers."""
_BY_ROW = LAID_TOGETHER[:3]
_STREAMS = LAID_TOGETHER[3:]


class Siblings:
    """Layers whose weights lie one after the other along the output rows.

    The first that is called multiplies for all, and the others take their part if they are given
    the very same tensor. Calls that don't fit (many tokens, gradients, a held weight) are left to
    each layer by itself.
    """

    def __init__(self, parts: Sequence[OrthoLinear]) -> None:
        first = parts[0]
        self.parts = tuple(parts)
        self.rows = [part.out_features for part in parts]
        self.format = first.bits, first.group_size, first.in_features
        self.alpha, self.bias = first.alpha, _joined_bias(parts)
        self.weight: dict[str, Tensor] = {}
        for names in (*((name,) for name in _BY_ROW), _STREAMS[:2], _STREAMS[2:]):
            dim = 0 if len(names) == 1 else 1
            wholes = [torch.cat([getattr(part, n).detach() for part in parts], dim) for n in names]
            if len(names) > 1:
                wholes = list(stream.paired(*wholes))
            for name, whole in zip(names, wholes, strict=True):
                for part, view in zip(parts, whole.split(self.rows, dim), strict=True):
                    setattr(part, name, view)
                self.weight[name] = whole
        # What was multiplied last, until all have taken their parts of it.
        self._given: Tensor | None = None
        self._version: int | None = None
        self._ready: list[Tensor | None] = []
        self._forget()
        for part in parts:
            part.siblings = self

    def take(self, part: OrthoLinear, x: Tensor) -> Tensor | None:
        """`part`'s product with `x` `[..., in]`; None if it has to be made by itself."""
        index = self.parts.index(part)
        made = self._ready[index] if self._given is x and self._version == _version(x) else None
        if made is None:
            self._forget()
            if not self._fits(x):
                return None
            self._given, self._version = x, _version(x)
            self._ready = list(self._multiplied(x).split(self.rows, -1))
            made = self._ready[index]
        self._ready[index] = None
        if all(ready is None for ready in self._ready):
            self._forget()
        return made

    def _forget(self) -> None:
        self._given, self._version = None, None
        self._ready = [None] * len(self.parts)

    def _fits(self, x: Tensor) -> bool:
        tuned = torch.is_grad_enabled() and x.requires_grad
        few = x.numel() <= MAX_TOKENS * self.format[-1]
        return (
            few
            and not tuned
            and all(part._observer is None and part.held_dtype is None for part in self.parts)
        )

    def _multiplied(self, x: Tensor) -> Tensor:
        return op.product(x, *self.weight.values(), self.alpha, self.bias, *self.format)

    def part_ways(self) -> None:
        """End it: each layer multiplies by itself again, with the views that it has."""
        for part in self.parts:
            part.siblings = None

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copied layer is by itself."""


def fuse_projections(model: nn.Module) -> int:
    """Let layers that are given the same inputs be multiplied together; returns how many groups.

    In place, and for inference: the outputs are the same, and so is what is saved. Layers of
    different formats, with other numbers of entries a row, or unquantised, stay as they are. Once
    a tensor of a group is replaced (by tuning, or a move to another device) or the model is copied,
    its layers multiply by themselves again. Raises `SeparationError` if there is no separated
    layer.
    """
    on_card = next(iter(ortho_layers(model).values())).alpha.device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()  # what a load left over; the largest group needs room once more
    count = 0
    for module in model.modules():
        for names in TOGETHER:
            parts = [getattr(module, name, None) for name in names]
            layers = [part for part in parts if isinstance(part, OrthoLinear)]
            if len(layers) == len(names) and _alike(layers):
                Siblings(layers)
                count += 1
                if on_card:
                    torch.cuda.empty_cache()  # the next group doesn't fit where this one's were
    for layer in ortho_layers(model).values():
        if layer.siblings is None:
            _pair(layer)
    return count


def unfuse_projections(model: nn.Module) -> None:
    """Undo `fuse_projections`: every layer has tensors of its own again."""
    for module in model.modules():
        if isinstance(module, OrthoLinear):
            if module.siblings is not None:
                module.siblings.part_ways()
            for name in LAID_TOGETHER:
                tensor = getattr(module, name, None)  # unquantised layers have streams alone
                if tensor is not None and _is_part(tensor):
                    own = tensor.clone(memory_format=torch.contiguous_format)
                    setattr(module, name, own)


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that others have parts of."""
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def _pair(layer: OrthoLinear) -> None:
    for names in (_STREAMS[:2], _STREAMS[2:]):
        before = [getattr(layer, name) for name in names]
        after = stream.paired(*before)
        if after[1] is not before[1]:  # masters in tuning stay the very tensors that they are
            for name, tensor in zip(names, after, strict=True):
                setattr(layer, name, tensor)


def _alike(layers: Sequence[OrthoLinear]) -> bool:
    kinds = {
        (
            *(layer.bits, layer.group_size, layer.in_features, layer.alpha.device),
            *(getattr(layer, name).shape[0] for name in _STREAMS),
            *(getattr(layer, name).dtype for name in _STREAMS),
            layer.bias is None,
        )
        for layer in layers
    }
    alone = all(layer.siblings is None and layer.held_dtype is None for layer in layers)
    one_alpha = len({layer.get_alpha() for layer in layers}) == 1
    return len(kinds) == 1 and layers[0].bits != NO_LATTICE and alone and one_alpha


def _joined_bias(parts: Sequence[OrthoLinear]) -> Tensor | None:
    given = [part.bias for part in parts if part.bias is not None]
    return torch.cat(given) if given else None


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
