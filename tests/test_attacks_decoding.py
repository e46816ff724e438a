"""The mathematics of each attack, against real generation and plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attack_models import CONTEXT, knowing_model, never_model, record_set
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import lattice
from libortho.attacks import (
    ConstrainedSearch,
    GuidedDecoding,
    LogitLens,
    PromptLengths,
    Relearning,
    Requantization,
    Sampling,
    Target,
    compare_runs,
    dose_curve,
    passes,
    run_one,
)
from libortho.attacks.decoding import continuations
from libortho.attacks.lens import final_norm
from libortho.attacks.plain import plain_linears, public_weight
from libortho.config import TuningConfig
from libortho.errors import SeparationError
from libortho.membership import at_least_once
from libortho.records import Record, RecordSet
from libortho.switch import alpha, get_alpha
from libortho.tuning import tune_private

RECORDS = record_set()


@pytest.fixture(scope="module")
def never(tokenizer: PreTrainedTokenizerFast) -> Target:
    return Target(never_model(), tokenizer, RECORDS)


@pytest.fixture(scope="module")
def knowing(tokenizer: PreTrainedTokenizerFast) -> Target:
    return Target(knowing_model(tokenizer), tokenizer, RECORDS)


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """All logits of one text alone, float64 `[tokens, vocabulary]`."""
    return model(input_ids=torch.tensor([ids])).logits[0].double()


def logprob_of(model: Any, prompt: list[int], secret: list[int]) -> float:
    logprobs = logits_of(model, prompt + secret).log_softmax(-1)
    return sum(float(logprobs[len(prompt) + t - 1, token]) for t, token in enumerate(secret))


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_the_left_changes_nothing(knowing: Target, beams: int) -> None:
    prompts = [a.prompt_ids[-n:] for a, n in zip(knowing.asked, (3, 9, 5, 1), strict=False)]
    options = {"max_new_tokens": 6, "num_beams": beams, "num_return_sequences": beams}
    together, _ = continuations(knowing.model, prompts, pad_id=0, **options)
    for i, prompt in enumerate(prompts):
        alone, _ = continuations(knowing.model, [prompt], pad_id=0, **options)
        assert together[i * beams : (i + 1) * beams].tolist() == alone.tolist()


def test_the_shared_pass_is_that_of_each_record_alone(knowing: Target) -> None:
    reading = knowing.read(2)
    assert reading.layers == (1, 2)
    for asked, logprob, extracted in zip(
        knowing.asked, reading.logprobs, reading.extracted, strict=True
    ):
        slow = logprob_of(knowing.model, asked.prompt_ids, asked.secret_ids)
        assert logprob == pytest.approx(slow, abs=1e-3)
        greedy, _ = continuations(
            knowing.model, [asked.prompt_ids], pad_id=0, max_new_tokens=len(asked.secret_ids)
        )
        assert extracted == (greedy[0].tolist() == asked.secret_ids)
        assert extracted == asked.planted
    shown = repr(reading)
    assert "logprobs" not in shown
    assert "tensor" not in shown


def test_out_of_memory_halves_the_batch() -> None:
    tried: list[int] = []

    def at_most_3(batch: Any) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [-item for item in batch]

    items = [5, 1, 4, 2, 3, 6, 0]
    found = passes.in_batches(items, at_most_3, length=lambda i: i, batch_size=7, title="test")
    assert found == [-item for item in items]
    assert tried == [7, 3, 3, 1]


def test_the_meter_counts_every_token_once(never: Target) -> None:
    ids = torch.ones(3, 7, dtype=torch.int64)
    with passes.metered(never.model) as cost:
        never.model(input_ids=ids)
        continuations(never.model, [[1, 2], [3, 4]], pad_id=0, max_new_tokens=4)
    # 21, the two prompts, and one token a step and row for all steps but the first.
    assert cost().forward_tokens == 21 + 4 + 2 * 3
    assert cost().seconds == cost().seconds > 0


# --- sampling -----------------------------------------------------------------------------------


@given(st.floats(1e-6, 1.0), st.integers(1, 1000))
def test_the_closed_form_is_that_of_independent_draws(p: float, draws: int) -> None:
    assert at_least_once(math.log(p), draws) == pytest.approx(1 - (1 - p) ** draws, abs=1e-9)
    assert at_least_once(-60.0, 10) == pytest.approx(10 * math.exp(-60))  # where 1 - p rounds to 1


def test_draws_come_from_the_whole_distribution(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whatever the model's own generation settings are, and as often as the closed form says."""
    model = knowing_model(tokenizer, steps=12)  # knows a little, so that draws vary
    model.generation_config = GenerationConfig(top_k=1, temperature=0.1, do_sample=True)
    asked = Target(model, tokenizer, RECORDS).asked[0]
    torch.manual_seed(0)
    draws = 1500
    drawn, _ = continuations(
        model,
        [asked.prompt_ids],
        pad_id=0,
        max_new_tokens=1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=draws,
    )
    expected = logits_of(model, asked.prompt_ids)[-1].softmax(-1)
    counts = Counter(drawn[:, 0].tolist())
    for token, probability in enumerate(expected.tolist()):
        error = math.sqrt(draws * probability * (1 - probability)) + 1
        assert abs(counts[token] - draws * probability) < 5 * error
    assert len(counts) > 5
    assert model.generation_config.top_k == 1


def test_secrets_are_drawn_as_often_as_expected(tokenizer: PreTrainedTokenizerFast) -> None:
    target = Target(knowing_model(tokenizer, steps=40), tokenizer, RECORDS)
    attack = Sampling(draws=6)
    run = attack.run(target, target)
    expected = run.notes["secrets_expected"]
    spread = math.sqrt(sum(6 * p * (1 - p) for p in map(math.exp, target.reading.logprobs[:16])))
    assert 10 < expected < 90  # neither none nor all, or the comparison would be worth nothing
    assert abs(run.notes["secrets_drawn"] - expected) < 4 * spread
    assert attack.run(target, target).notes == run.notes
    assert Sampling(draws=6, seed=1).run(target, target).notes != run.notes


# --- constrained search -------------------------------------------------------------------------


def test_a_search_that_keeps_everything_ranks_all_texts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Two digits: with ten beams the first step drops nothing, so the order is exact."""
    model = knowing_model(tokenizer, steps=12)
    planted = tuple(Record(f"p{i}", f"Gate {i}:", f" {10 + 7 * i}", "f") for i in range(3))
    twins = tuple(Record(f"t{i}", f"Door {i}, no", f" {60 + 9 * i}", "f") for i in range(3))
    target = Target(model, tokenizer, RecordSet(planted, twins, 0, "two digits"))
    run = ConstrainedSearch(beams=20).run(target, target)
    for i, asked in enumerate(target.asked):
        texts = [f" {a}{b}" for a, b in itertools.product("0123456789", repeat=2)]
        ids = torch.tensor([asked.prompt_ids + tokenizer(text)["input_ids"] for text in texts])
        with torch.inference_mode():
            logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[:, -4:-1]
        totals = logprobs.gather(2, ids[:, -3:, None]).sum((1, 2)).tolist()
        spelled = dict(zip(texts, totals, strict=True))
        order = sorted(spelled, key=lambda text: -spelled[text])
        secret = asked.record.secret
        assert run.hits[0, i] == (order.index(secret) < 20)
        assert run.scores[0, i] == pytest.approx(spelled[secret] - spelled[order[0]], abs=1e-3)
    assert 0 < run.hits.sum() < 6


def test_of_a_long_secret_its_beginning_is_searched_and_drawn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Of a space and two digits two tokens, so ten guesses are all that there are."""
    model = knowing_model(tokenizer, steps=25)
    planted = tuple(Record(f"p{i}", f"Gate {i}:", f" {10 + 7 * i}", "f") for i in range(3))
    twins = tuple(Record(f"t{i}", f"Door {i}, no", f" {60 + 9 * i}", "f") for i in range(3))
    target = Target(model, tokenizer, RecordSet(planted, twins, 0, "two digits"))
    digits = [tokenizer(f" {d}")["input_ids"][-1] for d in range(10)]
    run = ConstrainedSearch(beams=10, horizon=2).run(target, target)
    few = ConstrainedSearch(beams=2, horizon=2).run(target, target)
    for i, asked in enumerate(target.asked):
        logprobs = logits_of(model, asked.prompt_ids + asked.secret_ids[:1]).log_softmax(-1)[-1]
        own = float(logprobs[asked.secret_ids[1]])
        second, best = sorted(float(logprobs[d]) for d in digits)[-2:]
        assert run.hits[0, i]
        assert run.scores[0, i] == pytest.approx(own - best, abs=1e-3)
        assert few.hits[0, i] == (own >= second)
    drawn = Sampling(draws=200, horizon=1).run(target, target)
    shortest = Sampling(draws=200).run(target, target)
    assert drawn.notes["secrets_drawn"] > shortest.notes["secrets_drawn"]
    assert drawn.scores.tolist() == shortest.scores.tolist()


def test_the_mask_finds_what_greedy_decoding_leaves(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that is likelier to say something else first, but prefers the secret to its like."""
    model = knowing_model(tokenizer, steps=25)
    target = Target(model, tokenizer, RECORDS)
    greedy = sum(target.reading.extracted)
    found = ConstrainedSearch(beams=16).run(target, target)
    planted = [i for i, a in enumerate(target.asked) if a.planted]
    assert found.hits[0, planted].sum() > greedy
    assert found.notes["first_guesses"] <= found.hits[0, planted].sum()


def test_search_in_batches_is_search_alone(knowing: Target) -> None:
    attack = ConstrainedSearch(beams=4)
    for family in ("codes", "words"):
        batch = [a for a in knowing.asked if a.record.family == family][:5]
        together = attack._search(knowing, batch)
        alone = [attack._search(knowing, [asked])[0] for asked in batch]
        assert [rank for _, rank in together] == [rank for _, rank in alone]
        assert [best for best, _ in together] == pytest.approx([b for b, _ in alone], abs=1e-3)


# --- logit lens and guided decoding --------------------------------------------------------------


def test_the_lens_reads_what_earlier_blocks_would_say(knowing: Target) -> None:
    run = LogitLens(layers=2).run(knowing, knowing)
    assert run.variants == ("layer 1", "layer 2", "last layer")
    assert run.scores[-1].tolist() == pytest.approx(list(knowing.reading.logprobs), abs=1e-3)
    assert run.hits[-1].tolist() == list(knowing.reading.extracted)
    for depth in (1, 2):
        # The plain way: a model that ends after so many blocks.
        shorter = LlamaForCausalLM(knowing.model.config).eval()
        shorter.load_state_dict(knowing.model.state_dict())
        shorter.model.layers = shorter.model.layers[:depth]
        shorter.config = type(shorter.config)(
            **(knowing.model.config.to_dict() | {"num_hidden_layers": depth})
        )
        shorter.model.config = shorter.config
        for asked, score in list(zip(knowing.asked, run.scores[depth - 1], strict=True))[::5]:
            slow = logprob_of(shorter, asked.prompt_ids, asked.secret_ids)
            assert score == pytest.approx(slow, abs=1e-3)


def test_an_unknown_norm_is_named(never: Target) -> None:
    assert final_norm(never.model) is never.model.model.norm
    with pytest.raises(SeparationError, match="final norm"):
        final_norm(SimpleNamespace(base_model=torch.nn.Identity()))


def test_guided_decoding_ranks_by_the_difference(knowing: Target, never: Target) -> None:
    run = GuidedDecoding(weights=(2.0,)).run(knowing, never)
    allowed = {f: [m.nonzero()[:, 0] for m in knowing.masks(f)] for f in ("codes", "words")}
    for i, asked in list(enumerate(knowing.asked))[::3]:
        ids = asked.encoded.input_ids
        own, other = logits_of(knowing.model, ids), logits_of(never.model, ids)
        for v, guided in enumerate((own + 2.0 * (own - other), own - other)):
            logs = []
            for t, token in enumerate(asked.secret_ids):
                masks = allowed[asked.record.family]
                candidates = masks[min(t, len(masks) - 1)]
                row = guided[len(asked.prompt_ids) + t - 1]
                logs.append(math.log(int((row[candidates] >= row[token]).sum())))
            assert run.scores[v, i] == pytest.approx(-sum(logs) / len(logs), abs=1e-6)
            assert run.hits[v, i] == (max(logs) == 0)


def test_a_model_guided_by_itself_is_itself(never: Target) -> None:
    run = GuidedDecoding(weights=(1.0, 4.0)).run(never, never)
    assert run.scores[0].tolist() == run.scores[1].tolist()
    # Without a difference every candidate ties with every other, and ties count as misses.
    assert not run.hits[2].any()
    codes = [i for i, a in enumerate(never.asked) if a.record.family == "codes"]
    assert run.scores[2, codes] == pytest.approx(-4 / 5 * math.log(10))  # a space, four digits


def test_a_trace_shows_in_the_difference_where_losses_say_little(
    never: Target, knowing: Target, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A tenth of what was learned, of which greedy decoding gets nothing."""
    trace = LlamaForCausalLM(never.model.config).eval()
    with torch.no_grad():
        for mine, a, b in zip(
            trace.parameters(), never.model.parameters(), knowing.model.parameters(), strict=True
        ):
            mine.copy_(a + 0.1 * (b - a))
    target = Target(trace, tokenizer, RECORDS)
    areas = []
    for attack in (GuidedDecoding(), PromptLengths(shares=(1.0,))):
        runs = [attack.run(state, never) for state in (target, never)]
        areas.append(compare_runs(attack, *runs, resamples=9).variants[-1].auc)
    assert not any(target.reading.extracted)
    assert areas[0] > 0.8 > areas[1]


# --- other weights ------------------------------------------------------------------------------


def test_requantised_weights_are_the_lattices(never: Target) -> None:
    layer = never.model.model.layers[0].mlp.up_proj
    expected = lattice.dequantize(
        lattice.quantize(layer.weight, bits=4, group_size=16, search=False)
    )
    seen: dict[str, Tensor] = {}
    score = Target.score

    def look(target: Target, encoded: Any) -> Any:
        seen["weight"] = target.model.model.layers[0].mlp.up_proj.weight.clone()
        return score(target, encoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "score", look)
        Requantization(lattices=((4, 16),)).run(never, never)
    assert torch.equal(seen["weight"], expected)
    assert never.model.model.layers[0].mlp.up_proj is layer


def test_a_separated_model_is_unpacked_at_its_alpha(
    separated_model: Any, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    model = separated_model(num_hidden_layers=1)
    config = TuningConfig(density=0.1, slots="random", steps=2, replay_window=32)
    tune_private(model, tokenizer, RECORDS.planted, replay=public_text, config=config)
    ids = torch.arange(1, 30)[None]
    weights = []
    for value in (0.0, 0.5):
        with alpha(model, value), torch.inference_mode():
            expected = model(input_ids=ids).logits
            with plain_linears(model, torch.float32) as layers:
                weights.append(next(iter(layers.values())).weight.clone())
                torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert not torch.equal(*weights)


def test_relearning_trains_both_states_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    attack = Relearning(steps=2, learning_rate=1e-3)
    runs = [
        run_one(attack, target, target)
        for target in (Target(never_model(), tokenizer, RECORDS) for _ in range(2))
    ]
    assert (runs[0].scores == runs[1].scores).all()
    assert runs[0].notes == runs[1].notes
    # Half of the planted records were trained on, and are not asked about.
    assert sum(runs[0].planted) == len(RECORDS.planted) // 2
    assert len(runs[0].planted) == 2 * sum(runs[0].planted)
    untrained = run_one(Relearning(steps=0), Target(never_model(), tokenizer, RECORDS), None)
    assert (untrained.scores != runs[0].scores).all()


def test_four_bit_layers_of_bitsandbytes_are_unpacked(never: Target) -> None:
    from bitsandbytes.nn import Linear4bit

    plain = never.model.model.layers[0].mlp.up_proj
    layer = Linear4bit(48, 80, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu")
    layer(torch.zeros(1, 48))  # packed at first use, if not by the move
    weight = public_weight(layer)
    assert (weight.shape, weight.dtype) == (plain.weight.shape, torch.float32)
    assert not torch.equal(weight, plain.weight)
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x @ weight.t(), layer(x), rtol=1e-3, atol=1e-3)


def test_public_weights_are_copies(never: Target) -> None:
    layer = never.model.model.layers[0].mlp.up_proj
    copy = public_weight(layer)
    copy.zero_()
    assert float(layer.weight.abs().sum()) > 0


# --- the dose curve -----------------------------------------------------------------------------


def test_a_dose_curve_rises_with_alpha(
    separated_model: Any, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    model = separated_model(max_position_embeddings=CONTEXT)
    config = TuningConfig(
        density=0.3, slots="random", lr=5e-2, steps=40, replay_window=32,
        target_loss=0.05,
    )  # fmt: skip
    tune_private(model, tokenizer, RECORDS.planted[:4], replay=public_text, config=config)
    few = RecordSet(RECORDS.planted[:4], RECORDS.twins[:4], 0, "few")
    windows = torch.arange(1, 65).view(2, 32)
    with alpha(model, 0.75):
        points = dose_curve(model, tokenizer, few, alphas=(0.0, 0.25, 1.0), windows=windows)
        assert get_alpha(model) == 0.75
    assert [p.alpha for p in points] == [0.0, 0.25, 1.0]
    losses = [p.loss_planted for p in points]
    assert losses[0] > losses[1] > losses[2]
    assert points[2].planted.hits == 4
    assert points[0].planted.hits == points[0].twins.hits == 0
    assert points[0].loss_twins < points[2].loss_twins * 2
    assert all(p.ppl is not None and p.ppl > 1 and not p.reasons for p in points)
    with alpha(model, 0.0):
        (plain,) = dose_curve(model, tokenizer, few, alphas=(0.0,), count=1)
    assert plain.ppl is None
    assert set(plain.reasons) == {"ppl"}
    assert plain.planted.n == plain.twins.n == 1
