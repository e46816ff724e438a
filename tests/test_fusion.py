"""Projections that are multiplied together: the same outputs, the same files, one alpha."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import libortho
from libortho import stream
from libortho.fusion import Siblings, fuse_projections, unfuse_projections
from libortho.kernels import op
from libortho.linear import OrthoLinear

IN = 96
ROWS = (40, 8, 16)


def make_layer(out_features: int, seed: int = 0, **options: Any) -> OrthoLinear:
    """A layer with two streams, in float32."""
    generator = torch.Generator().manual_seed(seed + out_features)
    linear = nn.Linear(IN, out_features)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer = OrthoLinear.from_linear(
        linear,
        **({"bits": 4, "group_size": 32, "residual_density": 0.03} | options),
        importance=torch.ones(IN),
        search=False,
    )
    columns = stream.select(torch.rand(out_features, IN, generator=generator), 4)
    layer.set_private(columns, torch.randn(4, out_features, generator=generator).half())
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def private_of(model: nn.Module) -> nn.Module:
    """Every layer with a private stream that says something."""
    for seed, layer in enumerate(m for m in model.modules() if isinstance(m, OrthoLinear)):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(layer.out_features, layer.in_features, generator=generator)
        values = torch.randn(3, layer.out_features, generator=generator)
        layer.set_private(stream.select(scores, 3), values.half())
    return model


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([32, -1, 10]),
    st.sampled_from([(1,), (1, 1), (2, 3)]),
    st.sampled_from([1.0, 0.0, -0.5]),
)
def test_every_row_is_what_it_was(
    bits: int, group_size: int, leading: tuple[int, ...], alpha: float
) -> None:
    layers = [make_layer(rows, bits=bits, group_size=group_size) for rows in ROWS]
    x = randn(*leading, IN)
    for layer in layers:
        layer.set_alpha(alpha)
    weights = [layer.effective_weight() for layer in layers]
    before = [layer(x) for layer in layers]
    siblings = Siblings(layers)
    whole = op.composed(*siblings.weight.values(), siblings.alpha, *siblings.format, torch.float32)
    assert torch.equal(whole, torch.cat(weights))
    for layer, weight, y in zip(layers, weights, before, strict=True):
        assert torch.equal(layer.effective_weight(), weight)
        # A library may sum in another order where there are more rows.
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=2e-5)


def test_one_product_serves_them_all_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [make_layer(rows) for rows in ROWS]
    apart = [copy.deepcopy(layer) for layer in layers]
    Siblings(layers)
    calls = []
    product = op.product
    monkeypatch.setattr(op, "product", lambda *a: calls.append(a[1].shape[0]) or product(*a))
    for order in ((0, 1, 2), (2, 0, 1)):
        x = randn(1, IN)
        for i in order:
            torch.testing.assert_close(layers[i](x), apart[i](x))
    assert [n for n in calls if n == sum(ROWS)] == [64, 64]
    assert len(calls) == 2 + 6  # and what stands apart


def test_what_was_made_for_other_inputs_is_not_taken() -> None:
    first, second = layers = [make_layer(8), make_layer(16)]
    apart = copy.deepcopy(second)
    Siblings(layers)
    x, other = randn(1, IN), randn(1, IN) + 1
    first(x)
    torch.testing.assert_close(second(other), apart(other))
    first(x)
    x += 1  # the same tensor, and other numbers in it
    torch.testing.assert_close(second(x), apart(x))


def test_many_tokens_gradients_and_held_weights_are_left_to_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [make_layer(8), make_layer(16)]
    siblings = Siblings(layers)
    monkeypatch.setattr(siblings, "_multiplied", lambda x: pytest.fail("fused"))
    layers[0](randn(9, IN))
    x = randn(1, IN).requires_grad_()
    layers[0](x).sum().backward()
    assert x.grad is not None
    layers[0].hold(torch.float32)
    layers[0](randn(1, IN))


def test_siblings_have_one_alpha() -> None:
    layers = [make_layer(rows) for rows in ROWS]
    Siblings(layers)
    layers[1].set_alpha(0.25)
    assert [layer.get_alpha() for layer in layers] == [0.25] * 3
    assert [float(layer.alpha) for layer in layers] == [0.25] * 3


def test_a_replaced_tensor_ends_it_and_is_heard() -> None:
    layers = [make_layer(8), make_layer(16)]
    Siblings(layers)
    nothing = layers[0].private_columns[:0], layers[0].private_values[:0]
    layers[1].set_private(nothing[0][:, :1].expand(0, 16), nothing[1][:, :1].expand(0, 16))
    assert layers[0].siblings is None
    assert layers[1].siblings is None
    x = randn(1, IN)
    expected = x @ layers[1].public_weight().t() + layers[1].bias
    torch.testing.assert_close(layers[1](x), expected)


def test_a_value_written_in_place_is_heard() -> None:
    layers = [make_layer(8), make_layer(16)]
    Siblings(layers)
    layers[1].private_values.zero_()
    x = randn(1, IN)
    layers[0](x)
    torch.testing.assert_close(layers[1](x), x @ layers[1].public_weight().t() + layers[1].bias)


def test_a_model_is_fused_saved_and_loaded_as_if_it_were_not(
    separated_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = private_of(separated_model())
    ids = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        before, prompt = model(ids).logits, model(torch.arange(40)[None]).logits
    fingerprint = libortho.base_fingerprint(model)
    libortho.save(model, tmp_path / "before")
    assert fuse_projections(model) == 2 * 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(torch.arange(40)[None]).logits, prompt)
    assert libortho.base_fingerprint(model) == fingerprint
    libortho.save(model, tmp_path / "after")
    for file in sorted((tmp_path / "before").iterdir()):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    model.save_pretrained(tmp_path / "theirs")
    loaded, _ = libortho.load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, before)

    alone = copy.deepcopy(model)
    assert fuse_projections(alone) == 2 * 2
    unfuse_projections(model)
    assert fuse_projections(model) == 2 * 2
    assert alone.model.layers[0].mlp.up_proj.packed.data_ptr() != (
        model.model.layers[0].mlp.up_proj.packed.data_ptr()
    )


def test_nothing_is_held_twice(separated_model: Callable[..., Any]) -> None:
    model = private_of(separated_model())

    def held() -> int:
        layers = [m for m in model.modules() if isinstance(m, OrthoLinear)]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in layers
            for tensor in layer.buffers()
        }
        return sum(storages.values())

    before = held()
    fuse_projections(model)
    assert held() == before


def test_every_stream_lies_in_pairs_until_it_is_undone(separated_model: Callable[..., Any]) -> None:
    model = private_of(separated_model())
    layers = [m for m in model.modules() if isinstance(m, OrthoLinear)]
    kinds = ("residual", "private")

    def streams() -> list[tuple[Tensor, Tensor]]:
        alone = [layer for layer in layers if layer.siblings is None]
        found = [
            [getattr(layer, f"{k}_{part}") for part in ("columns", "values")]
            for layer in alone
            for k in kinds
        ]
        for whole in {id(s): s for s in (la.siblings for la in layers) if s is not None}.values():
            found += [
                [whole.weight[f"{k}_{part}"] for part in ("columns", "values")] for k in kinds
            ]
        return [(columns, values) for columns, values in found if columns.numel()]

    x = randn(1, layers[0].in_features)
    weights = [layer.effective_weight() for layer in layers]
    fuse_projections(model)
    assert len({layer.siblings for layer in layers}) > 1  # some, and some alone
    assert all(stream.is_paired(*both) for both in streams())
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.effective_weight(), weight)
    unfuse_projections(model)
    for both in streams():
        assert all(part.is_contiguous() for part in both)
        assert both[0].untyped_storage().nbytes() == both[0].numel() * 2
    assert torch.equal(layers[0].effective_weight(), weights[0])
    torch.testing.assert_close(layers[0](x), x @ weights[0].t(), rtol=1e-4, atol=1e-4)


def test_masters_in_tuning_stay_the_tensors_that_they_are(
    separated_model: Callable[..., Any],
) -> None:
    model = private_of(separated_model())
    layer = model.model.layers[0].self_attn.o_proj
    masters = layer.private_values.float().requires_grad_()
    layer.private_values = masters
    fuse_projections(model)
    assert layer.private_values is masters
    assert stream.is_paired(layer.residual_columns, layer.residual_values)


def test_layers_that_differ_stay_apart(separated_model: Callable[..., Any]) -> None:
    model = private_of(separated_model())
    attention = model.model.layers[0].self_attn
    attention.q_proj.set_private(attention.q_proj.private_columns[:1], torch.zeros(1, 48).half())
    model.model.layers[1].mlp.up_proj.set_alpha(0.5)
    assert fuse_projections(model) == 2


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_fused_block_compiles_whole(separated_model: Callable[..., Any], tokens: int) -> None:
    model = private_of(separated_model())
    fuse_projections(model)
    block = model.model.layers[0].mlp
    torch.compiler.reset()
    graphs = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = randn(1, tokens, 48)
    with torch.no_grad():
        graphs(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for alpha in (1.0, 0.0):
                libortho.set_alpha(model, alpha)
                torch.testing.assert_close(graphs(x), block(x))
