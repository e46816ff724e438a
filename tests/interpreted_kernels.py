"""The Triton kernels against float64, run by Triton's interpreter on a CPU.

Not collected with the other tests: TRITON_INTERPRET has to be set before anything imports Triton,
and PyTorch imports it early. `test_kernels` runs this file in a process of its own.
"""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libortho import stream
from libortho.kernels import op
from libortho.kernels.compose import compose
from libortho.kernels.configs import DecodeConfig, Shape, word_layout
from libortho.kernels.decode import decode
from libortho.kernels.dispatch import Backend
from libortho.lattice import PER_ROW, Lattice, dequantize, quantize

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_kernels.py instead"

TOLERANCE = {
    torch.float16: 1e-3,
    # The interpreter cuts the lower half of a float32 off instead of rounding it: 2**-7 at worst.
    torch.bfloat16: 2.0**-7,
    torch.float32: 1e-4,
}
"""Largest relative error of a product, ||y - y64|| / ||y64||. Sums are float32; what is left is the
rounding of the result, and of 4-bit fields' offsets in float32."""
ANY_ALPHA = st.one_of(st.just(0.0), st.just(1.0), st.floats(-4, 4, width=16))
some = settings(max_examples=14, deadline=None, derandomize=True)

# What a kernel doesn't write is NaN.
torch.use_deterministic_algorithms(True)

Stream = tuple[Tensor, Tensor]
Operands = tuple[Lattice, Stream, Stream, Tensor]


def between_nans(tensor: Tensor) -> Tensor:
    """The same tensor inside a larger allocation, whose other bytes are NaN in any float format."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
    inside = buffer[256 : 256 + size].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor)


def make_stream(in_features: int, out_features: int, slots: int, seed: int) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    columns = stream.select(torch.rand(out_features, in_features, generator=generator), slots)
    values = torch.randn(slots, out_features, generator=generator).half()
    return between_nans(columns), between_nans(values)


@st.composite
def operands(draw: st.DrawFn, alphas: st.SearchStrategy[float] = ANY_ALPHA) -> Operands:
    """A lattice, two streams and alpha; sizes that are divided by nothing, among others."""
    in_features = draw(st.sampled_from([1, 2, 7, 33, 64, 96, 100, 128, 257, 384]))
    out_features = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    full = quantize(
        torch.randn(out_features, in_features, generator=generator),
        bits=draw(st.sampled_from([4, 4, 8])),
        group_size=draw(st.sampled_from([32, 64, 128, PER_ROW, 6])),
        search=False,
    )
    lattice = Lattice(
        between_nans(full.packed),
        between_nans(full.scales),
        between_nans(full.zeros),
        full.bits,
        full.group_size,
        in_features,
    )
    densities = st.sampled_from([0.0, 0.01, 0.1, 0.9])
    residual, private = (
        make_stream(in_features, out_features, round(in_features * draw(densities)), seed + i)
        for i in (1, 2)
    )
    return lattice, residual, private, torch.tensor(draw(alphas))


configs = st.builds(
    DecodeConfig,
    rows=st.sampled_from([1, 4, 8, 16]),
    warps=st.sampled_from([1, 2, 4]),
    words=st.sampled_from([1, 2, 4]),
    prefetch=st.booleans(),
)


def reference(given: Operands) -> Tensor:
    """base + residual + alpha * private, float64 `[out, in]`."""
    lattice, residual, private, alpha = given
    weight = dequantize(lattice, torch.float64)
    stream.scatter_add(weight, residual[0], residual[1].double())
    if float(alpha):
        stream.scatter_add(weight, private[0], private[1].double(), float(alpha))
    return weight


def assert_close(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor) -> None:
    """Relative to the size that sums of such terms have, so that a sum near 0 doesn't count."""
    size = (x.double().square() @ weight.square().t()).sqrt().norm()
    error = float((y.double() - expected).norm() / max(float(expected.norm()), float(size)))
    assert error <= TOLERANCE[y.dtype], f"relative error {error:.1e} in {y.dtype}"


@some
@given(
    operands(),
    configs,
    st.integers(1, 8),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.booleans(),
    st.sampled_from(["contiguous", "rows apart", "columns apart"]),
)
def test_decode_agrees_with_float64(
    given: Operands,
    config: DecodeConfig,
    tokens: int,
    dtype: torch.dtype,
    has_bias: bool,
    strides: str,
) -> None:
    lattice, out_features = given[0], given[0].packed.shape[0]
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, lattice.in_features, generator=generator).to(dtype)
    if strides == "rows apart":
        x = torch.full((tokens, lattice.in_features + 3), torch.nan, dtype=dtype).index_copy_(
            1, torch.arange(lattice.in_features), x
        )[:, : lattice.in_features]
    elif strides == "columns apart":
        x = x.t().contiguous().t()
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    y = decode(x, *given, bias, config)
    assert y.shape == (tokens, out_features)
    assert y.dtype == dtype
    weight = reference(given)
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert_close(y, expected, x, weight)


@some
@given(operands(), st.sampled_from([torch.float16, torch.float32]))
def test_composing_agrees_with_float64(given: Operands, dtype: torch.dtype) -> None:
    weight = reference(given)
    made = compose(*given, dtype)
    assert made.dtype == dtype
    torch.testing.assert_close(
        made.double(), weight, rtol=2.0**-11 if dtype == torch.float16 else 1e-5, atol=1e-5
    )


@settings(max_examples=5, deadline=None, derandomize=True)
@given(operands(st.sampled_from([0.0, -0.0])), configs, st.sampled_from([torch.nan, torch.inf]))
def test_at_zero_the_private_stream_is_not_heard(
    given: Operands, config: DecodeConfig, poison: float
) -> None:
    lattice, residual, (columns, values), alpha = given
    poisoned = columns, torch.full_like(values, poison)
    nothing = columns[:0], values[:0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, lattice.in_features, generator=generator).half()
    y = decode(x, lattice, residual, poisoned, alpha, None, config)
    assert torch.equal(y, decode(x, lattice, residual, nothing, alpha, None, config))
    made = compose(lattice, residual, poisoned, alpha, torch.float16)
    assert torch.equal(made, compose(lattice, residual, nothing, alpha, torch.float16))


def test_streams_longer_than_a_launch_fetches_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    lattice = quantize(torch.randn(3, 700, generator=generator), search=False)
    operands = lattice, make_stream(700, 3, 700, 1), make_stream(700, 3, 333, 2), torch.tensor(0.5)
    x = torch.randn(1, 700, generator=generator).half()
    y = decode(x, *operands, None, DecodeConfig(rows=4, warps=1, words=4, prefetch=True))
    weight = reference(operands)
    assert_close(y, x.double() @ weight.t(), x, weight)


def test_float32_masters_of_a_stream_in_tuning_are_read() -> None:
    generator = torch.Generator().manual_seed(4)
    lattice = quantize(torch.randn(5, 64, generator=generator), search=False)
    residual, (columns, values) = make_stream(64, 5, 2, 1), make_stream(64, 5, 3, 2)
    operands = lattice, residual, (columns, values.float() + 1e-6), torch.tensor(1.0)
    made = compose(*operands, torch.float32)
    torch.testing.assert_close(made.double(), reference(operands), rtol=1e-6, atol=1e-7)


@some
@given(operands(), configs, st.integers(1, 20), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_bare_lattice_is_multiplied_without_streams(
    given: Operands, config: DecodeConfig, tokens: int, dtype: torch.dtype
) -> None:
    """What the packed head does on a card: the decode kernel, or dense rows part by part."""
    lattice, *_ = given
    x = torch.randn(tokens, lattice.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype)
    weight = dequantize(lattice, torch.float64)
    layout = word_layout(Shape.of(lattice), config.words)
    few = layout is not None and tokens <= 8 and config.rows * tokens <= 64
    composing = "dequantize" if word_layout(Shape.of(lattice), 1) is None else "triton-compose"
    with (
        patch.object(op, "choose", lambda *_: Backend("triton-decode" if few else composing, "")),
        patch.object(op, "composer", lambda *_: Backend(composing, "")),
        patch.object(op.autotune, "config_for", lambda *_: config),
        patch.object(op, "PART_ELEMENTS", 3 * lattice.in_features),
    ):
        tensors = lattice.packed, lattice.scales, lattice.zeros
        form = lattice.bits, lattice.group_size, lattice.in_features
        y = op.lattice_product(x, *tensors, None, *form)
    assert y.shape == (tokens, lattice.packed.shape[0])
    assert_close(y, x.double() @ weight.t(), x, weight)
