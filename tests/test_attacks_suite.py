"""Every attack on a model that knows nothing, and on one that knows the planted records."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from attack_models import knowing_model, never_model, record_set, secrets_of, weights_of
from transformers import PreTrainedTokenizerFast

from libortho import attacks
from libortho.attacks import (
    Attack,
    AttackResult,
    BenignRelearning,
    GuidedDecoding,
    LogitLens,
    ParaphrasedPrompts,
    PromptLengths,
    Relearning,
    Requantization,
    default_attacks,
    relearning_attacks,
    run_attacks,
)
from libortho.errors import RecordError
from libortho.records import RecordSet
from libortho.statistics import holm
from libortho.typed_json import check_json_values, from_json

RECORDS = record_set()


def all_attacks(public_text: list[str], records: int) -> tuple[Attack, ...]:
    """Every attack, at a budget that tiny models need."""
    small: dict[str, dict[str, Any]] = {
        "sampling": {"draws": 3},
        "constrained search": {"beams": 4},
        "relearning on half of the records": {"steps": 3, "learning_rate": 1e-4},
        "benign relearning": {"steps": 3, "learning_rate": 1e-4, "window_tokens": 32},
    }
    twice = ("paraphrased prompts", "relearning on half of the records")
    return tuple(
        replace(
            attack,
            records=2 * records if attack.name in twice else records,
            **small.get(attack.name, {}),
        )
        for attack in (*default_attacks(), *relearning_attacks(public_text))
    )


@pytest.fixture(scope="module")
def everything(public_text: list[str]) -> tuple[Attack, ...]:
    return all_attacks(public_text, 8)


@pytest.fixture(scope="module")
def clean(
    everything: tuple[Attack, ...], tokenizer: PreTrainedTokenizerFast
) -> dict[str, AttackResult]:
    results = run_attacks(
        never_model(), never_model(), tokenizer, RECORDS, attacks=everything, resamples=999
    )
    return {r.name: r for r in results}


@pytest.fixture(scope="module")
def leaky(
    everything: tuple[Attack, ...], tokenizer: PreTrainedTokenizerFast
) -> dict[str, AttackResult]:
    results = run_attacks(
        knowing_model(tokenizer), never_model(), tokenizer, RECORDS, attacks=everything
    )
    return {r.name: r for r in results}


def test_a_change_that_no_record_caused_is_no_leak(tokenizer: PreTrainedTokenizerFast) -> None:
    """The off state differs from the control, on planted records and twins alike."""
    changed = copy.deepcopy(never_model())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    quick = [LogitLens(), GuidedDecoding(), PromptLengths(), ParaphrasedPrompts(), Requantization()]
    results = run_attacks(changed, never_model(), tokenizer, RECORDS, attacks=quick, resamples=999)
    assert any(abs(v.effect) > 0 for r in results for v in r.variants)
    assert min(holm([r.p_value for r in results])) > 0.05


NAMES = [a.name for a in (*default_attacks(), *relearning_attacks(["text"]))]


def test_nine_attacks_have_names_of_their_own() -> None:
    assert len(set(NAMES)) == 9


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_where_nothing_is(name: str, clean: dict[str, AttackResult]) -> None:
    result = clean[name]
    assert not result.beats_never
    assert result.p_value == 1.0  # both states are one: no gain differs from zero
    assert result.off_planted == result.never_planted
    assert result.off_twins == result.never_twins
    assert {v.auc for v in result.variants} == {0.5}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_knows_is_found_out(name: str, leaky: dict[str, AttackResult]) -> None:
    result = leaky[name]
    assert result.beats_never
    assert result.p_value < 0.01
    assert result.effect > 0
    assert result.auc > 0.9
    assert result.never_planted.hits == result.never_twins.hits == result.off_twins.hits == 0
    if name != "paraphrased prompts":  # which the small model hears as other texts
        assert result.off_planted.hits >= result.off_planted.n / 2
    planted = {r.id for r in RECORDS.planted}
    assert set(result.extracted) <= planted
    assert len(result.extracted) == result.off_planted.hits


def test_corrected_for_their_number_they_still_find_it(leaky: dict[str, AttackResult]) -> None:
    assert max(holm([r.p_value for r in leaky.values()])) <= 0.05


def test_results_are_json_without_secrets(leaky: dict[str, AttackResult]) -> None:
    for result in leaky.values():
        fields = asdict(result)
        check_json_values(fields)
        text = json.dumps(fields)
        assert from_json(AttackResult, json.loads(text)) == result
        # Strings only: four digits of some number may well be a code's.
        for shown in re.findall(r'"[^"]*"|\'[^\']*\'', text + repr(result)):
            assert not any(secret in shown for secret in secrets_of(RECORDS))
            assert not any(r.prompt in shown for r in RECORDS.planted)
        nulls = {name for name, value in fields.items() if value is None}
        assert nulls == set(result.reasons)


def test_what_was_asked_and_of_how_many_is_stated(leaky: dict[str, AttackResult]) -> None:
    result = leaky["sampling"]
    assert (result.settings["records"], result.settings["seed"]) == (8, 0)
    assert result.off_planted.n == result.off_twins.n == 8
    assert (result.planted_in_set, result.twins_in_set) == (16, 16)


def test_public_text_stays_out_of_settings(leaky: dict[str, AttackResult]) -> None:
    result = leaky["benign relearning"]
    assert result.settings["steps"] == 3
    assert "documents" not in result.settings
    assert "documents" not in repr(BenignRelearning(documents=["some text"]))


def test_costs_are_counted(leaky: dict[str, AttackResult]) -> None:
    for result in leaky.values():
        for cost in (result.cost_off, result.cost_never):
            assert cost.forward_tokens > 0
            assert cost.seconds > 0
        assert result.cost_off.forward_tokens == result.cost_never.forward_tokens
    # The lens and guided decoding make no pass of their own.
    assert leaky["logit lens"].cost_off.forward_tokens == (
        leaky["guided decoding"].cost_off.forward_tokens
    )


def test_models_are_left_as_they_were(
    tokenizer: PreTrainedTokenizerFast, separated_model: Any, public_text: list[str]
) -> None:
    model = separated_model(num_hidden_layers=1, max_position_embeddings=192)
    before = weights_of(model), [type(m) for m in model.modules()], model.generation_config
    flags = [p.requires_grad for p in model.parameters()]
    few = all_attacks(public_text, 2)
    run_attacks(model, model, tokenizer, RECORDS, attacks=few, resamples=9)
    after = weights_of(model)
    assert before[0].keys() == after.keys()
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert [type(m) for m in model.modules()] == before[1]
    assert model.generation_config is before[2]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.base_model._forward_pre_hooks
    assert all(m.held_dtype is None for m in model.modules() if hasattr(m, "held_dtype"))


def test_nothing_planted_or_no_twins_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for planted, twins in ((RECORDS.planted, ()), ((), RECORDS.twins)):
        records = RecordSet(planted, twins, 0, "half a set")
        with pytest.raises(RecordError, match="twins"):
            run_attacks(never_model(), never_model(), tokenizer, records)


def test_relearning_needs_two_records(tokenizer: PreTrainedTokenizerFast) -> None:
    one = RecordSet(RECORDS.planted[:1], RECORDS.twins[:1], 0, "one record")
    with pytest.raises(RecordError, match="too few"):
        run_attacks(never_model(), never_model(), tokenizer, one, attacks=[Relearning()])


def test_broken_models_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = type(never_model())(never_model().config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        run_attacks(broken, never_model(), tokenizer, RECORDS, attacks=[attacks.LogitLens()])
