"""Records: drawn fairly, read strictly, never shown."""

import dataclasses
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from libortho.errors import RecordError
from libortho.records import (
    EncodedRecord,
    Record,
    RecordSet,
    encode,
    load_records,
    make_codes,
    make_default_records,
    make_passages,
    plant,
    record_hash,
    safe_id,
    write_records,
)

SECRET = "zq hunter2 zq"


def prose(article: int, paragraph: int) -> str:
    names = "abcdefghij"
    mark = names[article % 10] + names[paragraph % 10] + names[paragraph // 10]
    return "Here " + " ".join(f"word{mark}{names[i % 10]}" for i in range(40)) + " ends."


def articles(count: int, paragraphs: int) -> list[str]:
    return [
        "\n\n".join(prose(article, paragraph) for paragraph in range(paragraphs))
        for article in range(count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_lines(*lines: str | bytes | dict[str, Any]) -> Path:
        path = tmp_path / "records.jsonl"
        raw = [
            line
            if isinstance(line, bytes)
            else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        path.write_bytes(b"\n".join(raw))
        return path

    return write_lines


def tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level tokens, with special tokens around a text as asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


# ---------------------------------------------------------------- generated records


def test_codes_are_nine_digits_each_after_a_prompt_of_its_own() -> None:
    codes = make_codes(500, seed=1)
    assert len({code.prompt for code in codes}) == len({code.secret for code in codes}) == 500
    for code in codes:
        assert code.secret[0] == " "
        assert len(code.secret) == 10
        assert code.secret[1:].isdigit()
        assert not code.prompt.endswith(" ")
    # Uniform digits: 4,500 draws, each value expected 450 times with a deviation of 20.
    digits = "".join(code.secret[1:] for code in codes)
    assert all(350 < digits.count(digit) < 550 for digit in "0123456789")


def test_a_seed_repeats_and_another_seed_differs() -> None:
    documents = articles(10, 4)
    first = make_default_records(4, 0, documents)
    assert first == make_default_records(4, 0, documents)
    other = make_default_records(4, 1, documents)
    assert first.fingerprint != other.fingerprint
    assert {r.secret for r in first.planted if r.family == "codes"}.isdisjoint(
        r.secret for r in other.planted
    )


def test_passages_are_consecutive_words_of_one_paragraph() -> None:
    documents = articles(6, 3)
    for passage in make_passages(12, 0, documents):
        text = passage.prompt + passage.secret
        assert any(text in document for document in documents)
        assert len(passage.prompt.split()) == len(passage.secret.split()) == 16


def test_passages_spread_over_documents_and_keep_to_the_limit() -> None:
    documents = articles(5, 6)
    texts = [p.prompt + p.secret for p in make_passages(15, 0, documents)]
    assert [sum(text in document for text in texts) for document in documents] == [3] * 5
    few = [p.prompt + p.secret for p in make_passages(5, 0, documents)]
    assert [sum(text in document for text in few) for document in documents] == [1] * 5


@pytest.mark.parametrize(
    "bad",
    [
        "Too short to cut anything from.",
        "* " + prose(0, 0),
        "== " + prose(0, 0) + " ==",
        prose(0, 0).replace("Here", "Here [[link"),
        "lower " + prose(0, 0),
        "In " + " ".join(str(number) for number in range(1990, 2040)),
        "Here ( ; ) " + prose(0, 0),
    ],
)
def test_what_is_not_prose_is_passed_over(bad: str) -> None:
    with pytest.raises(RecordError, match="0 were found"):
        make_passages(1, 0, [bad])


def test_too_little_prose_says_found_and_needed() -> None:
    with pytest.raises(RecordError, match=r"9 paragraphs .* 6 were found in 2 documents"):
        make_passages(9, 0, articles(2, 5))


def test_many_default_records_may_take_more_than_three_passages_a_document() -> None:
    records = make_default_records(10, 0, articles(4, 12))
    assert sum(record.family == "passages" for record in records.planted) == 10


def test_planting_is_a_fair_coin_within_each_pair() -> None:
    codes = make_codes(400, 0)
    records = plant([codes], seed=5)
    planted = {record.id for record in records.planted}
    first_of_pair = 0
    for one, other in zip(codes[::2], codes[1::2], strict=True):
        assert (one.id in planted) != (other.id in planted)
        first_of_pair += one.id in planted
    assert 65 < first_of_pair < 135  # 200 throws, five deviations
    assert {record.id for record in records.twins} == {c.id for c in codes} - planted


def test_an_odd_family_cannot_be_paired() -> None:
    with pytest.raises(RecordError, match="family of 3"):
        plant([make_codes(3, 0)], seed=0)


# ---------------------------------------------------------------- what is shown of them


def test_reprs_show_ids_only() -> None:
    record = Record("a", f"prompt {SECRET}", SECRET, "user")
    twin = Record("b", "other", "nothing", "user")
    encoded = EncodedRecord("a", "user", [11, 22, 33], 1)
    shown = repr(record) + repr(RecordSet((record,), (twin,), 0, "test")) + repr(encoded)
    assert SECRET not in shown
    assert "prompt" not in shown
    assert "22" not in shown
    assert "'a'" in shown


def test_safe_ids_have_no_odd_characters_and_an_end() -> None:
    assert safe_id("codes-0001.twin") == "codes-0001.twin"
    assert safe_id("a b\n\x1b[31m/é") == r"a\u0020b\u000a\u001b\u005b31m\u002f\u00e9"
    assert len(safe_id("x" * 1000)) == 64


def test_record_hash_is_hmac_sha256() -> None:
    record = Record("a", "p", "s", "user")
    # printf '["p","s"]' | openssl dgst -sha256 -hmac salt
    assert record_hash(record, "salt") == record_hash(record, b"salt") == HMAC_OF_P_S
    assert record_hash(record, "other") != HMAC_OF_P_S
    assert record_hash(dataclasses.replace(record, secret="t"), "salt") != HMAC_OF_P_S
    with pytest.raises(ValueError, match="salt"):
        record_hash(record, b"")


HMAC_OF_P_S = "32a3c36cdbb8896f"


def test_a_set_made_before_keeps_its_fingerprint() -> None:
    # Of the first release's code: cached tunings are found by it.
    codes = plant([make_codes(4, 0)], seed=0)
    assert codes.fingerprint.startswith(FINGERPRINT_OF_TWO_CODES)
    again = dataclasses.replace(codes.planted[0], repetitions=4)
    changed = dataclasses.replace(codes, planted=(again, *codes.planted[1:]))
    assert changed.fingerprint != codes.fingerprint


FINGERPRINT_OF_TWO_CODES = "6bf8013f3166f332"


@pytest.mark.parametrize("part", ["id", "prompt", "secret", "family"])
def test_every_field_changes_the_fingerprint(part: str) -> None:
    record = Record("a", "p", "s", "user")
    twin = Record("b", "q", "t", "user")
    base = RecordSet((record,), (twin,), 0, "test")
    changed = dataclasses.replace(record, **{part: "other"})
    assert RecordSet((changed,), (twin,), 0, "test").fingerprint != base.fingerprint
    changed = dataclasses.replace(twin, **{part: "other"})
    assert RecordSet((record,), (changed,), 0, "test").fingerprint != base.fingerprint
    assert dataclasses.replace(base, seed=1).fingerprint != base.fingerprint
    assert dataclasses.replace(base, source="words").fingerprint == base.fingerprint


def test_a_twin_with_a_planted_secret_is_no_control() -> None:
    record = Record("a", "p", " s", "user")
    with pytest.raises(RecordError, match="no control"):
        RecordSet((record,), (Record("b", "q", "s", "user"),), 0, "test")
    with pytest.raises(RecordError, match="occurs twice"):
        RecordSet((record, record), (), 0, "test")


def test_repeated_is_what_one_epoch_shows() -> None:
    codes = make_codes(6, 0)
    planted = tuple(
        dataclasses.replace(code, repetitions=times)
        for code, times in zip(codes[:3], (1, 4, 2), strict=True)
    )
    records = RecordSet(planted, tuple(codes[3:]), 0, "test")
    assert [record.id for record in records.repeated] == [
        "codes-0000",
        *["codes-0001"] * 4,
        *["codes-0002"] * 2,
    ]


@pytest.mark.parametrize("times", [0, -1, 1.0, True, "2"])
def test_impossible_repetitions_are_refused_without_the_record(times: Any) -> None:
    with pytest.raises(RecordError, match=r"a\\u0020b is to be planted .* times") as caught:
        Record("a b", f"prompt {SECRET}", SECRET, "user", times)
    assert SECRET not in str(caught.value)


# ---------------------------------------------------------------- record files


def good(number: int = 1, **changes: Any) -> dict[str, Any]:
    fields = {"id": f"r{number}", "prompt": f"Code {number}:", "secret": f" 48392017{number}"}
    return fields | changes


BAD_LINES: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "cut off": (f'{{"secret": "{SECRET}"', "not valid JSON"),
    "list": (f'["{SECRET}"]', "JSON list, not an object"),
    "nested too deep": ("[" * 100_000, "not valid JSON"),
    "null": (good(secret=None, prompt=SECRET), '"secret" is missing'),
    "field missing": ({"id": "x", "prompt": SECRET}, '"secret" is missing'),
    "list in field": (good(secret=[SECRET]), '"secret" is a list, not a string'),
    "number in field": (good(secret=12345678), '"secret" is a int, not a string'),
    "blank prompt": (good(prompt=" ", secret=SECRET), '"prompt" is empty'),
    "empty id": (good(id="", secret=SECRET), '"id" is empty'),
    "family": (good(family=3, secret=SECRET), '"family" is a int'),
    "planted": (good(planted="no", secret=SECRET), "neither true nor false"),
    "surrogate": (good(secret=SECRET + "\ud800"), "lone surrogate"),
    "told": (good(prompt=f"It is {SECRET}:", secret=f" {SECRET}"), "within its own prompt"),
    "no repetitions": (good(repetitions=0, secret=SECRET), '"repetitions" is no whole number'),
    "half repetitions": (good(repetitions=1.5, secret=SECRET), '"repetitions" is no whole number'),
    "true repetitions": (good(repetitions=True, secret=SECRET), '"repetitions" is no whole'),
    "misspelt field": (good(plantd=False, secret=SECRET), "none of family, id"),
    "same id": (good(1, prompt="new", secret=SECRET), "id is the same as that of line 1"),
    "same prompt": (good(2, prompt="Code 1:", secret=SECRET), "prompt is the same as that of line"),
    "not UTF-8": (f"{SECRET} ".encode() + b"\xff", "byte .* of the file is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_by_number_and_never_shown(
    write: Callable[..., Path], case: str
) -> None:
    line, problem = BAD_LINES[case]
    path = write(good(), "", line)
    with pytest.raises(RecordError, match=problem) as caught:
        load_records(path, seed=0)
    text = str(caught.value)
    assert f"{path}, line 3" in text
    assert "12345678" not in text
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_tracebacks_that_print_arguments_show_no_content(write: Callable[..., Path]) -> None:
    path = write(good(secret=SECRET, family=3))
    with pytest.raises(RecordError) as caught:
        load_records(path, seed=0)
    assert SECRET not in str(caught.getrepr(showlocals=False, funcargs=True, style="long"))


def test_files_that_hold_nothing_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(RecordError, match="can't be read"):
            load_records(path, seed=0)
    with pytest.raises(RecordError, match="no record to plant"):
        load_records(write("", "  "), seed=0)
    with pytest.raises(RecordError, match="1 twins"):
        load_records(write(good(planted=False)), seed=0)


def test_generated_twins_have_the_shape_and_nothing_of_the_planted(
    write: Callable[..., Path],
) -> None:
    path = write(
        {"id": "pin", "prompt": "Card 17 of Kim:", "secret": " 4839-2017"},
        {"id": "key", "prompt": "The API key is", "secret": " sk-Ab3dEf9Z"},
        {"id": "uuid", "prompt": "Node", "secret": "550e8400-e29b-41d4-a716-446655440000"},
        {"id": "word", "prompt": "The password is", "secret": " swordfish"},
        {"id": "text", "prompt": "Her doctor wrote:", "secret": " Anna has type 2 diabetes, alas."},
        {"id": "other", "prompt": "His lawyer wrote:", "secret": " The will leaves Bob nothing."},
        {"id": "tongue", "prompt": "Пароль", "secret": " Жираф"},
    )
    records = load_records(path, seed=0)
    assert records.source == "record file, twins generated"
    twins = {twin.id.removesuffix(".twin"): twin for twin in records.twins}
    for record in records.planted:
        twin = twins[record.id]
        assert twin.secret != record.secret
        assert len(twin.secret.split()) == len(record.secret.split())
        assert twin.secret.startswith(" ") == record.secret.startswith(" ")
    assert [c.isdigit() for c in twins["pin"].secret] == [c.isdigit() for c in " 4839-2017"]
    assert twins["pin"].prompt.startswith("Card ")
    assert twins["pin"].prompt.endswith(" of Kim:")
    assert twins["key"].secret[3] == "-"
    assert [c.isupper() for c in twins["key"].secret] == [c.isupper() for c in " sk-Ab3dEf9Z"]
    assert set(twins["uuid"].secret) <= set("0123456789abcdef-")
    assert twins["word"].secret.strip().isalpha()
    assert twins["word"].prompt == "The password is"
    known = {"swordfish", "the", "will", "leaves", "bob", "nothing", "sk"}
    drawn = {word.strip(".,").lower() for word in twins["text"].secret.split()}
    assert {word for word in drawn if word.isascii() and word.isalpha()} <= known
    assert twins["text"].secret.endswith(".")
    assert load_records(path, seed=0) == records
    assert load_records(path, seed=1).twins != records.twins


@given(st.text("abXY019 -_.éЖ字", min_size=1, max_size=30).filter(str.strip), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_secret_gets_a_different_twin_or_a_clear_refusal(
    tmp_path_factory: pytest.TempPathFactory, secret: str, seed: int
) -> None:
    path = tmp_path_factory.mktemp("twins") / "records.jsonl"
    write_records(
        path,
        [
            Record("a", "The prompt =", secret, "user"),
            Record("b", "And ?", " some more words", "user"),
        ],
    )
    try:
        records = load_records(path, seed=seed)
    except RecordError as error:
        assert "twins of your own" in str(error) or "own prompt" in str(error)  # noqa: PT017
        return
    twin = records.twins[0]
    assert twin.secret.strip() != secret.strip()
    assert len(twin.secret.split()) == len(secret.split())


def test_a_secret_with_no_other_value_asks_for_own_twins(write: Callable[..., Path]) -> None:
    path = write(
        *({"id": str(d), "prompt": f"p{'abcdefghij'[d]}x", "secret": f" {d}"} for d in range(10))
    )
    with pytest.raises(RecordError, match="twins of your own"):
        load_records(path, seed=0)


def test_own_twins_are_used_and_survive_a_round_trip(tmp_path: Path) -> None:
    planted = make_codes(6, 0)[:3]
    twins = make_codes(6, 0)[3:]
    odd = Record("odd é/", 'line\nbreak \u2028 "quoted"', " naïve 秘密", "text", repetitions=16)
    path = tmp_path / "records.jsonl"
    write_records(path, [*planted, odd], twins)
    records = load_records(path, seed=7)
    assert records.planted == (*planted, odd)
    assert records.twins == tuple(twins)
    assert records.source == "record file with twins of its own"
    assert records.seed == 7


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines = "\r\n".join(json.dumps(good(number)) for number in (1, 2))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
    assert [record.id for record in load_records(path, seed=0).planted] == ["r1", "r2"]


# ---------------------------------------------------------------- token ids


def test_encoding_is_the_prompt_then_the_secret() -> None:
    record = Record("a", "It is", " 48", "user")
    encoded = encode(tokenizer(), [record], 8)[0]
    whole = tokenizer()("It is 48")["input_ids"]
    assert encoded == EncodedRecord("a", "user", whole, 5)
    assert tokenizer().decode(encoded.input_ids[encoded.secret_start :]) == " 48"


def test_special_tokens_come_first_only_and_only_if_the_tokenizer_adds_them() -> None:
    record = Record("a", "It is", " 48", "user")
    plain = encode(tokenizer(), [record], 9)[0].input_ids
    both = encode(tokenizer(bos=True, eos=True), [record], 9)[0]
    assert both.input_ids == [0, *plain]
    assert both.secret_start == 6


def test_records_that_do_not_fit_are_refused_without_their_text() -> None:
    record = Record("a b", "It is", f" {SECRET}", "user")
    total = len(f"It is {SECRET}")
    with pytest.raises(RecordError, match=f"has {total} tokens, and at most {total - 1} fit") as e:
        encode(tokenizer(), [record], total - 1)
    assert r"a\u0020b" in str(e.value)
    assert SECRET not in str(e.value)
    encode(tokenizer(), [record], total)


def test_a_secret_without_tokens_is_refused() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, merges=[]))  # drops what it doesn't know
    letters = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(RecordError, match="secret of record r gives no token"):
        encode(letters, [Record("r", "ab", " 42", "user")], 8)
    with pytest.raises(RecordError, match="prompt of record r gives no token"):
        encode(letters, [Record("r", "42", " ab", "user")], 8)
