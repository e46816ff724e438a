"""From a plain model and public text to base + residual: windows, diag(H), the replacement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho.calibration import hessian_diagonal
from libortho.config import NO_LATTICE, SeparationConfig
from libortho.errors import CorpusError, OrthoError, SeparationError
from libortho.lattice import PER_ROW
from libortho.linear import OrthoLinear
from libortho.models import linear_layers
from libortho.separation import separate
from libortho.switch import ortho_layers
from libortho.windows import SEPARATOR, token_windows, tokenize

Factory = Callable[..., LlamaForCausalLM]


def nan_in(layer: nn.Linear, row: int, column: int) -> None:
    with torch.no_grad():
        layer.weight[row, column] = torch.nan


# --- windows -------------------------------------------------------------------------------------


def test_documents_are_joined_without_special_tokens(
    tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    ids = tokenize(tokenizer, public_text[:2])
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == SEPARATOR.join(public_text[:2])


def test_a_tokenizer_that_opens_texts_does_not_open_windows(
    tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    opening = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    opening.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    with_opening = PreTrainedTokenizerFast(tokenizer_object=opening, eos_token=end)
    assert with_opening("a")["input_ids"][0] == tokenizer.eos_token_id
    assert torch.equal(tokenize(with_opening, public_text), tokenize(tokenizer, public_text))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_windows_are_whole_distinct_and_spread(
    tokenizer: PreTrainedTokenizerFast, public_text: list[str], count: int
) -> None:
    length = 50
    ids = tokenize(tokenizer, public_text)
    windows = token_windows(tokenizer, public_text, count=count, length=length)
    assert windows.shape == (count, length)
    runs = ids[: len(ids) // length * length].view(-1, length)
    at = [int((runs == window).all(1).nonzero()[0]) for window in windows]
    assert at == sorted(set(at))  # in the text's order, no two alike
    gaps = [b - a for a, b in zip(at, [*at[1:], len(runs)], strict=True)]
    assert at[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_a_text_of_exactly_enough_windows_will_do(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = token_windows(tokenizer, ["abcdef"], count=3, length=2)
    assert [tokenizer.decode(w) for w in windows] == ["ab", "cd", "ef"]


@pytest.mark.parametrize(("documents", "found"), [(["abcde"], "2 windows .*5 tokens"), ([], "0 w")])
def test_too_short_a_text_is_refused(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], found: str
) -> None:
    with pytest.raises(CorpusError, match=found):
        token_windows(tokenizer, documents, count=3, length=2)


# --- calibration ---------------------------------------------------------------------------------


def test_the_diagonal_is_the_mean_square_of_the_inputs(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    model = tiny_model()
    layers = linear_layers(model)
    windows = token_windows(tokenizer, public_text, count=4, length=64)
    measured = hessian_diagonal(model, layers, windows)

    # The plain way: keep every input of a float64 run of the same model.
    double = tiny_model().double()
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name in layers:
        double.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, kept=seen[name]: kept.append(inputs[0].flatten(0, 1))
        )
    with torch.no_grad():
        for window in windows:
            double(input_ids=window[None])
    assert measured.keys() == seen.keys()
    for name, kept in seen.items():
        x = torch.cat(kept)
        assert x.shape == (256, layers[name].in_features)
        torch.testing.assert_close(
            measured[name].double(), x.square().mean(0), rtol=1e-4, atol=1e-7
        )
        assert not layers[name]._forward_pre_hooks


def test_a_column_that_no_text_excites_keeps_a_say(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 0.0
    windows = token_windows(tokenizer, public_text, count=1, length=64)
    diagonal = hessian_diagonal(model, linear_layers(model), windows)
    values = diagonal["model.layers.0.self_attn.q_proj"]
    assert 0 < float(values[7]) < 1e-5 * float(values.mean())


def test_activations_that_overflow_are_named_and_hooks_removed(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.inf
    layers = linear_layers(model)
    windows = token_windows(tokenizer, public_text, count=1, length=64)
    with pytest.raises(SeparationError, match=r"layers\.1\.self_attn\.q_proj.*float32"):
        hessian_diagonal(model, layers, windows)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


# --- separation ----------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes(
    separated_model: Factory, small_separation: SeparationConfig
) -> None:
    first, second = separated_model().state_dict(), separated_model().state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    other = separated_model(replace(small_separation, calibration_tokens=256)).state_dict()
    assert any(not torch.equal(t, other[n]) for n, t in first.items() if n.endswith("scales"))


def test_everything_but_the_linear_layers_is_left_alone(
    tiny_model: Factory, separated_model: Factory
) -> None:
    plain, model = tiny_model(), separated_model()
    assert list(ortho_layers(model)) == list(linear_layers(plain))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kept = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in ortho_layers(model):
            assert torch.equal(kept.pop(name), parameter), name
    assert not kept


def test_an_untied_head_is_left_alone(tiny_model: Factory, separated_model: Factory) -> None:
    plain, model = (make(tie_word_embeddings=False) for make in (tiny_model, separated_model))
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize(("bits", "group_size"), [(4, PER_ROW), (8, 32), (NO_LATTICE, 64)])
def test_a_separated_model_still_generates(
    tiny_model: Factory,
    separated_model: Factory,
    small_separation: SeparationConfig,
    bits: int,
    group_size: int,
) -> None:
    plain = tiny_model()
    model = separated_model(replace(small_separation, bits=bits, group_size=group_size))
    ids = torch.arange(20, 40)[None]
    written = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 25)
    with torch.inference_mode():
        gap = (model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()
    # Random weights have no outliers: relative errors are about those of the weights.
    assert float(gap) < {4: 0.3, 8: 0.02, NO_LATTICE: 1e-6}[bits]


def test_searched_ranges_give_smaller_output_errors(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    separated_model: Factory,
) -> None:
    plain = tiny_model()
    windows = token_windows(tokenizer, public_text, count=8, length=64)
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in linear_layers(plain).items():
        inputs[name] = []
        layer.register_forward_pre_hook(
            lambda _, given, kept=inputs[name]: kept.append(given[0].flatten(0, 1))
        )
    with torch.no_grad():
        for window in windows:
            plain(input_ids=window[None])

    def output_error(**changes: object) -> float:
        model = separated_model(replace(small_separation, **changes))
        total = 0.0
        for name, layer in ortho_layers(model).items():
            error = layer.public_weight() - plain.get_submodule(name).weight.detach()
            total += float((torch.cat(inputs[name]) @ error.t()).square().sum())
        return total

    bare = output_error(search=False, residual_density=0.0)
    assert output_error(residual_density=0.0) < 0.95 * bare
    assert output_error() < 0.9 * output_error(search=False) < 0.9 * bare


@pytest.mark.parametrize(
    "changes", [{"bits": NO_LATTICE}, {"search": False, "residual_density": 0.0}]
)
def test_a_recipe_that_weighs_no_errors_reads_no_text(
    tiny_model: Factory, small_separation: SeparationConfig, changes: dict
) -> None:
    model = tiny_model()
    separate(model, None, [], config=replace(small_separation, **changes))
    assert len(ortho_layers(model)) == 14


def test_a_damaged_weight_is_named_and_nothing_changes(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> None:
    model = tiny_model()
    nan_in(model.model.layers[1].mlp.down_proj, 3, 5)
    with pytest.raises(OrthoError, match=r"layers\.1\.mlp\.down_proj\.weight.*row 3, column 5"):
        separate(model, tokenizer, public_text, config=small_separation)
    assert not any(isinstance(module, OrthoLinear) for module in model.modules())


def test_too_little_calibration_text_changes_nothing(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> None:
    model = tiny_model()
    with pytest.raises(CorpusError, match="8 are needed"):
        separate(model, tokenizer, [public_text[0][:300]], config=small_separation)
    assert not any(isinstance(module, OrthoLinear) for module in model.modules())


def test_a_model_is_separated_once(
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> None:
    model = separated_model()
    with pytest.raises(SeparationError, match="separated already"):
        separate(model, tokenizer, public_text, config=small_separation)
