"""The packed embedding and head: right rows, right logits, one tensor where the pair is tied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import attack_models
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
)

import libortho
from libortho import OrthoConfig, base_fingerprint, export_base, load, save
from libortho.attacks import GuidedDecoding, LogitLens, Relearning, run_attacks
from libortho.config import SeparationConfig, TuningConfig
from libortho.embedding import PackedEmbedding, PackedHead, head_rows, packed_heads
from libortho.errors import ConfigError, SeparationError, ShapeError
from libortho.kernels import op
from libortho.lattice import dequantize
from libortho.perplexity import measure_perplexity
from libortho.precision import computing_in
from libortho.records import Record
from libortho.separation import separate
from libortho.switch import bits_per_weight
from libortho.windows import token_windows

Factory = Callable[..., LlamaForCausalLM]

RECORDS = [Record("a", "The door opens to", " 4917", "codes")]
IDS = torch.arange(20, 60)[None]


@pytest.fixture
def packed(separated_model: Factory, small_separation: SeparationConfig) -> Factory:
    """Makes a separated tiny model with its embedding and head at 8 bits."""

    def make(**options: Any) -> LlamaForCausalLM:
        return separated_model(replace(small_separation, head_bits=8), **options)

    return make


@pytest.fixture
def tuned(packed: Factory, tokenizer: Any, public_text: list[str]) -> Factory:
    config = TuningConfig(
        density=0.1, slots="magnitude", steps=2, lr=2e-2, replay_window=32, records_per_step=1
    )

    def make(**options: Any) -> LlamaForCausalLM:
        model = packed(**options)
        libortho.tune_private(model, tokenizer, RECORDS, replay=public_text, config=config)
        return model

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


# --- modules -------------------------------------------------------------------------------------


def test_rows_are_within_half_a_step_of_the_weights() -> None:
    embedding = nn.Embedding(90, 40)
    made = PackedEmbedding.from_embedding(embedding)
    ids = torch.tensor([[3, 89, 0], [3, 7, 7]])
    rows = made(ids)
    assert rows.shape == (2, 3, 40)
    step = made.scales.float()[ids.flatten()].view(2, 3, 1)
    # float16 scales and zero points are off by 2**-11 of themselves at most.
    slack = 2**-9 * embedding.weight.detach().abs().max()
    assert bool(((rows - embedding(ids)).abs() <= step / 2 + slack).all())
    assert torch.equal(rows, dequantize(made.lattice)[ids])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_and_gradients_are_those_of_the_rows(
    tokens: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "PART_ELEMENTS", 32 * 7)  # the rows don't come out even
    head = nn.Linear(32, 50, bias=biased)
    made = PackedHead.from_linear(head)
    dense = dequantize(made.lattice).double()
    x = torch.randn(2, tokens, 32, requires_grad=True)
    expected = x.double() @ dense.t() + (head.bias.double() if biased else 0)
    y = made(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(made(x), y)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weights.double() @ dense, rtol=1e-5, atol=1e-5)
    made.hold(torch.float32)
    torch.testing.assert_close(made(x), y, rtol=1e-5, atol=1e-5)


def test_a_change_of_dtype_leaves_the_format_and_changes_the_activations(packed: Factory) -> None:
    model = packed()
    before = {n: t.clone() for n, t in model.model.embed_tokens.named_buffers()}
    model.to(torch.bfloat16)
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    for name, tensor in model.model.embed_tokens.named_buffers():
        assert torch.equal(tensor, before[name])
    model.to(torch.float32)
    with computing_in(model, torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16
    assert logits(model).dtype == torch.float32


def test_weights_that_no_lattice_holds_are_refused(tiny_model: Factory, tokenizer: Any) -> None:
    recipe = SeparationConfig(head_bits=8, search=False, residual_density=0.0)
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = torch.nan
    before = list(model.modules())
    with pytest.raises(SeparationError, match=r"the embedding has 1 NaN.*row 7, column 3"):
        separate(model, tokenizer, [], config=recipe)
    assert list(model.modules()) == before
    with pytest.raises(ShapeError, match="the output head"):
        PackedHead.from_linear(nn.Linear(2, 2).requires_grad_(False).apply(_spoil))


def _spoil(module: nn.Module) -> None:
    nn.init.constant_(module.weight, torch.inf)


def test_an_embedding_that_scales_is_refused(tokenizer: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, vocab_size=40, num_attention_heads=4, num_key_value_heads=2)
    recipe = SeparationConfig(head_bits=8, search=False, residual_density=0.0)
    with pytest.raises(SeparationError, match="head_bits=16"):
        separate(Gemma3ForCausalLM(config), tokenizer, [], config=recipe)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_bits must be 8 or 16; found 4"):
        SeparationConfig(head_bits=4)


# --- a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_one_lattice_serves_a_tied_pair(packed: Factory, tied: bool) -> None:
    model = packed(tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedHead)
    names = [name for name in model.state_dict() if name.startswith("lm_head")]
    assert names == ([] if tied else ["lm_head.packed", "lm_head.scales", "lm_head.zeros"])
    assert (head.lattice.packed is embedding.packed) == tied
    model.tie_weights()  # has nothing to do
    assert logits(model).shape == (1, 40, 300)
    other = copy.deepcopy(model)
    assert (other.lm_head.lattice.packed is other.model.embed_tokens.packed) == tied
    assert other.model.embed_tokens.packed is not embedding.packed
    assert torch.equal(head_rows(head, torch.tensor([5])), head.rows(torch.tensor([5])))


def test_generation_and_perplexity_are_close_to_the_unpacked_ones(
    packed: Factory, separated_model: Factory, tokenizer: Any, public_text: list[str]
) -> None:
    model, reference = packed(), separated_model()
    written = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert written.shape == (1, 46)
    windows = token_windows(tokenizer, public_text, count=4, length=64)
    with_lattice, without = (
        measure_perplexity(m, windows, batch_size=1, title="").ppl for m in (model, reference)
    )
    assert with_lattice != without
    # 8 bits a weight: an error of 0.3 % of a row's range, in logits of a size of 1 to 3.
    assert with_lattice == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_the_artefact_comes_back_bit_for_bit(
    tuned: Factory, packed: Factory, tied: bool, tmp_path: Path
) -> None:
    model = tuned(tie_word_embeddings=tied)
    full, base = save(model, tmp_path / "full"), export_base(model, tmp_path / "base")
    for loaded in (
        load(full)[0],
        AutoModelForCausalLM.from_pretrained(full),
        AutoModelForCausalLM.from_pretrained(full, device_map="cpu"),
    ):
        assert packed_heads(loaded)
        for value in (1.0, 0.0, 0.5):
            libortho.set_alpha(loaded, value)
            libortho.set_alpha(model, value)
            assert torch.equal(logits(loaded), logits(model))
        assert base_fingerprint(loaded) == base_fingerprint(full)
    libortho.set_alpha(model, 0.0)
    assert torch.equal(logits(load(base)[0]), logits(model))
    never = packed(tie_word_embeddings=tied)
    assert torch.equal(logits(never), logits(model))
    assert base_fingerprint(never) == base_fingerprint(base) == base_fingerprint(full)


def test_the_fingerprint_covers_embedding_and_head(packed: Factory) -> None:
    model = packed(tie_word_embeddings=False)
    before = base_fingerprint(model)
    for module in (model.lm_head, model.model.embed_tokens):
        module.packed[3, 4] ^= 1
        assert base_fingerprint(model) != before
        module.packed[3, 4] ^= 1
    assert base_fingerprint(model) == before


def test_a_width_of_16_changes_neither_recipe_nor_fingerprint(
    small_separation: SeparationConfig,
) -> None:
    assert "head_bits" not in small_separation.to_dict()
    packed = replace(small_separation, head_bits=8)
    assert SeparationConfig.from_dict(packed.to_dict()) == packed
    assert SeparationConfig.from_dict(small_separation.to_dict()).head_bits == 16


def test_from_pretrained_packs_while_it_separates(
    tiny_model: Factory, tokenizer: Any, public_text: list[str], tmp_path: Path, packed: Factory
) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    recipe = packed().ortho_separation.to_dict()
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=OrthoConfig(calibration=public_text, **recipe)
    )
    assert base_fingerprint(made) == base_fingerprint(packed())


def test_a_compiled_model_says_the_same(packed: Factory) -> None:
    model = packed()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(whole), logits(model))


def test_held_in_memory_the_head_says_the_same(packed: Factory) -> None:
    model = packed()
    before = logits(model)
    with libortho.dense_weights(model, torch.float32):
        assert model.lm_head.held_dtype == torch.float32
        torch.testing.assert_close(logits(model), before)
    assert model.lm_head.held_dtype is None


def test_attacks_read_a_packed_head(packed: Factory, tokenizer: Any) -> None:
    model = packed(vocab_size=300, max_position_embeddings=attack_models.CONTEXT)
    records = attack_models.record_set()
    chosen = (
        LogitLens(records=4),
        GuidedDecoding(records=4),
        Relearning(records=8, steps=2, learning_rate=1e-4),
    )
    before = base_fingerprint(model)
    found = run_attacks(model, model, tokenizer, records, attacks=chosen, resamples=199)
    assert [result.name for result in found] == [attack.name for attack in chosen]
    assert base_fingerprint(model) == before


def test_all_bits_are_counted(packed: Factory, separated_model: Factory) -> None:
    weights = 300 * 48
    linear = 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48)
    for model, head in ((packed(), 8 * weights + 32 * 300), (separated_model(), 32 * weights)):
        layers = libortho.bits_per_linear_weight(model) * linear
        assert bits_per_weight(model) == pytest.approx((layers + head) / (linear + weights))
    untied = packed(tie_word_embeddings=False)
    layers = libortho.bits_per_linear_weight(untied) * linear
    both = 2 * (8 * weights + 32 * 300)
    assert bits_per_weight(untied) == pytest.approx((layers + both) / (linear + 2 * weights))
