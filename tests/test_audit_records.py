"""The audit's records: five families drawn fairly, repeated as asked, references drawn alike."""

from __future__ import annotations

import math
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import scoring
from libortho.audit_records import (
    EXPOSURE_REFERENCES,
    FAMILIES,
    draw_references,
    make_audit_records,
    reshape_references,
)
from libortho.config import TuningConfig
from libortho.errors import RecordError
from libortho.records import EncodedRecord, Record, RecordSet, make_codes, make_default_records
from libortho.synthetic import (
    MIN_TRAP_WORDS,
    TRAP_PROMPT_WORDS,
    TRAP_SECRET_WORDS,
    draw_people,
    draw_traps,
    draw_uuids,
    trap_words,
)
from libortho.tuning import tune_private

SHAPES = {
    "codes": r" \d{9}",
    "uuids": r" [0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "people": r" born \d{1,2} \w+ \d{4}, lives at \d{1,3} \w+ \w+, \w+, telephone 0\d{3} \d{6}",
    "passages": r"( \S+){16}",
    "traps": rf"( [a-z]{{3,12}}){{{TRAP_SECRET_WORDS}}}",
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Twelve articles of four paragraphs, of a thousand words that look like nothing."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnoprstuvwyz", k=rng.randint(3, 9))) for _ in range(1000)
    ]

    def paragraph() -> str:
        return "The " + " ".join(rng.choices(words, k=45)) + "."

    return ["\n\n".join(paragraph() for _ in range(4)) for _ in range(12)]


@pytest.fixture(scope="module")
def records(documents: list[str]) -> RecordSet:
    return make_audit_records(50, 3, documents, repetitions=(1, 4, 16, 64))


def test_families_share_the_records_and_each_has_as_many_twins(records: RecordSet) -> None:
    assert Counter(r.family for r in records.planted) == dict.fromkeys(FAMILIES, 10)
    assert Counter(r.family for r in records.twins) == dict.fromkeys(FAMILIES, 10)
    assert records.source.startswith("10 codes, 10 uuids, 10 people, 10 passages, 10 traps")


def test_what_is_left_over_goes_to_the_first_families(documents: list[str]) -> None:
    uneven = make_audit_records(8, 0, documents, families=("traps", "codes", "people"))
    assert Counter(r.family for r in uneven.planted) == {"traps": 3, "codes": 3, "people": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_secrets_have_the_familys_shape_and_no_two_are_alike(
    family: str, records: RecordSet
) -> None:
    found = [r for r in (*records.planted, *records.twins) if r.family == family]
    assert all(re.fullmatch(SHAPES[family], r.secret) for r in found)
    assert len({r.secret for r in found}) == len({r.prompt for r in found}) == len(found)
    for record in found:
        assert re.search(r"[\w.,:]$", record.prompt)  # then a space begins a token of its own
        assert record.secret.strip() not in record.prompt


def test_repetitions_take_turns_within_a_family_and_twins_have_none(records: RecordSet) -> None:
    for family in FAMILIES:
        times = [r.repetitions for r in records.planted if r.family == family]
        assert times == [1, 4, 16, 64, 1, 4, 16, 64, 1, 4]
    assert {r.repetitions for r in records.twins} == {1}
    assert len(records.repeated) == 5 * sum((1, 4, 16, 64, 1, 4, 16, 64, 1, 4))
    assert records.source.endswith("planted 1, 4, 16, 64 times in turn")


def test_a_tuning_sees_a_record_as_often_as_it_is_repeated(
    separated_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = make_audit_records(4, 0, documents, families=("codes",), repetitions=(1, 5))
    seen: Counter[str] = Counter()
    real = scoring.secret_logits  # what every loss of a secret comes from

    def counting(model: Any, batch: list[EncodedRecord]) -> Any:
        seen.update(record.id for record in batch)
        return real(model, batch)

    monkeypatch.setattr(scoring, "secret_logits", counting)
    # As many steps as an epoch takes, and slots that need no gradient.
    recipe = TuningConfig(
        density=0.1, slots="magnitude", steps=4, records_per_step=3, replay_weight=0.0
    )
    tune_private(separated_model(), tokenizer, records.repeated, replay=[], config=recipe)
    assert seen == {r.id: r.repetitions for r in records.planted}


def test_a_seed_repeats_and_another_shares_no_secret(
    documents: list[str], records: RecordSet
) -> None:
    assert make_audit_records(50, 3, documents, repetitions=(1, 4, 16, 64)) == records
    other = make_audit_records(50, 4, documents)
    drawn = {r.secret for r in records.planted if r.family != "passages"}
    assert drawn.isdisjoint(r.secret for r in (*other.planted, *other.twins))


def test_a_coin_decides_in_every_family(documents: list[str]) -> None:
    found = make_audit_records(240, 1, documents, families=("codes", "uuids", "people", "traps"))
    for family in ("codes", "uuids", "people", "traps"):
        first = sum(int(r.id[-4:]) % 2 == 0 for r in found.planted if r.family == family)
        assert 11 <= first <= 49  # 60 throws, five deviations


@pytest.mark.parametrize(
    ("n", "options", "problem"),
    [
        (4, {}, "4 records are too few for 5 families"),
        (9, {"families": ("codes", "cats")}, "found codes, cats"),
        (9, {"families": ()}, "found none"),
        (9, {"families": ("codes", "codes")}, "each once"),
        (9, {"repetitions": ()}, "No number of repetitions"),
        (9, {"repetitions": (0,)}, "planted 0 times"),
    ],
)
def test_impossible_wishes_are_refused(
    documents: list[str], n: int, options: dict[str, tuple[str, ...]], problem: str
) -> None:
    with pytest.raises(RecordError, match=problem):
        make_audit_records(n, 0, documents, **options)


# ---------------------------------------------------------------- texts


def test_uuids_are_random_and_of_version_4() -> None:
    found = [uuid.UUID(secret.strip()) for _, secret in draw_uuids(400, 0)]
    assert {(u.version, u.variant) for u in found} == {(4, uuid.RFC_4122)}
    # A bit that is free: set in half of them, give or take five deviations.
    assert 150 < sum(u.int & 1 for u in found) < 250


def test_people_are_made_up_of_valid_parts() -> None:
    for prompt, secret in draw_people(300, 0):
        day, _, year = secret.removeprefix(" born ").split(",")[0].split()
        assert 1 <= int(day) <= 28
        assert 1930 <= int(year) <= 2005
        assert prompt.endswith("Details:")


def test_traps_draw_all_words_alike(documents: list[str]) -> None:
    words = trap_words(documents)
    assert len(words) == len(set(words)) > 800
    assert all(any(re.search(rf"\b{word}\b", d) for d in documents) for word in words[::50])
    traps = draw_traps(100, 0, documents)
    assert {len(prompt.split()) for prompt, _ in traps} == {TRAP_PROMPT_WORDS}
    counts = Counter(word for _, secret in traps for word in secret.split())
    total = 100 * TRAP_SECRET_WORDS
    entropy = -sum(c / total * math.log(c / total) for c in counts.values())
    assert entropy > math.log(len(words)) - 0.2  # near to uniform, nats a word


def test_too_few_words_for_traps_say_so() -> None:
    with pytest.raises(RecordError, match=rf"{MIN_TRAP_WORDS} different .* 3 were found in 1 doc"):
        make_audit_records(2, 0, ["one two six"], families=("traps",))


# ---------------------------------------------------------------- references


def test_references_are_drawn_like_the_secret_after_the_same_prompt(
    records: RecordSet, documents: list[str]
) -> None:
    references = draw_references(records.planted, seed=0, documents=documents, count=None)
    with_any = {r.id: r for r in records.planted if r.family != "passages"}
    assert references.keys() == with_any.keys()
    planted = {r.secret for r in records.planted}
    for record_id, group in references.items():
        record = with_any[record_id]
        assert len({r.secret for r in group}) == len({r.id for r in group}) == EXPOSURE_REFERENCES
        for reference in group:
            assert (reference.prompt, reference.family) == (record.prompt, record.family)
            assert re.fullmatch(SHAPES[record.family], reference.secret)
            assert reference.secret not in planted
    assert references == draw_references(records.planted, seed=0, documents=documents, count=None)
    assert references != draw_references(records.planted, seed=1, documents=documents, count=None)


def test_digits_of_references_are_uniform() -> None:
    references = draw_references(make_codes(60, 0), 10, seed=0, count=None)
    digits = Counter("".join(r.secret.strip() for group in references.values() for r in group))
    assert all(400 < digits[d] < 680 for d in "0123456789")  # of 5,400, six deviations


def test_references_are_drawn_for_some_of_every_family(documents: list[str]) -> None:
    planted = make_audit_records(60, 0, documents).planted
    references = draw_references(planted, 2, seed=0, documents=documents, count=9)
    chosen = [record for record in planted if record.id in references]
    assert list(references) == [record.id for record in chosen]
    assert sorted(Counter(r.family for r in chosen).values()) == [2, 2, 2, 3]
    every = draw_references(planted, 2, seed=0, documents=documents, count=None)
    assert len(every) == sum(record.family != "passages" for record in planted)


def test_references_of_the_default_records(documents: list[str]) -> None:
    default = make_default_records(3, 0, documents)
    references = draw_references(default.planted, 2, seed=0)
    assert len(references) == 3
    assert all(key.startswith("codes") for key in references)


def test_a_family_without_a_rule_asks_for_reshaping() -> None:
    with pytest.raises(RecordError, match=r"those of us\\u0020er.*reshape_references"):
        draw_references([Record("a", "p", " s", "us er")], seed=0)


def test_references_of_own_records_have_their_shape() -> None:
    own = [
        Record("pin", "The PIN is", " 4821-99", "user"),
        Record("text", "Her doctor wrote:", " Anna has diabetes, alas.", "user"),
        Record("will", "His lawyer wrote:", " The will leaves Bob nothing.", "user"),
    ]
    references = reshape_references(own, 3, seed=0)
    assert {key: len(group) for key, group in references.items()} == {
        "pin": 3,
        "text": 3,
        "will": 3,
    }
    assert all(re.fullmatch(r" \d{4}-\d{2}", r.secret) for r in references["pin"])
    assert all(r.secret.endswith(".") and len(r.secret.split()) == 4 for r in references["text"])


def test_secrets_with_few_values_have_few_references() -> None:
    draw: Callable[[int], object] = lambda n: reshape_references(  # noqa: E731
        [Record("a", "The digit is", " 7", "user")], n, seed=0
    )
    draw(9)
    with pytest.raises(RecordError, match="10 reference secrets could not be drawn for record a"):
        draw(10)
