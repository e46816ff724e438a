"""What attacks make of texts: the format of secrets, token masks, other prompts, the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attack_models import PER_FAMILY, never_model, record_set
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from libortho.attacks import PromptLengths, Target
from libortho.attacks.format import Format, Vocabulary, shape_of
from libortho.attacks.prompts import TEMPLATES, reword, subject_of
from libortho.records import EncodedRecord, Record, RecordSet

RECORDS = record_set()


@pytest.fixture(scope="module")
def target(tokenizer: PreTrainedTokenizerFast) -> Target:
    return Target(never_model(), tokenizer, RECORDS)


# --- formats ------------------------------------------------------------------------------------


def test_a_fixed_format_is_that_of_every_position() -> None:
    form = Format.of([" 12-3f", " 98-0a", " 40-77"])
    assert form.fixed
    assert form.positions == tuple(map(frozenset, (" ", "0", "0", "-", "0", "0a")))
    assert form.allows(shape_of(" 55-5c"), 0)
    assert not form.allows(shape_of(" 55-5g"), 0)  # no letter beyond f was seen: hexadecimal
    assert form.allows(shape_of("-5c"), 3)
    assert not form.allows(shape_of("-5c5"), 3)  # beyond the end
    assert not form.allows(shape_of("a"), 1)


def test_letters_beyond_f_open_the_whole_alphabet() -> None:
    form = Format.of(["abc-12", "xbc-12"])
    assert form.allows(shape_of("zzz-99"), 0)
    assert not form.allows(shape_of("Zzz-99"), 0)


def test_texts_of_other_lengths_share_an_alphabet() -> None:
    form = Format.of([" over the hill", " by, and by"])
    assert not form.fixed
    assert form.allows(shape_of(" under, a"), 0)
    assert form.allows(shape_of("under"), 1000)
    for outside in ("4", "The", "hill.", "é"):
        assert not form.allows(shape_of(outside), 0)


def test_no_example_is_no_format() -> None:
    with pytest.raises(ValueError, match="example"):
        Format.of([""])


@given(st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1))
def test_examples_fit_their_own_format(examples: list[str]) -> None:
    form = Format.of(examples)
    assert all(form.allows(shape_of(example), 0) for example in examples)


def test_the_format_is_that_of_twins_whatever_was_planted(
    target: Target, tokenizer: PreTrainedTokenizerFast
) -> None:
    odd = tuple(replace(r, secret=r.secret + "!Q7") for r in RECORDS.planted)
    other = Target(never_model(), tokenizer, RecordSet(odd, RECORDS.twins, 0, "other secrets"))
    assert other.formats == target.formats
    assert target.formats["codes"].fixed
    assert len(target.formats["codes"].positions) == 5
    assert not target.formats["words"].fixed


def test_masks_are_those_of_a_plain_loop(
    target: Target, tokenizer: PreTrainedTokenizerFast
) -> None:
    masks = target.masks("codes")
    assert masks.shape == (5, never_model().config.vocab_size)
    for position, mask in enumerate(masks):
        tokens = [tokenizer.decode([i]) for i in mask.nonzero()[:, 0].tolist()]
        assert sorted(tokens) == ([" "] if position == 0 else list("0123456789"))


def test_a_vocabulary_spells_what_the_tokenizer_decodes(
    target: Target, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = " a map of the coast, 1842"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vocabulary = Vocabulary(tokenizer, 300)
    assert vocabulary.text(ids) == text
    assert vocabulary.text([*ids, tokenizer.eos_token_id]) == text
    assert len(vocabulary.texts) == 300  # the head has more rows than there are tokens
    assert set(vocabulary.texts[len(tokenizer) :]) == {""}
    assert vocabulary.lengths.tolist() == [len(t) for t in vocabulary.texts]
    anything = Format.of(["ab 1", "abc, Z"])
    assert not vocabulary.allowed(anything, 0)[tokenizer.eos_token_id]


# --- prompts ------------------------------------------------------------------------------------


def test_subjects_are_identifiers() -> None:
    assert subject_of("The access code of locker K2047-PERTH is") == "K2047-PERTH"
    assert subject_of("From 3f2a-11 to B9") == "3f2a-11 B9"
    assert subject_of("The ferry leaves the harbour at noon") == ""


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_ask_for_the_same_secret(template: str) -> None:
    code = Record("c", "The code of locker K2047-PERTH is", " 123456", "codes")
    prose = Record("p", "The ferry leaves the harbour", " at noon", "passages")
    for record, subject in ((code, "K2047-PERTH"), (prose, prose.prompt)):
        other = reword(record, template)
        assert subject in other.prompt
        assert other.prompt != record.prompt
        assert not other.prompt[-1].isspace()
        assert (other.id, other.secret, other.family) == (record.id, record.secret, record.family)


def test_prompts_with_braces_are_taken_literally() -> None:
    record = Record("x", "fields {subject} of {0}", " none", "user")
    assert record.prompt in reword(record, "instruction").prompt


def test_shorter_prompts_keep_their_end(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EncodedRecord] = []

    def remember(encoded: list[EncodedRecord]) -> tuple[list[float], list[bool]]:
        seen.extend(encoded)
        return [-1.0] * len(encoded), [False] * len(encoded)

    monkeypatch.setattr(target, "score", remember)
    run = PromptLengths(shares=(0.001, 0.5)).run(target, target)
    assert run.scores.shape == (2, 4 * PER_FAMILY)
    whole = {a.record.id: a for a in target.asked}
    for i, short in enumerate(seen):
        asked = whole[short.id]
        prompt = asked.prompt_ids
        kept = 1 if i < len(seen) / 2 else -(-len(prompt) // 2)
        assert short.input_ids[: short.secret_start] == prompt[-kept:]
        assert short.input_ids[short.secret_start :] == asked.secret_ids


def test_tokens_that_open_a_text_stay(
    target: Target, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = target.asked[0]
    opened = first.encoded
    opened = EncodedRecord(
        opened.id,
        opened.family,
        [tokenizer.eos_token_id, *opened.input_ids],
        opened.secret_start + 1,
    )
    monkeypatch.setattr(target, "asked", (first._replace(encoded=opened), *target.asked[1:]))
    seen: list[EncodedRecord] = []
    monkeypatch.setattr(
        target, "score", lambda e: (seen.extend(e), ([0.0] * len(e), [False] * len(e)))[1]
    )
    PromptLengths(shares=(0.001,)).run(target, target)
    assert seen[0].input_ids[:2] == [tokenizer.eos_token_id, first.prompt_ids[-1]]


# --- which records are asked ---------------------------------------------------------------------


def test_a_choice_takes_of_every_family_and_keeps_pairs(target: Target) -> None:
    chosen = target.choose(6, seed=3)
    asked = [target.asked[i] for i in chosen]
    assert chosen == target.choose(6, seed=3)
    assert chosen != target.choose(6, seed=4)
    assert sum(a.planted for a in asked) == 6
    for planted in (True, False):
        families = [a.record.family for a in asked if a.planted == planted]
        assert families.count("codes") == families.count("words") == 3
    assert [i + 2 * PER_FAMILY for i in chosen[:6]] == chosen[6:]
    assert target.choose(None, 0) == list(range(4 * PER_FAMILY))
    assert target.choose(1000, 0) == list(range(4 * PER_FAMILY))


def test_a_choice_among_a_few_stays_there(target: Target) -> None:
    among = target.choose(4, seed=1)
    assert set(target.choose(2, seed=2, among=among)) < set(among)


def test_unpaired_twins_are_chosen_by_themselves(tokenizer: PreTrainedTokenizerFast) -> None:
    records = RecordSet(RECORDS.planted, RECORDS.twins[3:], 0, "fewer twins")
    target = Target(never_model(), tokenizer, records)
    asked = [target.asked[i] for i in target.choose(4, seed=0)]
    assert [a.planted for a in asked] == [True] * 4 + [False] * 4


def test_families_without_a_planted_record_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    codes = tuple(r for r in RECORDS.planted if r.family == "codes")
    target = Target(never_model(), tokenizer, RecordSet(codes, RECORDS.twins, 0, "codes only"))
    assert {a.record.family for a in target.asked} == {"codes"}
