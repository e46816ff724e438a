"""The Wikipedia articles of the `enwiki` corpus: from a MediaWiki dump to plain text.

Knows: the dump's XML, wiki markup, which sections are prose. Doesn't know: splits.
The dump is a shortened one that gensim ships as test data; its text is CC BY-SA, so it is fetched
and not redistributed.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tqdm import tqdm

from libortho.errors import CorpusError
from libortho.fetch import WheelFile, cache_folder, fetch_from_wheel
from libortho.files import atomic_write_text

ENWIKI_DUMP = WheelFile(
    distribution="gensim",
    version="4.4.0",
    member=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    ),
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    size_bytes=1_695_871,
    wheel_bytes=27_809_988,
    pip_platform_args=(
        "--platform=manylinux_2_24_x86_64",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
    ),
)

# Raise when the cleaned text changes, so that caches made before are not read again.
CLEANING_VERSION = 1
# Shorter pages are stubs. Unit: characters of cleaned text.
MIN_ARTICLE_CHARACTERS = 2000

_SECTION = re.compile(r"^(==[^=\n]+==)[ \t]*$", re.MULTILINE)
_LIST_TITLE = re.compile(r"List of | \(disambiguation\)$")
_NOT_PROSE = {
    "see also",
    "references",
    "external links",
    "notes",
    "notes and references",
    "footnotes",
    "citations",
    "sources",
    "further reading",
    "bibliography",
}
_DROPPED_TAGS = {"table", "ref", "gallery", "math", "timeline"}
_DROPPED_LINKS = re.compile(r"\s*:?(file|image|category)\s*:", re.IGNORECASE)

# What dropped templates and markup leave behind, and what takes its place.
_TIDY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"'{2,5}", ""),  # bold and italics
        (r"__[A-Z]+__", ""),  # magic words
        (r"[\xa0\t]", " "),
        (r" ?\(\s*(?:[;,]\s*)*\)", ""),  # brackets that held only a template
        (r"([(\[])\s*[;,]\s*", r"\1"),
        (r" +([,;.)\]])", r"\1"),
        (r" {2,}", " "),
        (r" *\n *", "\n"),
        (r"\n{3,}", "\n\n"),
    )
)


@dataclass(frozen=True)
class Article:
    title: str
    text: str


def load_articles(cache_dir: str | Path | None = None) -> tuple[Article, ...]:
    """The cleaned articles in the dump's order; fetched and cleaned once, then read from the cache.

    Raises `FetchError` if the dump can't be fetched.
    """
    name = f"enwiki-{ENWIKI_DUMP.sha256[:8]}-v{CLEANING_VERSION}.jsonl"
    cached = cache_folder(cache_dir) / "corpora" / name
    articles = _read_cached(cached)
    if articles is None:
        pages = list(_pages(fetch_from_wheel(ENWIKI_DUMP, cache_dir)))
        # disable=None: no bar where the output is not a terminal.
        bar = tqdm(pages, desc="cleaning articles", unit="article", disable=None)
        cleaned = (Article(title, clean(markup)) for title, markup in bar)
        articles = tuple(a for a in cleaned if len(a.text) >= MIN_ARTICLE_CHARACTERS)
        body = "".join(json.dumps([a.title, a.text]) + "\n" for a in articles)
        atomic_write_text(cached, _checksum(body) + "\n" + body)
    return articles


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _read_cached(path: Path) -> tuple[Article, ...] | None:
    """The articles, or None if there is no cache or someone has changed it: then it is rebuilt."""
    try:
        checksum, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if checksum != _checksum(body):
        return None
    return tuple(Article(*json.loads(line)) for line in body.splitlines())


def _pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of each article: namespace 0, no redirects, no pages that are lists."""
    try:
        with bz2.open(dump) as file:
            for _, element in ElementTree.iterparse(file):
                if not element.tag.endswith("}page"):
                    continue
                title = element.findtext("{*}title")
                markup = element.findtext("{*}revision/{*}text")
                is_article = (
                    element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
                )
                if title and markup and is_article and not _LIST_TITLE.search(title):
                    yield title, markup
                element.clear()
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise CorpusError(
            f"The Wikipedia dump {dump} can't be read ({error}). Delete it, and try again: it will "
            "be fetched anew."
        ) from error


def clean(markup: str) -> str:
    """Wiki markup to paragraphs of prose, separated by blank lines.

    Drops templates, tables, references, file and category links, and sections that are lists of
    links; keeps link texts, section titles and running text.
    """
    # Parsed once and cached: a machine that only reads the cache, or never does, needs no parser.
    import mwparserfromhell  # noqa: PLC0415

    lead, *sections = _SECTION.split(markup)
    prose = lead
    for heading, body in zip(sections[::2], sections[1::2], strict=True):
        if heading.strip("= ").lower() not in _NOT_PROSE:
            prose += f"{heading}\n{body}"
    # Style tags stay text: parsing quotes is slow, and one pattern removes them below.
    code = mwparserfromhell.parse(prose, skip_style_tags=True)
    code.nodes = [node for node in code.nodes if _is_prose(node)]
    text = code.strip_code(normalize=True, collapse=True)
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def _is_prose(node: Any) -> bool:
    from mwparserfromhell.nodes import Tag, Wikilink  # noqa: PLC0415

    if isinstance(node, Tag):
        return str(node.tag).strip().lower() not in _DROPPED_TAGS
    if isinstance(node, Wikilink):
        return _DROPPED_LINKS.match(str(node.title)) is None
    return True
