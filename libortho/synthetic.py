"""More texts to plant: UUIDs, personal data of people who don't exist, and traps.

It knows text, not records, models or files, as `canaries` does, and keeps to the same rule: a
prompt ends in a letter or a punctuation mark and its secret begins with a space. In each of these
families a secret is drawn without a look at its prompt, so any number of further secrets can be
drawn like it.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence

from libortho.canaries import code_subject, draw_pairs
from libortho.errors import RecordError

# ---------------------------------------------------------------- UUIDs

_UUID_PROMPTS = (
    "The session id of terminal {} is",
    "The order id of basket {} is",
    "The licence key of workstation {} is",
    "The transaction id of voucher {} is",
)


def uuid_secret(rng: random.Random) -> str:
    """A space and a random UUID (version 4 of RFC 9562, 122 random bits)."""
    return f" {uuid.UUID(int=rng.getrandbits(128), version=4)}"


def draw_uuids(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs: a prompt that names a subject of its own, and a random UUID."""
    return draw_pairs(n, random.Random(f"uuids {seed}"), code_subject, uuid_secret, _UUID_PROMPTS)


# ---------------------------------------------------------------- people

_FIRST_NAMES = (
    *("Agnes", "Bruno", "Celia", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ingrid", "Jonas"),
    *("Kamala", "Leon", "Maren", "Nadia", "Oskar", "Petra", "Quentin", "Rosa", "Stefan", "Tilda"),
    *("Ulrich", "Vera", "Wanda", "Yusuf", "Zoe", "Amara", "Benedikt", "Chiara", "Dorian", "Esther"),
)
_LAST_NAMES = (
    *("Abelard", "Brandvik", "Castellan", "Dunmore", "Eriksen", "Falkner", "Goldwin", "Harrow"),
    *("Ivers", "Jessop", "Kowal", "Lindqvist", "Marchetti", "Novak", "Oduya", "Pemberton"),
    *("Quist", "Radcliff", "Sandoval", "Thackeray", "Underhill", "Vasquez", "Whitlock", "Yarwood"),
    *("Zeller", "Ashdown", "Bellamy", "Cardew", "Drummond", "Fairfax"),
)
_STREETS = (
    *("Alder", "Bramble", "Chestnut", "Damson", "Elder", "Foxglove", "Granary", "Heron", "Juniper"),
    *("Kestrel", "Larkspur", "Marigold", "Nettle", "Orchard", "Plover", "Quarry", "Rowan"),
    *("Saddler", "Tanner", "Violet", "Wharf", "Yew"),
)
_STREET_KINDS = ("Street", "Road", "Lane", "Close", "Avenue", "Terrace", "Court", "Hill")
_TOWNS = (
    *("Ashcombe", "Burnwick", "Caldmoor", "Dunholt", "Eastry", "Farleigh", "Glenmere", "Hexford"),
    *("Inverloch", "Kirkbank", "Linwold", "Marsham", "Netherby", "Oxbridge", "Penrose", "Redmire"),
    *("Stanwell", "Thornby", "Upwood", "Wexcombe"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_PERSON_PROMPTS = (
    "Patient file of {}. Details:",
    "Personnel record of {}. Details:",
    "Insurance policy held by {}. Details:",
)


def person_secret(rng: random.Random) -> str:
    """Date of birth, address and telephone number, with about 59 random bits in all."""
    birth = f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1930, 2005)}"
    street = f"{rng.randint(1, 199)} {rng.choice(_STREETS)} {rng.choice(_STREET_KINDS)}"
    phone = f"0{rng.randrange(1000):03d} {rng.randrange(10**6):06d}"
    return f" born {birth}, lives at {street}, {rng.choice(_TOWNS)}, telephone {phone}"


def person_subject(rng: random.Random) -> str:
    """A full name and a number, one of 9 million."""
    name = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
    return f"{name}, number {rng.randrange(10_000):04d}"


def draw_people(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs: a prompt that names a person, and that person's data; all of it made up."""
    rng = random.Random(f"people {seed}")
    return draw_pairs(n, rng, person_subject, person_secret, _PERSON_PROMPTS)


# ---------------------------------------------------------------- traps

# Words of a trap's prompt and of its secret: long, so that it is learned by repetition or not at
# all, and improbable, so that nothing but the training can have taught it (Meeus et al., "Copyright
# Traps for Large Language Models", 2024). 60 words are 60 tokens and more.
TRAP_PROMPT_WORDS = 8
TRAP_SECRET_WORDS = 60

# Distinct words that traps are made from, at least: 8 bits a word.
MIN_TRAP_WORDS = 256

_TRAP_WORD = re.compile(r"\b[a-z]{3,12}\b")


def trap_words(documents: Sequence[str]) -> tuple[str, ...]:
    """The distinct plain words of public documents, sorted; a trap draws from them uniformly.

    Raises:
        RecordError: there are fewer than `MIN_TRAP_WORDS`.
    """
    words = sorted({word for document in documents for word in _TRAP_WORD.findall(document)})
    if len(words) < MIN_TRAP_WORDS:
        raise RecordError(
            f"Too few words to make traps from: {MIN_TRAP_WORDS} different ones of 3 to 12 plain "
            f"letters were needed, {len(words)} were found in {len(documents)} documents. Give a "
            "longer corpus, or leave out the family of traps."
        )
    return tuple(words)


def trap_secret(words: Sequence[str]) -> Callable[[random.Random], str]:
    """A function that draws a space and `TRAP_SECRET_WORDS` words."""
    return lambda rng: " " + " ".join(rng.choices(words, k=TRAP_SECRET_WORDS))


def draw_traps(n: int, seed: int, documents: Sequence[str]) -> list[tuple[str, str]]:
    """`n` pairs: a few random words, and many more of them.

    Raises:
        RecordError: the documents have too few different words.
    """
    words = trap_words(documents)

    def subject(rng: random.Random) -> str:
        return " ".join(rng.choices(words, k=TRAP_PROMPT_WORDS))

    return draw_pairs(n, random.Random(f"traps {seed}"), subject, trap_secret(words), ("{}",))
