"""Texts of the same shape: the raw material of unplanted twins for records that users bring.

It knows characters and words, not records, models or files. The rule goes by runs of letters and
digits: a run with a digit in it, or in capitals, is an identifier, and each of its characters is
drawn anew within its own class; a run of a secret that consists of several words is a word, and
another word is drawn for it. Everything else (spaces, punctuation) stays where it is.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

_RUN = re.compile(r"[^\W_]+")
_HEX_LOWER = "abcdef"


def is_identifier(run: str) -> bool:
    """Whether a run of letters and digits reads as an identifier, not as a word."""
    return any(character.isdigit() for character in run) or (len(run) > 1 and run.isupper())


@dataclass(frozen=True)
class ShapePool:
    """What replacements are drawn from: words, and letters outside ASCII that were seen."""

    words: tuple[str, ...]
    letters: tuple[str, ...]

    @classmethod
    def of(cls, word_texts: Iterable[str], letter_texts: Iterable[str]) -> ShapePool:
        """Collect the words of some texts (identifiers are none), the letters of others."""
        runs = {run for text in word_texts for run in _RUN.findall(text)}
        words = {run.lower() for run in runs if not is_identifier(run)}
        letters = {c for text in letter_texts for c in text if c.isalpha() and not c.isascii()}
        return cls(tuple(sorted(words)), tuple(sorted(letters)))


def reshape_secret(secret: str, pool: ShapePool, rng: random.Random) -> str:
    """A text of the same shape as `secret`: same separators, other digits, letters and words.

    Text of two or more words keeps its number of words and its capitals; its words come from
    `pool`. A single word is treated as an identifier, since another record's word could be that
    record's whole secret.
    """
    letters = [c for c in secret if c.isalpha()]
    is_hex = any(c.isdigit() for c in secret) and all(c.lower() in _HEX_LOWER for c in letters)
    has_words = len(secret.split()) > 1 and bool(pool.words)

    def replace(match: re.Match[str]) -> str:
        run = match.group()
        if has_words and not is_identifier(run):
            return _like(run, rng.choice(pool.words))
        return _scramble(run, pool, rng, is_hex=is_hex)

    return _RUN.sub(replace, secret)


def reshape_prompt(prompt: str, pool: ShapePool, rng: random.Random) -> str:
    """The same prompt with its identifiers redrawn; unchanged if it has none."""

    def replace(match: re.Match[str]) -> str:
        run = match.group()
        return _scramble(run, pool, rng, is_hex=False) if is_identifier(run) else run

    return _RUN.sub(replace, prompt)


def _like(run: str, word: str) -> str:
    return word[0].upper() + word[1:] if run[0].isupper() else word


def _scramble(run: str, pool: ShapePool, rng: random.Random, *, is_hex: bool) -> str:
    """Draw every character of a run anew within its class: digit, lower case, upper case."""
    lower = _HEX_LOWER if is_hex else string.ascii_lowercase
    drawn = []
    for character in run:
        if character.isdigit():
            drawn.append(rng.choice(string.digits))
        elif character.isascii():
            letter = rng.choice(lower)
            drawn.append(letter.upper() if character.isupper() else letter)
        else:  # other scripts: a letter that was seen in the records, of the same case
            same_case = [c for c in pool.letters if c.isupper() == character.isupper()]
            drawn.append(rng.choice(same_case or [character]))
    return "".join(drawn)
