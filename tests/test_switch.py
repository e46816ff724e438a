"""alpha over a whole model, held weights, and computing in another type for a while."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from libortho import stream
from libortho.errors import OrthoError, SeparationError
from libortho.precision import computing_in, dtype_name
from libortho.switch import (
    alpha,
    bits_per_linear_weight,
    dense_weights,
    get_alpha,
    ortho_layers,
    set_alpha,
)

Factory = Callable[..., LlamaForCausalLM]
IDS = torch.arange(1, 41)[None]


@pytest.fixture
def model(separated_model: Factory) -> LlamaForCausalLM:
    """A separated model whose private stream is random."""
    model = separated_model()
    generator = torch.Generator().manual_seed(1)
    for layer in ortho_layers(model).values():
        scores = torch.rand(layer.out_features, layer.in_features, generator=generator)
        values = torch.randn(3, layer.out_features, generator=generator) / 4
        layer.set_private(stream.select(scores, 3), values.half())
    return model


@torch.inference_mode()
def logits(model: LlamaForCausalLM) -> Tensor:
    return model(input_ids=IDS).logits


def test_every_linear_layer_is_reached(model: LlamaForCausalLM) -> None:
    assert len(ortho_layers(model)) == 14  # seven to a block
    assert get_alpha(model) == 1.0
    set_alpha(model, 0.25)
    assert get_alpha(model) == 0.25
    assert {float(layer.alpha) for layer in ortho_layers(model).values()} == {0.25}


def test_alpha_moves_the_logits_and_zero_is_the_bare_model(
    model: LlamaForCausalLM, separated_model: Factory
) -> None:
    full = logits(model)
    set_alpha(model, 0.0)
    assert torch.equal(logits(model), logits(separated_model()))
    set_alpha(model, 1.0)
    assert torch.equal(logits(model), full)
    assert not torch.allclose(full, logits(separated_model()), atol=1e-2)


def test_the_context_manager_restores(model: LlamaForCausalLM) -> None:
    set_alpha(model, 0.5)
    with alpha(model, 0.0) as inside:
        assert inside is model
        assert get_alpha(model) == 0.0
        with alpha(model, -2.0):
            assert get_alpha(model) == -2.0
        assert get_alpha(model) == 0.0
    assert get_alpha(model) == 0.5


def test_the_context_manager_restores_after_an_error(model: LlamaForCausalLM) -> None:
    set_alpha(model, 0.5)
    with pytest.raises(RuntimeError, match="inside"), alpha(model, 0.0):
        raise RuntimeError("inside")
    assert get_alpha(model) == 0.5


def test_disagreeing_layers_are_named(model: LlamaForCausalLM) -> None:
    next(iter(ortho_layers(model).values())).set_alpha(0.0)
    with pytest.raises(SeparationError, match=r"\[0\.0, 1\.0\]"):
        get_alpha(model)
    set_alpha(model, 0.0)
    assert get_alpha(model) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_alpha_that_is_not_finite_changes_nothing(model: LlamaForCausalLM, value: float) -> None:
    with pytest.raises(OrthoError, match=str(value)):
        set_alpha(model, value)
    with pytest.raises(OrthoError, match=str(value)), alpha(model, value):
        pass
    assert get_alpha(model) == 1.0


@pytest.mark.parametrize(
    "use",
    [
        get_alpha,
        bits_per_linear_weight,
        lambda model: set_alpha(model, 0.0),
        lambda model: alpha(model, 0.0).__enter__(),
        lambda model: dense_weights(model, torch.float32).__enter__(),
    ],
)
def test_a_plain_model_is_refused(tiny_model: Factory, use: Callable[[nn.Module], object]) -> None:
    with pytest.raises(SeparationError, match=r"LlamaForCausalLM .*libortho\.separate"):
        use(tiny_model())


def test_dense_weights_change_nothing_and_are_released(model: LlamaForCausalLM) -> None:
    packed = {}
    for value in (1.0, 0.0, 0.5):
        set_alpha(model, value)
        packed[value] = logits(model)
    layers = ortho_layers(model).values()
    with dense_weights(model, torch.float32):
        assert all(layer._held is not None for layer in layers)
        for value, expected in packed.items():
            set_alpha(model, value)
            assert torch.equal(logits(model), expected)
    assert all(layer._held is None for layer in layers)
    with pytest.raises(RuntimeError), dense_weights(model, torch.float32):
        raise RuntimeError
    assert all(layer._held is None for layer in layers)


def test_what_the_caller_held_stays_held(model: LlamaForCausalLM) -> None:
    layer = next(iter(ortho_layers(model).values()))
    layer.hold(torch.float32)
    with dense_weights(model, torch.float32):
        pass
    assert layer._held is not None


def test_bits_per_linear_weight_counts_every_stream(model: LlamaForCausalLM) -> None:
    layers = ortho_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    private = sum(32 * layer.private_values.numel() for layer in layers)
    public = bits_per_linear_weight(model, private=False)
    # 4 bits, 32 a group (two groups of at most 32 at a width of 48, three at 80), 32 an entry
    rows = {48: 4 * 48 + 2 * 32 + 32, 80: 4 * 80 + 3 * 32 + 2 * 32}
    assert public * weights == sum(rows[la.in_features] * la.out_features for la in layers)
    assert bits_per_linear_weight(model) == pytest.approx(public + private / weights)


def test_computing_in_gives_the_model_back_bit_for_bit(model: LlamaForCausalLM) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    storage = {n: p.data_ptr() for n, p in model.named_parameters()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with pytest.raises(RuntimeError, match="inside"), computing_in(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert logits(model).dtype == torch.bfloat16
        # Positions beyond 256 coincide in bfloat16, so the frequencies must not be rounded.
        assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        raise RuntimeError("inside")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storage
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


def test_computing_in_the_models_own_type_converts_nothing(tiny_model: Factory) -> None:
    model = tiny_model()
    storage = [p.data_ptr() for p in model.parameters()]
    with computing_in(model, torch.float32):
        assert [p.data_ptr() for p in model.parameters()] == storage


def test_integer_parameters_are_not_converted() -> None:
    model = nn.Module()
    model.counts = nn.Parameter(torch.arange(3), requires_grad=False)
    with computing_in(model, torch.bfloat16):
        assert model.counts.dtype == torch.int64


def test_names_of_types() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
