"""`OrthoLinear` against the dense matrix that it stands for, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from libortho import stream
from libortho.config import NO_LATTICE
from libortho.errors import ShapeError
from libortho.kernels import op
from libortho.lattice import PER_ROW, dequantize, quantize
from libortho.linear import OrthoLinear
from libortho.product import SPARSE_TOKENS

FEW, MANY = 3, SPARSE_TOKENS + 5
some = settings(max_examples=40)
seeds = st.integers(0, 2**32 - 1)
alphas = st.one_of(st.just(0.0), st.floats(-4, 4, width=16))


def make(
    seed: int = 0,
    *,
    out_features: int = 12,
    in_features: int = 80,
    bits: int = 4,
    group_size: int = 32,
    residual_density: float = 0.05,
    private: int = 6,
    bias: bool = True,
    search: bool = True,
) -> tuple[nn.Linear, Tensor, OrthoLinear]:
    """A linear layer, the importance of its columns, and its separation with a private stream."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    importance = torch.rand(in_features, generator=generator) + 0.01
    layer = OrthoLinear.from_linear(
        linear,
        bits=bits,
        group_size=group_size,
        residual_density=residual_density,
        importance=importance,
        search=search,
    )
    if private:
        scores = torch.rand(out_features, in_features, generator=generator)
        values = torch.randn(private, out_features, generator=generator)
        layer.set_private(stream.select(scores, private), values.half())
    return linear, importance, layer


@st.composite
def layers(draw: st.DrawFn) -> OrthoLinear:
    in_features = draw(st.integers(1, 130))
    _, _, layer = make(
        draw(seeds),
        out_features=draw(st.integers(1, 9)),
        in_features=in_features,
        bits=draw(st.sampled_from([4, 8, NO_LATTICE])),
        group_size=draw(st.sampled_from([32, 64, PER_ROW])),
        residual_density=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        private=draw(st.integers(0, in_features)),
        bias=draw(st.booleans()),
        search=False,
    )
    return layer


def dense(layer: OrthoLinear, alpha: float) -> Tensor:
    """base + residual + alpha * private, float64 `[out, in]`."""
    weight = layer.base_weight().double()
    for name, scale in (("residual", 1.0), ("private", alpha)):
        columns, values = (getattr(layer, f"{name}_{part}") for part in ("columns", "values"))
        for j in range(columns.shape[0]):
            for o in range(columns.shape[1]):
                weight[o, int(columns[j, o])] += scale * values[j, o].double()
    return weight


def inputs(layer: OrthoLinear, *leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(*leading, layer.in_features, generator=generator, dtype=dtype)


@some
@given(layers(), alphas, st.sampled_from([(), (1,), (FEW,), (MANY,), (2, 3), (2, 20), (0,)]))
def test_the_layer_is_base_plus_residual_plus_alpha_private(
    layer: OrthoLinear, alpha: float, leading: tuple[int, ...]
) -> None:
    layer.set_alpha(alpha)
    x = inputs(layer, *leading)
    weight = dense(layer, alpha)
    y = layer(x)
    assert y.shape == (*leading, layer.out_features)
    assert y.dtype == x.dtype
    bias = None if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.effective_weight(torch.float64), weight, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        layer.public_weight(torch.float64), dense(layer, 0.0), rtol=1e-6, atol=1e-5
    )


@some
@given(layers(), alphas, st.integers(1, 400))
def test_a_large_weight_is_never_whole(layer: OrthoLinear, alpha: float, elements: int) -> None:
    layer.set_alpha(alpha)
    x = inputs(layer, MANY)
    whole = layer(x)
    made: list[int] = []
    with patch.object(op, "PART_ELEMENTS", elements), patch.object(op, "_dense", _counted(made)):
        y = layer(x)
    torch.testing.assert_close(y, whole, rtol=1e-6, atol=1e-5)
    assert all(size <= max(elements, layer.in_features) for size in made)
    assert bool(made) == (layer.bits != NO_LATTICE)


def _counted(made: list[int]) -> Callable[..., Tensor]:
    dense_of = op._dense

    def counted(*arguments: Any) -> Tensor:
        weight = dense_of(*arguments)
        made.append(weight.numel())
        return weight

    return counted


@some
@given(layers(), alphas)
def test_few_tokens_many_tokens_and_a_held_weight_agree(layer: OrthoLinear, alpha: float) -> None:
    layer.set_alpha(alpha)
    x = inputs(layer, MANY, dtype=torch.float32)
    many, few = layer(x), torch.cat([layer(part) for part in x.split(FEW)])
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)
    layer.hold(torch.float32)
    assert torch.equal(layer(x), many)


@some
@given(layers(), st.floats(-4, 4, width=16), st.sampled_from([FEW, MANY]), st.booleans())
def test_outputs_are_linear_in_alpha(
    layer: OrthoLinear, alpha: float, tokens: int, held: bool
) -> None:
    if held:
        layer.hold(torch.float64)
    x, y = inputs(layer, tokens), {}
    for value in (0.0, 1.0, alpha):
        layer.set_alpha(value)
        y[value] = layer(x)
    change = y[alpha] - y[0.0]
    torch.testing.assert_close(change, alpha * (y[1.0] - y[0.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8, NO_LATTICE])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_at_zero_the_private_stream_does_not_exist(
    bits: int, held: bool, dtype: torch.dtype, poison: float | None
) -> None:
    _, _, bare = make(bits=bits, private=0)
    _, _, layer = make(bits=bits)
    if poison is not None:
        values = layer.private_values.clone()
        values[0] = poison
        layer.set_private(layer.private_columns, values)
    if held:
        layer.hold(dtype)
    x = {tokens: inputs(layer, tokens, dtype=dtype) for tokens in (1, FEW, MANY)}
    for alpha in (0.0, 1.0, -0.0):
        layer.set_alpha(alpha)
        for tokens, some_inputs in x.items():
            same = torch.equal(layer(some_inputs), bare(some_inputs))
            assert same == (alpha == 0), tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_held_weight_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    _, _, layer = make()
    layer.set_alpha(0.0)
    packed = layer.public_weight(dtype)
    layer.set_alpha(0.7)
    layer.hold(dtype)
    for alpha in (1.0, -3.3, 1e4, 0.1):
        layer.set_alpha(alpha)
        assert torch.equal(layer.composed(dtype), layer.effective_weight(dtype))
        assert not torch.equal(layer.composed(dtype), packed)
    layer.set_alpha(0.0)
    assert torch.equal(layer.composed(dtype), packed)


def test_a_held_weight_follows_a_new_stream() -> None:
    _, _, layer = make()
    layer.hold(torch.float32)
    columns = stream.select(torch.rand(12, 80, generator=torch.Generator().manual_seed(5)), 2)
    layer.set_private(columns, torch.ones(2, 12).half())
    assert layer._held is not None
    assert torch.equal(layer.composed(torch.float32), layer.effective_weight())
    layer.private_values.fill_(2.0)
    layer.refresh()
    assert torch.equal(layer.composed(torch.float32), layer.effective_weight())


def test_a_weight_held_in_another_type_is_not_used() -> None:
    _, _, layer = make()
    x = inputs(layer, MANY, dtype=torch.float32)
    before = layer(x)
    layer.hold(torch.bfloat16)
    assert torch.equal(layer(x), before)


def test_holding_leaves_the_stored_weight_alone() -> None:
    _, _, layer = make(bits=NO_LATTICE)
    stored = layer.weight.clone()
    layer.hold(torch.float32)
    layer.set_alpha(2.0)
    layer.effective_weight()
    assert torch.equal(layer.weight, stored)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_not_finite_is_refused(value: float) -> None:
    _, _, layer = make()
    layer.set_alpha(0.5)
    with pytest.raises(ShapeError, match=str(value)):
        layer.set_alpha(value)
    assert layer.get_alpha() == float(layer.alpha) == 0.5


def test_a_malformed_stream_leaves_the_layer_as_it_was() -> None:
    _, _, layer = make()
    weight, columns = layer.effective_weight(), layer.private_columns
    with pytest.raises(ShapeError, match="outside"):
        layer.set_private(torch.full_like(columns, 80)[:1], torch.zeros(1, 12))
    assert layer.private_columns is columns
    assert torch.equal(layer.effective_weight(), weight)


@pytest.mark.parametrize("convert", ["bfloat16", "half", "double"])
def test_a_change_of_dtype_rounds_nothing_that_is_stored(convert: str) -> None:
    _, _, layer = make()
    layer.set_alpha(0.123456789)
    layer.hold(torch.float32)
    stored = {n: t.clone() for n, t in layer.named_buffers() if n != "bias"}
    model = nn.Sequential(layer, nn.Linear(12, 3))
    getattr(model, convert)()
    assert model[1].weight.dtype == layer.bias.dtype != torch.float32
    for name, before in stored.items():
        after = getattr(layer, name)
        assert after.dtype == before.dtype, name
        assert torch.equal(after, before), name
    # What was held belongs to the former type.
    assert layer._held is None
    x = inputs(layer, MANY, dtype=model[1].weight.dtype)
    layer.set_alpha(0.0)
    assert torch.equal(layer(x), F.linear(x, layer.public_weight(x.dtype), layer.bias))


def test_masters_in_float32_survive_a_change_of_dtype() -> None:
    _, _, layer = make()
    values = layer.private_values.float() + 1e-5
    layer.set_private(layer.private_columns, values)
    layer.bfloat16()
    assert torch.equal(layer.private_values, values)


def test_inputs_need_not_be_contiguous() -> None:
    _, _, layer = make()
    for tokens in (FEW, MANY):
        x = inputs(layer, tokens, dtype=torch.float32)
        across = x.t().contiguous().t()
        assert not across.is_contiguous()
        torch.testing.assert_close(layer(across), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(79,), (2, 81), (80, 1)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    _, _, layer = make()
    with pytest.raises(ShapeError, match=rf"80 features; found shape .*{shape[-1]},?\)"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("private", [0, 6])
@pytest.mark.parametrize("in_features", [80, 81])
@pytest.mark.parametrize("bits", [4, 8, NO_LATTICE])
def test_storage_bits_are_the_bytes_of_a_file(bits: int, in_features: int, private: int) -> None:
    _, _, layer = make(bits=bits, in_features=in_features, private=private, bias=False)

    def bits_on_disk() -> int:
        file = save(layer.state_dict())
        header = int.from_bytes(file[:8], "little")
        return 8 * (len(file) - 8 - header)

    assert layer.storage_bits() == bits_on_disk()
    # A stream in tuning has float32 masters, and is stored in float16 all the same.
    as_stored = layer.storage_bits()
    layer.set_private(layer.private_columns, layer.private_values.float())
    assert layer.storage_bits() == as_stored
    layer.set_private(layer.private_columns[:0], layer.private_values[:0])
    assert layer.storage_bits() == layer.storage_bits(private=False) == bits_on_disk()


@pytest.mark.parametrize("search", [False, True])
def test_the_residual_holds_the_worst_weighted_errors(search: bool) -> None:
    linear, importance, layer = make(search=search, residual_density=0.05, private=0)
    weight = linear.weight.detach()
    first = quantize(weight, group_size=32, importance=importance, search=search)
    score = (weight - dequantize(first)).square() * importance
    for row in range(12):
        worst = score[row].topk(4).indices.sort().values  # 5 % of 80
        assert layer.residual_columns[:, row].tolist() == worst.tolist()

    # What it holds is exact but for the float16 of the correction.
    slots = stream.mask(layer.residual_columns, 80)
    error = (layer.public_weight() - weight).abs()[slots]
    correction = stream.scatter_add(
        torch.zeros(12, 80), layer.residual_columns, layer.residual_values.float()
    ).abs()[slots]
    assert bool((error <= correction * 2**-11 + 2**-24 + 1e-6 * weight.abs()[slots]).all())

    def row_errors(matrix: Tensor) -> Tensor:
        return ((matrix - weight).square() * importance).sum(1)

    assert bool((row_errors(layer.public_weight()) < row_errors(dequantize(first))).all())


def test_no_lattice_keeps_the_weights() -> None:
    linear, _, layer = make(bits=NO_LATTICE, private=0)
    assert torch.equal(layer.public_weight(), linear.weight)
    assert layer.residual_columns.shape[0] == 0
    x = inputs(layer, MANY, dtype=torch.float32)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_the_observed_gradient_is_autograds(held: bool, leading: tuple[int, ...]) -> None:
    _, _, layer = make()
    layer.set_alpha(0.6)
    if held:
        layer.hold(torch.float64)
    shown: list[Tensor] = []
    layer.observe(shown.append)
    x = inputs(layer, *leading).requires_grad_()
    target = torch.ones(*leading, 12, dtype=torch.float64)
    F.mse_loss(layer(x), target).backward()
    layer.observe(None)

    weight = layer.effective_weight(torch.float64).requires_grad_()
    again = x.detach().clone().requires_grad_()
    F.mse_loss(F.linear(again, weight, layer.bias.double()), target).backward()
    assert len(shown) == 1
    torch.testing.assert_close(shown[0], weight.grad)
    torch.testing.assert_close(x.grad, again.grad)


def test_a_layer_none_of_whose_inputs_ask_is_observed_too() -> None:
    _, _, layer = make()
    shown: list[Tensor] = []
    layer.observe(shown.append)
    layer(inputs(layer, FEW)).sum().backward()
    assert [gradient.shape for gradient in shown] == [(12, 80)]
    with torch.no_grad():
        assert not layer(inputs(layer, FEW)).requires_grad
    layer.observe(None)
    assert not layer(inputs(layer, FEW)).requires_grad
