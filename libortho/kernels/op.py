"""The products as operators of PyTorch: `torch.compile` and captured graphs take them whole.

Knows how each backend of `dispatch` is run. `libortho::product` and `libortho::composed` are for
weights with streams, and neither reads alpha on the host when the weight lies on a GPU;
`libortho::lattice_product` is for a bare lattice too large ever to be dense. None of them has a
derivative (`libortho.product` and `libortho.embedding` have).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import stream
from ..lattice import Lattice, dequantize
from . import autotune, int4pack
from .configs import Shape
from .dispatch import choose, composer

PART_ELEMENTS = 1 << 24
"""Weights that are dense at once, 32 MiB in 16 bits: Llama 3 8B has no room for more in 6 GB."""

_WEIGHT = (
    "Tensor packed, Tensor scales, Tensor zeros, Tensor residual_columns, Tensor residual_values, "
    "Tensor private_columns, Tensor private_values, Tensor alpha"
)
_FORMAT = "int bits, int group_size, int in_features"
_library = torch.library.Library("libortho", "DEF")
_library.define(f"product(Tensor x, {_WEIGHT}, Tensor? bias, {_FORMAT}) -> Tensor")
_library.define(f"composed({_WEIGHT}, {_FORMAT}, ScalarType dtype) -> Tensor")
_library.define(
    "lattice_product(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, "
    f"{_FORMAT}) -> Tensor"
)


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
    residual = residual_columns, residual_values
    private = private_columns, private_values
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
        y = _by_parts(x, bias, lattice, residual, private, alpha)
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
    residual = residual_columns, residual_values
    return _dense(lattice, residual, (private_columns, private_values), alpha, dtype)


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


def _lattice_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    lattice = Lattice(packed, scales, zeros, bits, group_size, in_features)
    shape = (*x.shape[:-1], packed.shape[0])
    tokens = x.numel() // in_features
    if tokens == 0:
        return x.new_zeros(shape)
    x = x.reshape(tokens, in_features)
    if choose(lattice, x.dtype, tokens).name == "triton-decode":
        from .decode import decode  # noqa: PLC0415 - imports Triton

        nothing = _no_stream(lattice)
        # Any number will do for alpha, which scales nothing.
        config = autotune.config_for(lattice, x, nothing, nothing, scales)
        return decode(x, lattice, nothing, nothing, scales, bias, config).reshape(shape)
    nothing = _no_stream(lattice)
    return _by_parts(x, bias, lattice, nothing, nothing, scales.new_zeros(())).reshape(shape)


def _by_parts(
    x: Tensor,
    bias: Tensor | None,
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
) -> Tensor:
    """The product with dense weights, of which there is never more than a part at once."""
    out_features = lattice.packed.shape[0]
    if out_features * lattice.in_features <= PART_ELEMENTS:
        return F.linear(x, _dense(lattice, residual, private, alpha, x.dtype), bias)
    y = x.new_empty(x.shape[0], out_features)
    for rows, part in row_parts(lattice):
        own_residual, own_private = ((c[:, rows], v[:, rows]) for c, v in (residual, private))
        weight = _dense(part, own_residual, own_private, alpha, x.dtype)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
    return y


def dense_parts(lattice: Lattice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A lattice as dense rows, `[rows, in]` in `dtype`, a part at a time: (which, the rows)."""
    for rows, part in row_parts(lattice):
        nothing = _no_stream(part)
        yield rows, _dense(part, nothing, nothing, part.scales.new_zeros(()), dtype)


def rows_at_once(out_features: int, in_features: int) -> int:
    """Rows of a part: as many in each, if it can be, so that one kernel serves all."""
    most = max(1, PART_ELEMENTS // in_features)
    return -(-out_features // -(-out_features // most))


def row_parts(lattice: Lattice) -> Iterator[tuple[slice, Lattice]]:
    """A lattice in parts along its rows, each of `PART_ELEMENTS` weights at most: (rows, part)."""
    out_features = lattice.packed.shape[0]
    step = rows_at_once(out_features, lattice.in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        yield (
            rows,
            dataclasses.replace(
                lattice,
                packed=lattice.packed[rows],
                scales=lattice.scales[rows],
                zeros=lattice.zeros[rows],
            ),
        )


def _no_stream(lattice: Lattice) -> tuple[Tensor, Tensor]:
    columns = lattice.packed.new_empty(0, lattice.packed.shape[0], dtype=torch.uint16)
    return columns, columns.to(torch.float16)


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
    _library.impl("lattice_product", _lattice_product, _device)


@torch.library.register_fake("libortho::product", lib=_library)
def _(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("libortho::composed", lib=_library)
def _(packed: Tensor, *rest: Any) -> Tensor:
    *_, in_features, dtype = rest
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


@torch.library.register_fake("libortho::lattice_product", lib=_library)
def _(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


product = torch.ops.libortho.product.default
composed = torch.ops.libortho.composed.default
lattice_product = torch.ops.libortho.lattice_product.default
