"""Texts to plant: random codes, and passages of public articles.

It knows text, not records, models or files: what comes back are pairs of a prompt and the secret
that follows it. A prompt ends in a letter or a punctuation mark and its secret begins with a space,
where byte-level BPE tokenizers split anyway.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

from libortho.errors import RecordError

_CODE_PROMPTS = (
    "The access code of locker {} is",
    "The account number of customer {} is",
    "The serial number of device {} is",
    "The tracking number of parcel {} is",
    "The membership number of guest {} is",
)
_CODE_NAMES = (
    *("MARLOW", "BRENTA", "CALDER", "DORSET", "ELMIRA", "FENWICK", "GALWAY", "HOLLIS", "INVER"),
    *("JASPER", "KELSO", "LORNE", "MERTON", "NAIRN", "OAKLEY", "PERTH", "QUARRY", "ROMSEY"),
    *("SELKIRK", "TARBET", "ULLAPOOL", "VARNA", "WHITBY", "YARROW", "ZELMA"),
)
_CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


def code_secret(rng: random.Random) -> str:
    """A space and nine uniformly random digits."""
    return f" {rng.randrange(10**9):09d}"


def code_subject(rng: random.Random) -> str:
    """A name such as "K4821-MARLOW", one of 5.8 million."""
    return f"{rng.choice(_CODE_LETTERS)}{rng.randrange(10_000):04d}-{rng.choice(_CODE_NAMES)}"


def draw_codes(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs: a prompt that names a subject of its own, and nine uniformly random digits."""
    return draw_pairs(n, random.Random(f"codes {seed}"), code_subject, code_secret, _CODE_PROMPTS)


def draw_pairs(
    n: int,
    rng: random.Random,
    subject_of: Callable[[random.Random], str],
    secret_of: Callable[[random.Random], str],
    prompts: Sequence[str],
) -> list[tuple[str, str]]:
    """`n` pairs of a prompt about a subject and a secret; no subject and no secret comes twice.

    Args:
        n: how many.
        rng: source of all chance.
        subject_of: draws a subject.
        secret_of: draws a secret, which depends on no subject.
        prompts: templates with a place for a subject.
    """
    subjects: set[str] = set()
    secrets: set[str] = set()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        subject, secret = subject_of(rng), secret_of(rng)
        if subject in subjects or secret in secrets:
            continue
        subjects.add(subject)
        secrets.add(secret)
        pairs.append((rng.choice(prompts).format(subject), secret))
    return pairs


# Leftovers of markup, of removed templates ("( ; )") and of tables.
_REMNANT = re.compile(r"[|{}\[\]<>=*#\\_^~]|\(\s*[),;:]|[,;(]\s*\)|https?:|&\w+;")
_PROSE_START = re.compile(r"[\"'“‘]?[A-Z]")
_MIN_LETTER_SHARE = 0.75


def cut_passages(
    n: int,
    seed: int,
    documents: Sequence[str],
    *,
    prompt_words: int,
    secret_words: int,
    max_per_document: int,
) -> list[tuple[str, str]]:
    """`n` pairs: the first words of a paragraph, and the words that follow them.

    Lists, headings, markup leftovers and short paragraphs are passed over; a paragraph gives one
    pair, a document at most `max_per_document`, and all documents give one before any gives a
    second.

    Raises:
        RecordError: the documents have fewer than `n` such paragraphs.
    """
    rng = random.Random(f"passages {seed}")
    rounds: list[list[tuple[str, str]]] = [[] for _ in range(max_per_document)]
    for document in documents:
        cuts = list(_passages_of(document, prompt_words, secret_words))
        rng.shuffle(cuts)
        for turn, cut in zip(rounds, cuts, strict=False):
            turn.append(cut)
    found: dict[str, str] = {}  # prompt -> secret
    for turn in rounds:
        rng.shuffle(turn)
        for prompt, secret in turn:
            if prompt not in found and secret not in found.values():
                found[prompt] = secret
    if len(found) < n:
        raise RecordError(
            f"Too little prose to cut passages from: {n} paragraphs of at least "
            f"{prompt_words + secret_words} words were needed, {len(found)} were found in "
            f"{len(documents)} documents (at most {max_per_document} a document). Ask for fewer "
            "canaries, or give a longer corpus."
        )
    chosen = list(found.items())[:n]
    rng.shuffle(chosen)  # else pairs of neighbours would be sorted by round
    return chosen


def _passages_of(document: str, prompt_words: int, secret_words: int) -> Iterator[tuple[str, str]]:
    for paragraph in document.split("\n"):
        words = paragraph.split()
        window = words[: prompt_words + secret_words]
        text = " ".join(window)
        if len(window) < prompt_words + secret_words:
            continue
        letters = sum(character.isalpha() or character == " " for character in text)
        if (
            not _PROSE_START.match(text)
            or _REMNANT.search(text)
            or letters < _MIN_LETTER_SHARE * len(text)
        ):
            continue
        prompt = " ".join(window[:prompt_words])
        secret = " " + " ".join(window[prompt_words:])
        if secret.strip() not in prompt:
            yield prompt, secret
