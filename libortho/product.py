"""How an `OrthoLinear` multiplies: by a held weight, a kernel or a composed weight; gradients.

Knows one layer's tensors and the operators of `kernels`. Doesn't know how the layer came to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import stream
from .config import NO_LATTICE
from .kernels import dispatch, op
from .lattice import Lattice
from .precision import dtype_name

if TYPE_CHECKING:
    from .linear import OrthoLinear

SPARSE_TOKENS = 16
"""Up to this many tokens a stream on unquantised weights is gathered; beyond, it is added."""


class Backend(NamedTuple):
    """What multiplies by a layer's weight, and why; `kernels.dispatch.Backend` names the rest.

    held: the composed weight is in memory; torch: unquantised weights, by PyTorch's operators
    """

    name: str
    reason: str


def backend_of(layer: OrthoLinear, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """What a call of a layer with `tokens` inputs of `dtype` is computed by, and why.

    On a CPU it may time candidates, once for a shape.
    """
    if layer.held_dtype == dtype:
        return Backend("held", f"the composed weight is held in memory in {dtype_name(dtype)}")
    if layer.bits == NO_LATTICE:
        return Backend("torch", "the base is not quantised")
    return Backend(*dispatch.choose(lattice_of(layer), dtype, tokens))


def product(layer: OrthoLinear, x: Tensor) -> Tensor:
    """`x` of shape `[..., in]` to `[..., out]`, in the dtype of `x`."""
    held = layer.held_dtype == x.dtype
    observed = layer._observer is not None
    if torch.is_grad_enabled() and (observed or (x.requires_grad and not held)):
        return _Product.apply(x, layer._anchor, layer)
    if held:
        return F.linear(x, layer.composed(x.dtype), _bias(layer, x.dtype))
    if layer.bits == NO_LATTICE:
        return _unquantised(layer, x)
    return op.product(x, *_weight(layer), layer.bias, *_format(layer))


def product_plus(layer: OrthoLinear, x: Tensor, addend: Tensor) -> Tensor | None:
    """`addend + product(layer, x)` in one launch; None where that takes more.

    x: one row, `[..., in]`; addend: `[..., out]`, in the dtype of `x`. Rounded once, as the sum of
    two rounded tensors is not.
    """
    one_row = x.numel() == layer.in_features and addend.numel() == layer.out_features
    one_row = one_row and addend.dtype == x.dtype  # what comes out is of that dtype as well
    plain = layer.bias is None and layer._observer is None and layer.siblings is None
    wanted = torch.is_grad_enabled() and x.requires_grad
    if not one_row or not plain or wanted or layer.held_dtype is not None:
        return None
    if layer.bits == NO_LATTICE or backend_of(layer, 1, x.dtype).name != "triton-decode":
        return None
    # With one token the kernel's bias is as good a place as any for what is added.
    y = op.product(x, *_weight(layer), addend.reshape(-1), *_format(layer))
    return y.reshape(addend.shape)


def composed(layer: OrthoLinear, dtype: torch.dtype, *, private: bool = True) -> Tensor:
    """base + residual, and alpha * private if asked: `[out, in]`, summed in float32."""
    if layer.bits != NO_LATTICE:
        *public, columns, values, alpha = _weight(layer)
        if not private:
            columns, values = columns[:0], values[:0]
        return op.composed(*public, columns, values, alpha, *_format(layer), dtype)
    if not private or not layer.private_columns.shape[0]:
        return layer.weight.to(dtype)
    weight = layer.weight.to(torch.float32, copy=True)
    return stream.scatter_add(weight, *scaled_private(layer)).to(dtype)


def lattice_of(layer: OrthoLinear) -> Lattice:
    """A layer's packed base."""
    return Lattice(
        layer.packed, layer.scales, layer.zeros, layer.bits, layer.group_size, layer.in_features
    )


def scaled_private(layer: OrthoLinear) -> tuple[Tensor, Tensor]:
    """A layer's private stream times alpha."""
    return op.scaled((layer.private_columns, layer.private_values), layer.alpha)


def _unquantised(layer: OrthoLinear, x: Tensor) -> Tensor:
    bias = _bias(layer, x.dtype)
    if x.numel() > SPARSE_TOKENS * layer.in_features:
        return F.linear(x, composed(layer, x.dtype), bias)
    y = F.linear(x, layer.weight.to(x.dtype), bias)
    columns, values = scaled_private(layer)
    return y + stream.multiply(x, columns, values) if columns.shape[0] else y


def _bias(layer: OrthoLinear, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _weight(layer: OrthoLinear) -> tuple[Tensor, ...]:
    return (
        layer.packed,
        layer.scales,
        layer.zeros,
        layer.residual_columns,
        layer.residual_values,
        layer.private_columns,
        layer.private_values.detach(),
        layer.alpha,
    )


def _format(layer: OrthoLinear) -> tuple[int, int, int]:
    return layer.bits, layer.group_size, layer.in_features


class _Product(torch.autograd.Function):
    """A product whose backward composes the weight again, so that no dense one outlives a call.

    The weight's own gradient, if the layer has an observer, is shown to it and then dropped: it
    exists for the length of one call, whatever the observer keeps of it, and none is accumulated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, layer: OrthoLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, layer.composed(x.dtype), _bias(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,), (x,), layer = grads, ctx.saved_tensors, ctx.layer
        if layer._observer is not None:
            layer._observer(grad.flatten(0, -2).t() @ x.flatten(0, -2))  # [out, in]
        return grad @ layer.composed(grad.dtype) if ctx.needs_input_grad[0] else None, None, None
