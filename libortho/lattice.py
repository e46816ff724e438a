"""The dense lattice: integers of 4 or 8 bits whose groups share a scale and a zero point.

Knows tensors only. A row of `in_features` weights is cut into groups of `group_size` along the
input dimension (the last group may be shorter), and a weight is stored as

    w = scale * (q - 2**(bits - 1)) + zero        q in 0 .. 2**bits - 1

with `scale` and `zero` in float16, both in the units of the weight. It is the formula of PyTorch's
own int4 kernels (`torch.ops.aten._weight_int4pack_mm`), so their layout is a repacking away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ShapeError

BITS = (4, 8)
PER_ROW = -1
"""Group size that means one group for a whole row."""

FP16_MAX = torch.finfo(torch.float16).max
_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Fractions of the min-max range that the search starts from, at either end."""
_REFINEMENTS = 3
"""Rounds of least squares for (scale, zero) after the search; more than 3 moves nothing."""
_CHUNK_ELEMENTS = 1 << 22
"""Elements of a weight matrix handled at once: bounds the search's temporaries to about 200 MiB."""


@dataclass(frozen=True)
class Lattice:
    """One packed weight matrix.

    packed: uint8 `[out, in]` at 8 bits, `[out, ceil(in / 2)]` at 4 (even column in the low nibble)
    scales: float16 `[out, groups]`
    zeros: float16 `[out, groups]`
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    in_features: int


def groups_per_row(in_features: int, group_size: int) -> int:
    """Number of groups in a row, a shorter last one included."""
    return 1 if group_size == PER_ROW else -(-in_features // group_size)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raise `ShapeError` unless `weight` is a finite 2-D matrix that float16 can span."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ShapeError(
            f"{name} must be a matrix [out_features, in_features] with at least one element; found "
            f"shape {tuple(weight.shape)}."
        )
    if not weight.is_floating_point():
        raise ShapeError(
            f"{name} must hold floating-point weights; found {weight.dtype}. If the checkpoint is "
            "already quantised, start from its unquantised original."
        )
    low, high = (float(extreme) for extreme in weight.aminmax())  # NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = torch.isfinite(weight)
        bad = int((~finite).sum())
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise ShapeError(
            f"{name} has {bad} NaN or infinite of {weight.numel()} weights, the first at row "
            f"{row}, column {column}. The checkpoint is damaged: fetch it again or retrain it."
        )
    largest = max(-low, high)
    if largest > FP16_MAX:
        raise ShapeError(
            f"{name} has a weight of magnitude {largest:.4g}, and scales are float16, whose "
            f"largest value is {FP16_MAX:.0f}. Rescale the layer before separating it."
        )


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack integers `[out, in]` in 0 .. 2**bits - 1 into bytes (see `Lattice.packed`)."""
    if bits == 8:
        return q.to(torch.uint8)
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    q = q.to(torch.uint8)
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The integers, uint8 `[out, in_features]`: the inverse of `pack`."""
    if bits == 8:
        return packed
    q = torch.stack((packed & 0xF, packed >> 4), dim=2).view(packed.shape[0], -1)
    return q[:, :in_features]


def quantize(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    importance: Tensor | None = None,
    excluded: Tensor | None = None,
    search: bool = True,
) -> Lattice:
    """Quantise a weight matrix by the least weighted squared error.

    weight: floating point `[out, in]`
    importance: float `[in]`, the weight of a column's squared error, diag(H) = E[x**2] of the
        layer's inputs (as in GPTQ and AWQ: to second order the loss grows by H times the squared
        error); uniform if None
    excluded: bool `[out, in]`, entries that the residual will hold exactly and that the range may
        therefore ignore
    search: False gives the plain min-max range

    Returns the packed `Lattice`. Raises `ShapeError` for shapes, dtypes or values that don't fit.
    """
    check_weight(weight)
    if bits not in BITS:
        raise ShapeError(f"bits must be one of {BITS}; found {bits}.")
    if group_size != PER_ROW and group_size < 2:
        raise ShapeError(f"group_size must be at least 2, or {PER_ROW} for one per row.")
    out_features, in_features = weight.shape
    for name, tensor, shape in (
        ("importance", importance, (in_features,)),
        ("excluded", excluded, (out_features, in_features)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} must have shape {shape}; found {tuple(tensor.shape)}.")
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ShapeError("importance must be finite and not negative: calibration went wrong.")

    size = in_features if group_size == PER_ROW else group_size
    groups = groups_per_row(in_features, group_size)
    padding = groups * size - in_features
    h = _grouped(importance.float()[None], groups, padding)
    parts = []
    for row in row_parts(weight):
        w = _grouped(weight[row].float(), groups, padding)
        # Padding and excluded entries have no say in the range.
        voice = _grouped(torch.ones_like(weight[row], dtype=torch.float32), groups, padding)
        if excluded is not None:
            voice = voice * _grouped((~excluded[row]).float(), groups, padding)
        scale, zero = _fit_range(w, h * voice, voice > 0, bits, search)
        q = _round(w, scale.float(), zero.float(), bits)
        parts.append((q.flatten(1)[:, :in_features].to(torch.uint8), scale[..., 0], zero[..., 0]))
    q, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Lattice(pack(q, bits), scales, zeros, bits, group_size, in_features)


def row_parts(weight: Tensor) -> list[slice]:
    """Rows of a matrix `[out, in]` in parts that are small enough for temporaries of them."""
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def dequantize(lattice: Lattice, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that a lattice stands for, `[out, in]`, computed in float32 and then rounded."""
    q = unpack(lattice.packed, lattice.bits, lattice.in_features)
    size = lattice.in_features if lattice.group_size == PER_ROW else lattice.group_size
    groups = lattice.scales.shape[1]
    padding = groups * size - lattice.in_features
    centred = _grouped(q.float().sub_(2 ** (lattice.bits - 1)), groups, padding)
    w = torch.addcmul(lattice.zeros.float()[..., None], centred, lattice.scales.float()[..., None])
    return w.flatten(1)[:, : lattice.in_features].to(dtype)


def _grouped(matrix: Tensor, groups: int, padding: int) -> Tensor:
    if padding:
        matrix = torch.nn.functional.pad(matrix, (0, padding))
    return matrix.reshape(matrix.shape[0], groups, -1)  # [rows, groups, group_size]


def _round(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    half = 2 ** (bits - 1)
    return ((w - zero) / safe + half).round_().clamp_(0, 2 * half - 1)


def _fit_range(w: Tensor, h: Tensor, included: Tensor, bits: int, search: bool) -> tuple:
    """Scale and zero, float16 `[rows, groups, 1]`, of the least sum of h * (w - w_hat)**2."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low = w.masked_fill(~included, torch.inf).amin(2, keepdim=True)
    high = w.masked_fill(~included, -torch.inf).amax(2, keepdim=True)
    empty = ~torch.isfinite(low)  # every entry excluded: any range will do
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)

    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)

    def consider(scale: Tensor, zero: Tensor) -> Tensor:
        nonlocal best, best_scale, best_zero
        scale, zero = _as_stored(scale), _as_stored(zero)
        centred = _round(w, scale, zero, bits) - half
        error = (h * (w - zero - centred * scale).square()).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        return centred

    middle = (low + high) / 2
    shrink = [(a, b) for a in _SHRINK for b in _SHRINK] if search else [(1.0, 1.0)]
    for a, b in shrink:
        start, end = middle + (low - middle) * a, middle + (high - middle) * b
        scale = (end - start) / top
        consider(scale, start + half * scale)
    for _ in range(_REFINEMENTS if search else 0):
        # With the integers fixed, scale and zero are a weighted straight-line fit of w on q.
        centred = _round(w, best_scale, best_zero, bits) - half
        mass = h.sum(2, keepdim=True).clamp_min(1e-30)
        mean_q = (h * centred).sum(2, keepdim=True) / mass
        mean_w = (h * w).sum(2, keepdim=True) / mass
        variance = (h * (centred - mean_q).square()).sum(2, keepdim=True)
        covariance = (h * (centred - mean_q) * (w - mean_w)).sum(2, keepdim=True)
        fits = (variance > 0) & (covariance > 0)
        scale = torch.where(fits, covariance / variance.clamp_min(1e-30), best_scale)
        zero = torch.where(fits, mean_w - scale * mean_q, best_zero)
        consider(scale, zero)
    return best_scale.to(torch.float16), best_zero.to(torch.float16)


def _as_stored(value: Tensor) -> Tensor:
    """What float16 storage makes of a value: rounding must use the numbers that are kept."""
    return value.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).float()
