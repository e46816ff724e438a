"""The Triton kernels against float64, run by Triton's interpreter on a CPU.

Not collected with the other tests: TRITON_INTERPRET has to be set before anything imports Triton,
and PyTorch imports it early. `test_kernels` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pkgutil
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libortho import stream
from libortho.fusion import fuse_projections
from libortho.kernels import dispatch, op
from libortho.kernels.attention import attend
from libortho.kernels.compose import compose
from libortho.kernels.configs import DecodeConfig, Shape, word_layout
from libortho.kernels.decode import decode
from libortho.kernels.dispatch import Backend
from libortho.kernels.pointwise import gated, rms_norm, rotate, write
from libortho.lattice import PER_ROW, Lattice, dequantize, quantize
from libortho.linear import OrthoLinear

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
    if draw(st.booleans()):  # as a fused model's lie
        residual, private = stream.paired(*residual), stream.paired(*private)
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


@pytest.mark.parametrize("alike", [True, False])
def test_streams_that_are_a_part_of_larger_ones_are_composed(alike: bool) -> None:
    """As those of layers that are fused, or of a weight that is composed part by part."""
    generator = torch.Generator().manual_seed(5)
    lattice = quantize(torch.randn(5, 64, generator=generator), search=False)
    rows = slice(3, 8)
    residual, private = (
        tuple(part[:, rows] for part in make_stream(64, 11 if alike else size, slots, size))
        for size, slots in ((11, 2), (9, 3))
    )
    assert (residual[0].stride() == private[0].stride()) is alike
    operands = lattice, residual, private, torch.tensor(0.5)
    made = compose(*operands, torch.float32)
    torch.testing.assert_close(made.double(), reference(operands), rtol=1e-6, atol=1e-6)


# --- between the products ------------------------------------------------------------------------


halves = st.sampled_from([torch.float16, torch.bfloat16])


def draw_normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert error <= 2 * TOLERANCE[ours.dtype], f"relative error {error:.1e} in {ours.dtype}"


@some
@given(st.sampled_from([1, 48, 257]), st.sampled_from([(1, 1), (3, 2)]), halves, st.booleans())
def test_norms_agree_with_float64(
    width: int, leading: tuple[int, int], dtype: torch.dtype, strided: bool
) -> None:
    x = draw_normal(0, *leading, width + 3)[..., :width].to(dtype)
    x = x if strided else x.contiguous()
    weight = draw_normal(1, width).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    full = x.double()
    expected = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert y.dtype == dtype
    assert_near(y, expected)


@some
@given(
    st.sampled_from([(4, 2), (3, 3), (6, 1)]),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 64]),
    halves,
)
def test_rotations_agree_with_transformers(
    heads: tuple[int, int], tokens: int, batch: int, dim: int, dtype: torch.dtype
) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    # As a model has them: parts of one product, with heads moved to the front.
    whole = draw_normal(0, batch, tokens, sum(heads) * dim).to(dtype)
    q, k = (
        part.view(batch, tokens, -1, dim).transpose(1, 2)
        for part in whole.split([h * dim for h in heads], -1)
    )
    cos, sin = (draw_normal(seed, batch, tokens, dim).to(dtype) for seed in (1, 2))
    for ours, theirs in zip(
        rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert_near(ours, theirs)
    ours, theirs = rotate(q, k, cos[:1], sin[:1]), apply_rotary_pos_emb(q, k, cos[:1], sin[:1])
    assert_near(ours[1], theirs[1])


@some
@given(st.sampled_from([1, 100, 1500]), st.sampled_from([1, 3]), halves)
def test_gates_agree_with_float64(width: int, rows: int, dtype: torch.dtype) -> None:
    gate, up = draw_normal(0, 1, rows, 2 * width).to(dtype).split(width, -1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert_near(gated(gate, up), expected)


@some
@given(st.sampled_from([1, 2]), st.sampled_from([64, 48]), st.integers(0, 8), st.integers(0, 99))
def test_a_new_key_and_value_take_one_place_in_the_cache(
    batch: int, dim: int, at: int, seed: int
) -> None:
    keys, values = (draw_normal(seed + i, batch, 2, 9, dim).half() for i in range(2))
    # As parts of a fused product lie: heads apart, and something else between two sequences.
    wide = draw_normal(seed + 2, batch, 1, 7 * dim).half()
    key, value = (
        wide[..., n * dim : (n + 2) * dim].view(batch, 1, 2, dim).transpose(1, 2) for n in (1, 4)
    )
    expected = [
        t.clone().index_copy_(2, torch.tensor([at]), new)
        for t, new in ((keys, key), (values, value))
    ]
    write(keys, values, key, value, torch.tensor([at]))
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@some
@given(
    st.sampled_from([(4, 4), (8, 2), (3, 1)]),
    st.sampled_from([1, 63, 64, 200]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 64]),
    st.integers(0, 99),
)
def test_attention_agrees_with_float64(
    heads: tuple[int, int], length: int, batch: int, dim: int, seed: int
) -> None:
    dtype = torch.float16  # the interpreter multiplies bfloat16's bits
    generator = torch.Generator().manual_seed(seed)
    q = draw_normal(seed, batch, heads[0], 1, dim).to(dtype)
    k, v = (draw_normal(seed + i, batch, heads[1], length, dim).to(dtype) for i in (1, 2))
    mask = torch.rand(batch, 1, 1, length, generator=generator) < 0.6
    mask[..., int(torch.randint(0, length, (), generator=generator))] = True
    # What isn't there must not be read.
    k, v = (t.masked_fill(~mask.transpose(2, 3), torch.nan) for t in (k, v))
    y = attend(q, k, v, mask, 0.3)
    known = [t.double().nan_to_num(0).repeat_interleave(heads[0] // heads[1], 1) for t in (k, v)]
    scores = (q.double() @ known[0].transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ known[1]).transpose(1, 2)
    assert y.is_contiguous()
    assert_near(y, expected)


def test_a_long_cache_is_gone_through_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libortho.kernels.attention._MAX_SPLITS", 3)
    q, k, v = (draw_normal(i, 1, 2, n, 16).half() for i, n in ((0, 1), (1, 700), (2, 700)))
    mask = (torch.arange(700) < 555)[None, None, None]
    y = attend(q, k, v, mask, 0.25)
    scores = (q.double() @ k.double().transpose(2, 3) * 0.25).masked_fill(~mask, -torch.inf)
    assert_near(y, (scores.softmax(-1) @ v.double()).transpose(1, 2))


def separate_linears(model: Any) -> None:
    """Put separated layers, with a private stream each, in place of a model's blocks' own."""
    for number, (name, linear) in enumerate(list(model.model.named_modules())):
        if isinstance(linear, torch.nn.Linear):
            layer = OrthoLinear.from_linear(
                linear.float(),
                bits=4,
                group_size=32,
                residual_density=0.05,
                importance=torch.ones(linear.in_features),
            )
            layer.set_private(*make_stream(layer.in_features, layer.out_features, 3, number))
            layer.private_values = layer.private_values * 0.1
            model.model.set_submodule(name, layer)


@pytest.mark.parametrize(("separated", "layers"), [(False, 2), (True, 1)])
def test_a_whole_step_in_few_launches_is_the_models_own(
    separated: bool, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    from libortho import shortcuts

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).half().eval()
    monkeypatch.setattr(shortcuts, "why_not", lambda model: None)
    short: list[bool] = []  # whether few launches are asked for now
    if separated:
        separate_linears(model)
        fuse_projections(model)

        def choose(lattice: Lattice, dtype: torch.dtype, tokens: int) -> Backend:
            return Backend("triton-decode" if short else "dequantize", "")

        monkeypatch.setattr(dispatch, "choose", choose)
        monkeypatch.setattr(op, "choose", choose)
        cut = DecodeConfig(rows=16, warps=1, words=1, prefetch=False)
        monkeypatch.setattr(op.autotune, "config_for", lambda *_: cut)
    calls: list[str] = []
    product_plus = shortcuts.product_plus

    def adding(*given: Any) -> Tensor | None:
        y = product_plus(*given)
        calls.append("added" if y is not None else "not added")
        return y

    monkeypatch.setattr(shortcuts, "product_plus", adding)
    for module, names in (
        ("pointwise", ("rms_norm", "rotate", "gated")),
        ("attention", ("attend",)),
    ):
        for name in names:
            path = f"libortho.kernels.{module}.{name}"
            kernel = pkgutil.resolve_name(path)
            counted = lambda *a, n=name, f=kernel: calls.append(n) or f(*a)  # noqa: E731
            monkeypatch.setattr(path, counted)

    def run(tokens: int, few: int) -> list[Tensor]:
        caches = StaticCache(config=config, max_cache_len=12)
        found = []
        mask = torch.ones(1, 1, tokens, 12, dtype=torch.bool).tril()
        name = next(
            n
            for n in ("past_key_values", "cache")
            if n in inspect.signature(LlamaForCausalLM.forward.__wrapped__).parameters
        )
        model(torch.arange(tokens)[None], attention_mask=mask, **{name: caches})
        for i in range(2):
            seen = (torch.arange(12) <= tokens + i)[None, None, None]
            ids, at = torch.tensor([[7 + i]]), torch.tensor([[tokens + i]])
            step = {"attention_mask": seen, "position_ids": at, name: caches}
            short.extend([True] if i == few else [])
            with shortcuts.in_few_launches(model) if i == few else contextlib.nullcontext():
                found.append(model(ids, **step).logits)
            short.clear()
        return found

    with torch.no_grad():
        expected = run(5, -1)
        for few in (1,) if separated else (0, 1):  # the interpreter is slow at products
            calls.clear()
            for ours, theirs in zip(run(5, few), expected, strict=True):
                assert_near(ours, theirs)
            # Norms and gates are tried on a module's own first; attention and rotation run twice.
            made = {name: calls.count(name) for name in ("attend", "gated", "rms_norm", "rotate")}
            norms = 2 * (2 * layers + 1)
            assert made == {
                "attend": layers,
                "gated": layers,
                "rms_norm": norms,
                "rotate": layers + 1,
            }
            # Tried on the first block; of plain linears nothing is asked.
            assert calls.count("added") == (2 * layers + 2 if separated else 0)
            assert "not added" not in calls
        calls.clear()
        run(5, -1)
        assert not calls


def test_blocks_that_sum_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from libortho import shortcuts

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).half().eval()
    separate_linears(model)
    block = model.model.layers[0]
    theirs = LlamaDecoderLayer.forward
    with torch.no_grad():
        for factor, taken in ((1.0, True), (1.1, False)):
            other = lambda self, x, f=factor, **more: f * theirs(self, x, **more)  # noqa: E731
            monkeypatch.setattr(LlamaDecoderLayer, "forward", other)
            undo = shortcuts._blocks(model)
            assert ("forward" in vars(block)) == taken == bool(undo)
            for each in undo:
                each()
            assert "forward" not in vars(block)
            assert "forward" not in vars(block.mlp.down_proj)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", theirs)

    class Other(LlamaDecoderLayer):
        """Another kind beside the first: what holds of one says nothing of the other."""

        def forward(self, x: Tensor, **more: Any) -> Tensor:
            return 1.1 * super().forward(x, **more)

    odd = model.model.layers[1]
    odd.__class__ = Other
    with torch.no_grad():
        undo = shortcuts._blocks(model)
    assert "forward" in vars(block)
    assert "forward" not in vars(odd)
    assert "forward" not in vars(odd.self_attn.o_proj)
    for each in undo:
        each()


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
