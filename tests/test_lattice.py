"""The lattice: packing, ranges, and the formula that PyTorch's own kernels use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from libortho import lattice
from libortho.errors import ShapeError
from libortho.lattice import (
    BITS,
    PER_ROW,
    Lattice,
    dequantize,
    groups_per_row,
    pack,
    quantize,
    unpack,
)

GROUP_SIZES = (32, 64, 128, PER_ROW)
seeds = st.integers(0, 2**32 - 1)
heights, widths = st.integers(1, 7), st.integers(1, 200)
bits_ = st.sampled_from(BITS)
group_sizes = st.sampled_from(GROUP_SIZES)
some = settings(max_examples=40)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_weight(groups: Tensor, held: Lattice) -> Tensor:
    """A group's value at each of its weights, float64 `[out, in]`."""
    size = held.in_features if held.group_size == PER_ROW else held.group_size
    return groups.double().repeat_interleave(size, dim=1)[:, : held.in_features]


def half_ulp(value: Tensor) -> Tensor:
    """The largest rounding error of float16 at a value: 11 bits, or the subnormals' spacing."""
    return (value.abs() * 2.0**-11).clamp_min(2.0**-25)


def weighted_error(weight: Tensor, held: Lattice, importance: Tensor) -> float:
    return float(((weight.double() - dequantize(held).double()).square() * importance).sum())


@some
@given(seeds, heights, widths, bits_)
def test_packing_keeps_every_integer(seed: int, rows: int, columns: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, columns if bits == 8 else (columns + 1) // 2)
    assert torch.equal(unpack(packed, bits, columns), q)


def test_the_even_column_is_the_low_nibble() -> None:
    # The layout of files that others read: it must not change with the code.
    assert pack(torch.tensor([[1, 2, 3], [15, 0, 8]]), 4).tolist() == [[0x21, 0x03], [0x0F, 0x08]]


@pytest.mark.parametrize(
    ("width", "group_size", "groups"),
    [(128, 32, 4), (129, 32, 5), (31, 32, 1), (1, 64, 1), (80, 64, 2), (500, PER_ROW, 1)],
)
def test_a_shorter_last_group_is_counted(width: int, group_size: int, groups: int) -> None:
    assert groups_per_row(width, group_size) == groups
    held = quantize(normal(0, 3, width), group_size=group_size)
    assert held.scales.shape == held.zeros.shape == (3, groups)


@some
@given(seeds, heights, widths, bits_, group_sizes, st.floats(-6, 4), st.floats(-3, 3))
def test_min_max_error_is_half_a_step(
    seed: int, rows: int, columns: int, bits: int, group_size: int, exponent: float, shift: float
) -> None:
    weight = (normal(seed, rows, columns) + shift) * 10**exponent
    held = quantize(weight, bits=bits, group_size=group_size, search=False)
    scale, zero = per_weight(held.scales, held), per_weight(held.zeros, held)
    # scale and zero are kept in float16, and the scale's error counts once for each step.
    bound = scale / 2 + 2 ** (bits - 1) * half_ulp(scale) + half_ulp(zero)
    error = (weight.double() - dequantize(held).double()).abs()
    assert bool((error <= bound + 1e-6 * weight.abs().max()).all())


@some
@given(seeds, heights, widths, bits_, group_sizes)
def test_the_formula_in_the_documentation_is_what_is_computed(
    seed: int, rows: int, columns: int, bits: int, group_size: int
) -> None:
    held = quantize(normal(seed, rows, columns), bits=bits, group_size=group_size)
    q = unpack(held.packed, bits, columns).double()
    expected = per_weight(held.scales, held) * (q - 2 ** (bits - 1)) + per_weight(held.zeros, held)
    torch.testing.assert_close(dequantize(held).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_pytorchs_int4_kernel_gives_the_same_product(group_size: int) -> None:
    out_features, in_features, tokens = 64, 256, 3
    held = quantize(normal(1, out_features, in_features), group_size=group_size)
    q = unpack(held.packed, 4, in_features).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    side = torch.stack((held.scales, held.zeros), dim=2).transpose(0, 1).contiguous()
    x = normal(2, tokens, in_features).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, side.bfloat16())
    rounded = Lattice(
        held.packed, side[..., 0].t().bfloat16(), side[..., 1].t().bfloat16(), 4, group_size, 256
    )
    expected = x.float() @ dequantize(rounded).t()
    # bfloat16 keeps 8 bits, of each weight here and of the sum.
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.02 * 256**0.5)
    correlation = torch.corrcoef(torch.stack((product.float().flatten(), expected.flatten())))
    assert correlation[0, 1] > 0.9999


@some
@given(seeds, bits_, group_sizes, st.integers(-8, 2), st.booleans())
def test_weights_on_a_grid_already_are_kept(
    seed: int, bits: int, group_size: int, exponent: int, search: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (4, 150), generator=generator)
    q[:, ::16], q[:, 1::16] = 0, 2**bits - 1  # every group reaches both ends of its range
    weight = (q - 2 ** (bits - 1) + 3).float() * 2.0**exponent
    held = quantize(weight, bits=bits, group_size=group_size, search=search)
    assert torch.equal(dequantize(held), weight)


@some
@given(
    st.floats(-6e4, 6e4, width=32),
    heights,
    widths,
    bits_,
    group_sizes,
    st.booleans(),
    st.booleans(),
)
def test_a_constant_row_is_its_float16(
    value: float,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    search: bool,
    other_rows: bool,
) -> None:
    weight = normal(0, rows + other_rows, columns)
    weight[0] = value
    held = quantize(weight, bits=bits, group_size=group_size, search=search)
    assert torch.equal(dequantize(held)[0], weight[0].half().float())


@some
@given(seeds, heights, widths, bits_, group_sizes, st.sampled_from([1e-3, 1.0, 30.0]))
@example(seed=0, rows=7, columns=200, bits=8, group_size=32, size=1.0)
def test_the_search_is_never_worse_than_min_max(
    seed: int, rows: int, columns: int, bits: int, group_size: int, size: float
) -> None:
    # Far from zero, where the float16 of the zero point decides what is best.
    weight = (normal(seed, rows, columns).pow(3) + 300) * size
    importance = normal(seed + 1, columns).square() + 1e-3
    plain, searched = (
        quantize(weight, bits=bits, group_size=group_size, importance=importance, search=search)
        for search in (False, True)
    )
    before = weighted_error(weight, plain, importance)
    assert weighted_error(weight, searched, importance) <= before * (1 + 1e-4) + 1e-12


def test_the_search_pays_where_columns_differ() -> None:
    weight, importance = normal(0, 32, 256), 10 ** normal(1, 256)
    plain, searched = (
        quantize(weight, importance=importance, search=search) for search in (False, True)
    )
    before = weighted_error(weight, plain, importance)
    assert weighted_error(weight, searched, importance) < 0.75 * before


@some
@given(seeds, heights, widths, group_sizes, st.booleans(), st.floats(-3e4, 3e4))
def test_excluded_entries_have_no_say(
    seed: int, rows: int, columns: int, group_size: int, search: bool, intruder: float
) -> None:
    weight = normal(seed, rows, columns)
    excluded = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    importance = normal(seed + 1, columns).square()
    one, other = (
        quantize(w, group_size=group_size, importance=importance, excluded=excluded, search=search)
        for w in (weight, weight.masked_fill(excluded, intruder))
    )
    assert torch.equal(one.scales, other.scales)
    assert torch.equal(one.zeros, other.zeros)
    assert torch.equal(dequantize(one)[~excluded], dequantize(other)[~excluded])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("search", [False, True])
def test_excluding_outliers_helps_the_others(group_size: int, search: bool) -> None:
    weight, importance = normal(0, 24, 200), normal(1, 200).square()
    weight[:, ::50] *= 8
    excluded = torch.zeros_like(weight, dtype=torch.bool)
    excluded[:, ::50] = True
    heard = importance * ~excluded
    options = {"group_size": group_size, "importance": importance, "search": search}
    without = weighted_error(weight, quantize(weight, **options), heard)
    within = weighted_error(weight, quantize(weight, excluded=excluded, **options), heard)
    assert within < 0.8 * without


def test_a_group_that_is_all_excluded_is_finite() -> None:
    excluded = torch.zeros(2, 64, dtype=torch.bool)
    excluded[:, :32] = True
    held = quantize(normal(0, 2, 64), group_size=32, excluded=excluded)
    assert bool(torch.isfinite(dequantize(held)).all())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_eight_bits_are_much_closer_than_four(group_size: int) -> None:
    weight, importance = normal(0, 16, 200), torch.ones(200)
    four, eight = (
        weighted_error(weight, quantize(weight, bits=bits, group_size=group_size), importance)
        for bits in (4, 8)
    )
    assert eight < four / 100  # (15 / 255)**2 = 1 / 289 less what clipping saves at 4 bits


def test_working_in_chunks_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = normal(0, 13, 80), normal(1, 80).square()
    excluded = normal(2, 13, 80) > 1
    whole = quantize(weight, group_size=32, importance=importance, excluded=excluded)
    monkeypatch.setattr(lattice, "_CHUNK_ELEMENTS", 200)  # two rows at once
    parts = quantize(weight, group_size=32, importance=importance, excluded=excluded)
    for name in ("packed", "scales", "zeros"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), "row 1, column 0"),
        (torch.tensor([[1.0, float("inf")], [1.0, -float("inf")]]), "2 NaN or infinite of 4"),
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.zeros(0, 4), r"\(0, 4\)"),
        (torch.zeros(2, 4, dtype=torch.int8), "int8"),
        (torch.tensor([[1.0, -1e5]]), "1e[+]05"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight: Tensor, found: str) -> None:
    with pytest.raises(ShapeError, match=found):
        quantize(weight)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bits": 3}, "found 3"),
        ({"group_size": 0}, "at least 2"),
        ({"importance": torch.ones(5)}, r"importance .* found \(5,\)"),
        ({"importance": -torch.ones(6)}, "not negative"),
        ({"importance": torch.full((6,), torch.nan)}, "finite"),
        ({"excluded": torch.zeros(6, 2, dtype=torch.bool)}, r"excluded .* found \(6, 2\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, found: str) -> None:
    with pytest.raises(ShapeError, match=found):
        quantize(normal(0, 2, 6), **options)
