"""PyTorch's own INT4 product, `torch.ops.aten._weight_int4pack_mm` and its form for CPUs.

Knows what it takes: our lattice's formula at 4 bits, repacked, with bfloat16 scales and inputs. So
its results differ from ours by the rounding of the scales, 2**-9 of a weight at most. The repacked
copy is made at first use and kept for as long as the packed tensor lives.
Doesn't know the streams, nor when it pays (`dispatch`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..lattice import Lattice, unpack
from ..precision import dtype_name
from .configs import Shape

GROUP_SIZES = (32, 64, 128, 256)
_INNER_K_TILES = 8
"""Tiles of 16 columns that a CUDA warp reads together; 8 is what its authors' examples take."""


class Repacked(NamedTuple):
    """A lattice in PyTorch's layout."""

    version: int | None  # of the tensor that was repacked: what is written into it makes a new one
    packed: Tensor
    scales_and_zeros: Tensor  # bfloat16 [groups, out, 2]


_cache = WeakTensorKeyDictionary()  # Lattice.packed -> Repacked


def why_not(shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why PyTorch's product can't take such a lattice with inputs of `dtype`, None if it can."""
    cuda = device.type == "cuda"
    rows, columns = (8, 16 * _INNER_K_TILES) if cuda else (16, 1)
    if shape.bits != 4:
        return f"PyTorch's INT4 product takes 4 bits, not {shape.bits}"
    if dtype != torch.bfloat16:
        return f"PyTorch's INT4 product is fast in bfloat16, not {dtype_name(dtype)}"
    if shape.group_size not in GROUP_SIZES:
        return f"PyTorch's INT4 product takes groups of {GROUP_SIZES}, not {shape.group_size}"
    if shape.in_features % max(shape.group_size, columns) or shape.out_features % rows:
        return (
            f"PyTorch's INT4 product takes whole groups and a multiple of {rows} rows, not "
            f"{shape.out_features} x {shape.in_features}"
        )
    if cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "PyTorch's INT4 product needs compute capability 8.0"
    return None


def multiply(x: Tensor, lattice: Lattice) -> Tensor:
    """`x @ base.T` for `x` bfloat16 `[tokens, in]`, giving bfloat16 `[tokens, out]`.

    `why_not` must be None.
    """
    repacked = _cache.get(lattice.packed)
    if repacked is None or repacked.version != _version(lattice.packed):
        repacked = _cache[lattice.packed] = repack(lattice)
    return multiply_repacked(x, repacked, lattice.group_size)


def multiply_repacked(x: Tensor, repacked: Repacked, group_size: int) -> Tensor:
    """`multiply` by a lattice that is in PyTorch's layout already."""
    product = (
        torch.ops.aten._weight_int4pack_mm
        if x.device.type == "cuda"
        else torch.ops.aten._weight_int4pack_mm_for_cpu
    )
    return product(x.contiguous(), repacked.packed, group_size, repacked.scales_and_zeros)


def repack(lattice: Lattice) -> Repacked:
    """A lattice in PyTorch's layout; `why_not` must be None."""
    packed = lattice.packed
    if packed.device.type == "cuda":
        even_high = (packed << 4) | (packed >> 4)
        repacked = torch.ops.aten._convert_weight_to_int4pack(even_high, _INNER_K_TILES)
    else:
        q = unpack(packed, 4, lattice.in_features).to(torch.int32)
        repacked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    pairs = torch.stack((lattice.scales.t(), lattice.zeros.t()), dim=2)  # [groups, out, 2]
    return Repacked(_version(packed), repacked, pairs.to(torch.bfloat16).contiguous())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
