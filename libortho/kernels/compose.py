"""The composing kernel: base + residual + alpha * private as one dense matrix, for many tokens.

Knows Triton and the layouts of `lattice` and `stream`. Doesn't know what is multiplied with it: for
a prompt the dense product is a matrix library's work, and writing the matrix costs a few percent
of it.

A program owns whole rows. It writes their base, and after a barrier once more the entries at the
streams' slots: summed anew in float32 from the base's integer, the residual and the private value,
so that each entry is rounded once, as `OrthoLinear.effective_weight` rounds it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are Triton's, and typed by it.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lattice import PER_ROW, Lattice
from .configs import WARP, Shape, word_layout
from .fields import UNIT, tag, tagged

_ROWS, _WARPS = 4, 4


@triton.jit
def _base_entry(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    row,
    column,
    mask,
    IN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Single weights of the base, float32."""
    WIDTH: tl.constexpr = (IN * BITS + 7) // 8
    GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
    byte = tl.load(
        packed_ptr + (row.to(tl.int64) * WIDTH + column * BITS // 8), mask=mask, other=0
    ).to(tl.int32)
    shift = BITS * (column % (8 // BITS))
    q = (byte >> shift) & ((1 << BITS) - 1)
    at_group = row * GROUPS + column // GROUP
    scale = tl.load(scales_ptr + at_group, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zeros_ptr + at_group, mask=mask, other=0.0).to(tl.float32)
    return zero + (q - (1 << (BITS - 1))).to(tl.float32) * scale


@triton.jit
def _residual_at(
    columns_ptr,
    values_ptr,
    row,
    column,
    mask,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The residual's values at other columns of the same rows, 0 where it has none."""
    before = column * 0  # residual columns known to lie before `column`: they ascend
    for halving in tl.static_range(16):  # columns are 16-bit
        if (1 << 15 >> halving) <= SLOTS:
            probe = before + (1 << 15 >> halving)
            known = tl.load(
                columns_ptr + ((probe - 1) * STRIDE + row * STEP),
                mask=mask & (probe <= SLOTS),
                other=65535,
            ).to(tl.int32)
            before = tl.where((probe <= SLOTS) & (known < column), probe, before)
    at = before * STRIDE + row * STEP
    inside = mask & (before < SLOTS)
    found = tl.load(columns_ptr + at, mask=inside, other=0).to(tl.int32)
    value = tl.load(values_ptr + at, mask=inside & (found == column), other=0.0)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["unit"])
def _compose_kernel(
    packed_ptr,  # uint8 [out, ceil(in * bits / 8)]
    scales_ptr,  # float16 [out, groups]
    zeros_ptr,
    residual_columns_ptr,  # uint16 [residual slots, out]
    residual_values_ptr,
    private_columns_ptr,  # uint16 [private slots, out]
    private_values_ptr,
    alpha_ptr,  # float32, one element
    weight_ptr,  # [out, in], written
    unit,  # fields.UNIT
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,  # of slots
    RESIDUAL_STEP: tl.constexpr,  # of rows
    PRIVATE_STRIDE: tl.constexpr,
    PRIVATE_STEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RESIDUAL: tl.constexpr,  # slots
    PRIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BYTES: tl.constexpr,
):
    VALUES: tl.constexpr = 8 * BYTES // BITS
    WIDTH: tl.constexpr = (IN * BITS + 7) // 8 // BYTES
    GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
    LANES: tl.constexpr = CHUNKS // ROWS
    first = tl.program_id(0) * ROWS
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) if BYTES == 4 else packed_ptr

    # Dimensions: word, row, value. One word a thread, so that a warp writes what lies together.
    row3 = (first + tl.arange(0, ROWS))[None, :, None]
    value = tl.arange(0, VALUES)[None, None, :]
    for start in range(0, WIDTH, CHUNKS):
        word = (start + tl.arange(0, CHUNKS))[:, None, None]
        live = (row3 < OUT) & (word < WIDTH)
        at_word = tl.max_contiguous(row3.to(tl.int64) * WIDTH + word, [1, 1, 1])
        w = tl.load(words_ptr + at_word, mask=live, other=0, eviction_policy="evict_first").to(
            tl.int32
        )
        group = word * VALUES // GROUP
        at_group = tl.max_contiguous(row3 * GROUPS + group, [1, 1, 1])
        scale = tl.load(scales_ptr + at_group, mask=live, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + at_group, mask=live, other=0.0).to(tl.float32)
        weight = zero + (tagged(w, value, unit, BITS) - tag(value, BITS)) * scale
        column = word * VALUES + value
        tl.store(
            weight_ptr + (row3.to(tl.int64) * IN + column),
            weight.to(weight_ptr.dtype.element_ty),
            mask=live & (column < IN),
        )

    # Dimensions: row, lane.
    row = (first + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    if RESIDUAL > 0:
        tl.debug_barrier()
        for start in range(0, RESIDUAL, LANES):
            slot = start + lane
            mask = (slot < RESIDUAL) & (row < OUT)
            at = slot * RESIDUAL_STRIDE + row * RESIDUAL_STEP
            column = tl.load(residual_columns_ptr + at, mask=mask, other=0).to(tl.int32)
            entry = _base_entry(
                packed_ptr, scales_ptr, zeros_ptr, row, column, mask, IN, BITS, GROUP
            )
            entry += tl.load(residual_values_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(
                weight_ptr + (row.to(tl.int64) * IN + column),
                entry.to(weight_ptr.dtype.element_ty),
                mask=mask,
            )
    if PRIVATE > 0:
        alpha = tl.load(alpha_ptr)
        spoken = tl.where(alpha != 0.0, PRIVATE, 0)
        tl.debug_barrier()
        for start in range(0, PRIVATE, LANES):
            slot = start + lane
            mask = (slot < spoken) & (row < OUT)
            at = slot * PRIVATE_STRIDE + row * PRIVATE_STEP
            column = tl.load(private_columns_ptr + at, mask=mask, other=0).to(tl.int32)
            entry = _base_entry(
                packed_ptr, scales_ptr, zeros_ptr, row, column, mask, IN, BITS, GROUP
            )
            if RESIDUAL > 0:
                entry += _residual_at(
                    residual_columns_ptr,
                    residual_values_ptr,
                    row,
                    column,
                    mask,
                    RESIDUAL_STRIDE,
                    RESIDUAL_STEP,
                    RESIDUAL,
                )
            value_p = tl.load(private_values_ptr + at, mask=mask, other=0.0).to(tl.float32)
            entry += alpha * value_p
            tl.store(
                weight_ptr + (row.to(tl.int64) * IN + column),
                entry.to(weight_ptr.dtype.element_ty),
                mask=mask,
            )


def compose_arguments(
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
    weight: Tensor,
) -> tuple[tuple[int], dict[str, object]]:
    """The grid and all arguments of a launch, by name."""
    out_features = lattice.packed.shape[0]
    group = lattice.in_features if lattice.group_size == PER_ROW else lattice.group_size
    layout = word_layout(Shape.of(lattice), 1)
    assert layout is not None, "the dispatcher offers no such lattice"
    assert all(one.stride() == other.stride() for one, other in (residual, private))
    arguments: dict[str, object] = {
        "packed_ptr": lattice.packed,
        "scales_ptr": lattice.scales,
        "zeros_ptr": lattice.zeros,
        "residual_columns_ptr": residual[0],
        "residual_values_ptr": residual[1],
        "private_columns_ptr": private[0],
        "private_values_ptr": private[1],
        "alpha_ptr": alpha,
        "weight_ptr": weight,
        "unit": UNIT,
        "IN": lattice.in_features,
        "OUT": out_features,
        "RESIDUAL_STRIDE": residual[0].stride(0),
        "RESIDUAL_STEP": residual[0].stride(1),
        "PRIVATE_STRIDE": private[0].stride(0),
        "PRIVATE_STEP": private[0].stride(1),
        "BITS": lattice.bits,
        "GROUP": group,
        "RESIDUAL": residual[0].shape[0],
        "PRIVATE": private[0].shape[0],
        "ROWS": _ROWS,
        "CHUNKS": WARP * _WARPS,
        "BYTES": layout[1],
        "num_warps": _WARPS,
    }
    return (-(-out_features // _ROWS),), arguments


def compose(
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """base + residual + alpha * private, `[out, in]`, summed in float32 and rounded to `dtype`.

    Arguments as in `decode`, but streams may be columns `[k, out]` of larger ones: where columns
    and values have the same strides they are read where they lie. alpha is read by the kernel, and
    at 0 the private stream is not.
    """
    residual, private = (
        part
        if part[0].stride() == part[1].stride()
        else (part[0].contiguous(), part[1].contiguous())
        for part in (residual, private)
    )
    shape = (lattice.packed.shape[0], lattice.in_features)
    weight = torch.empty(shape, dtype=dtype, device=lattice.packed.device)
    grid, arguments = compose_arguments(lattice, residual, private, alpha, weight)
    _compose_kernel[grid](**arguments)
    return weight
