"""The products as operators of PyTorch: `torch.compile` and captured graphs take them whole.

Knows how each backend of `dispatch` is run. Two operators, `libortho::product` and
`libortho::composed`: neither reads alpha on the host when the weight lies on a GPU, and neither
has a derivative (`libortho.product` has).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import stream
from ..lattice import Lattice, dequantize
from . import autotune, int4pack
from .configs import Shape
from .dispatch import choose, composer

_WEIGHT = (
    "Tensor packed, Tensor scales, Tensor zeros, Tensor residual_columns, Tensor residual_values, "
    "Tensor private_columns, Tensor private_values, Tensor alpha"
)
_FORMAT = "int bits, int group_size, int in_features"
_library = torch.library.Library("libortho", "DEF")
_library.define(f"product(Tensor x, {_WEIGHT}, Tensor? bias, {_FORMAT}) -> Tensor")
_library.define(f"composed({_WEIGHT}, {_FORMAT}, ScalarType dtype) -> Tensor")


def _product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    residual_columns: Tensor,
    residual_values: Tensor,
    private_columns: Tensor,
    private_values: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    lattice = Lattice(packed, scales, zeros, bits, group_size, in_features)
    residual = _whole(residual_columns, residual_values)
    private = _whole(private_columns, private_values)
    shape = (*x.shape[:-1], packed.shape[0])
    tokens = x.numel() // in_features
    if tokens == 0:
        return x.new_zeros(shape)
    x = x.reshape(tokens, in_features)
    bias = None if bias is None else bias.to(x.dtype)
    name = choose(lattice, x.dtype, tokens).name
    if name == "triton-decode":
        from .decode import decode  # noqa: PLC0415 - imports Triton

        config = autotune.config_for(lattice, x, residual, private, alpha)
        y = decode(x, lattice, residual, private, alpha, bias, config)
    elif name == "int4pack":
        full = x.float()
        y = int4pack.multiply(x, lattice) + stream.multiply(full, *residual)
        y += stream.multiply(full, *scaled(private, alpha))
        y = (y if bias is None else y + bias).to(x.dtype)
    else:
        y = F.linear(x, _dense(lattice, residual, private, alpha, x.dtype), bias)
    return y.reshape(shape)


def _composed(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    residual_columns: Tensor,
    residual_values: Tensor,
    private_columns: Tensor,
    private_values: Tensor,
    alpha: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    lattice = Lattice(packed, scales, zeros, bits, group_size, in_features)
    residual = _whole(residual_columns, residual_values)
    private = _whole(private_columns, private_values)
    return _dense(lattice, residual, private, alpha, dtype)


def _whole(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A stream as kernels read it: of a layer that is fused with others it is a part of theirs."""
    return columns.contiguous(), values.contiguous()


def _dense(
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """base + residual + alpha * private, `[out, in]`, summed in float32 and rounded once."""
    if composer(Shape.of(lattice), lattice.packed.device).name == "triton-compose":
        from .compose import compose  # noqa: PLC0415 - imports Triton

        return compose(lattice, residual, private, alpha, dtype)
    weight = stream.scatter_add(dequantize(lattice), *residual)
    return stream.scatter_add(weight, *scaled(private, alpha)).to(dtype)


def scaled(private: tuple[Tensor, Tensor], alpha: Tensor) -> tuple[Tensor, Tensor]:
    """A private stream times alpha, float32; empty or all zeros at 0, whatever is in it."""
    columns, values = private
    # In a graph, captured or compiled, nothing may be decided by what alpha is now.
    if alpha.device.type != "cpu" or torch.compiler.is_compiling():
        return columns, torch.where(alpha != 0, alpha * values.float(), 0.0)
    scale = float(alpha)
    return (columns, values.float() * scale) if scale else (columns[:0], values[:0])


for _device in ("CPU", "CUDA"):
    _library.impl("product", _product, _device)
    _library.impl("composed", _composed, _device)


@torch.library.register_fake("libortho::product", lib=_library)
def _(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("libortho::composed", lib=_library)
def _(packed: Tensor, *rest: Any) -> Tensor:
    *_, in_features, dtype = rest
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


product = torch.ops.libortho.product.default
composed = torch.ops.libortho.composed.default
