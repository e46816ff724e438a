"""What is planted, and its unplanted twins.

A record is a prompt and a secret that follows it. A *planted* record is trained into the private
stream; a *twin* is drawn from the same distribution and never shown to any model, so that what a
model knows of planted records can be told from what it would guess of any such record.

This module knows text, and of tokenizers only that they turn text into ids. It does not know
models or training. Secrets never appear in a `repr`, a log line or an error text: ids do.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from libortho.canaries import cut_passages, draw_codes
from libortho.errors import RecordError
from libortho.files import atomic_write_text
from libortho.record_lines import complaint, read_fields
from libortho.twins import ShapePool, reshape_prompt, reshape_secret

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]")
_SAFE_ID_LENGTH = 64
_TWIN_ATTEMPTS = 100
# A public salt: scrypt is here for its cost. At about 50 ms a guess, a search through the 10^9
# values of one nine-digit code, all other records known, takes more than a year of CPU time.
_FINGERPRINT_SALT = b"libortho record set, version 1"


@dataclass(frozen=True)
class Record:
    """One prompt and the secret that follows it; `repr` shows neither.

    repetitions: how often it is planted, see `RecordSet.repeated`

    Raises:
        RecordError: `repetitions` is no whole number above 0.
    """

    id: str
    prompt: str = field(repr=False)
    secret: str = field(repr=False)
    family: str
    repetitions: int = 1

    def __post_init__(self) -> None:
        """Refuse a number of repetitions that none can be planted with."""
        if type(self.repetitions) is not int or self.repetitions < 1:
            raise RecordError(
                f"The record {safe_id(self.id)} is to be planted {self.repetitions!r} times. Give "
                "a whole number above 0."
            )


@dataclass(frozen=True)
class RecordSet:
    """Planted records and their twins. `source` says in words where they came from."""

    planted: tuple[Record, ...]
    twins: tuple[Record, ...]
    seed: int
    source: str

    def __post_init__(self) -> None:
        """Refuse repeated ids, and a twin that carries a planted secret.

        Raises:
            RecordError: an id occurs twice, or a twin's secret was planted.
        """
        seen: set[str] = set()
        for record in (*self.planted, *self.twins):
            if record.id in seen:
                raise RecordError(
                    f"The record id {safe_id(record.id)} occurs twice in one set. Give every "
                    "planted record and every twin an id of its own."
                )
            seen.add(record.id)
        secrets = {record.secret.strip() for record in self.planted}
        for twin in self.twins:
            if twin.secret.strip() in secrets:
                raise RecordError(
                    f"The twin {safe_id(twin.id)} has the secret of a planted record, so it is no "
                    "control. Give the twin a secret that is planted nowhere."
                )

    @property
    def repeated(self) -> tuple[Record, ...]:
        """The planted records, each as often as it is to be planted: what one epoch shows."""
        return tuple(record for record in self.planted for _ in range(record.repetitions))

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that depend on every field of every record, and on the seed.

        Meant for cache keys. It is scrypt (RFC 7914; n = 2^14, r = 8, p = 1) and not a plain hash,
        because a secret may have few possible values; it slows guessing down and does not prevent
        it, so it is for local use and results carry `record_hash` with a secret salt instead.
        """
        rows, twin_rows = (
            [_row(record) for record in records] for records in (self.planted, self.twins)
        )
        content = json.dumps([rows, twin_rows, self.seed], separators=(",", ":"))
        return hashlib.scrypt(
            content.encode(), salt=_FINGERPRINT_SALT, n=2**14, r=8, p=1, dklen=32
        ).hex()


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids, prompt then secret; `input_ids[secret_start:]` is the secret."""

    id: str
    family: str
    input_ids: list[int] = field(repr=False)
    secret_start: int


def _row(record: Record) -> list[str | int]:
    """A record's fields for the fingerprint; that of a record planted once says no number."""
    often = [] if record.repetitions == 1 else [record.repetitions]
    return [record.id, record.prompt, record.secret, record.family, *often]


def safe_id(record_id: str) -> str:
    """A record's id as it may be shown: odd characters escaped, at most 64 characters."""
    shown = "".join(c if _SAFE_ID.match(c) else f"\\u{ord(c):04x}" for c in record_id)
    return shown if len(shown) <= _SAFE_ID_LENGTH else shown[: _SAFE_ID_LENGTH - 3] + "..."


def record_hash(record: Record, salt: bytes | str) -> str:
    """HMAC-SHA256 (RFC 2104) of prompt and secret under `salt`, its first 16 hex digits.

    Whoever has the salt can test guesses of the secret, so a salt is random and stays with the
    owner of the records.

    Raises:
        ValueError: the salt is empty.
    """
    if not salt:
        raise ValueError("record_hash needs a salt that is not empty; take secrets.token_bytes(16)")
    key = salt.encode() if isinstance(salt, str) else salt
    content = json.dumps([record.prompt, record.secret], separators=(",", ":"))
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()[:16]


# ---------------------------------------------------------------- generated records


def make_codes(n: int, seed: int) -> list[Record]:
    """`n` records of family "codes": nine uniformly random digits after a prompt of their own."""
    return _numbered("codes", draw_codes(n, seed))


def make_passages(
    n: int,
    seed: int,
    documents: Sequence[str],
    *,
    prompt_words: int = 16,
    secret_words: int = 16,
    max_per_document: int = 3,
) -> list[Record]:
    """`n` records of family "passages": the opening words of paragraphs of public articles.

    The prompt is a paragraph's first `prompt_words` words and the secret the `secret_words` that
    follow; see `canaries.cut_passages` for which paragraphs are taken.

    Raises:
        RecordError: the documents have fewer than `n` paragraphs that will do.
    """
    pairs = cut_passages(
        n,
        seed,
        documents,
        prompt_words=prompt_words,
        secret_words=secret_words,
        max_per_document=max_per_document,
    )
    return _numbered("passages", pairs)


def _numbered(family: str, pairs: Sequence[tuple[str, str]]) -> list[Record]:
    return [Record(f"{family}-{i:04d}", p, s, family) for i, (p, s) in enumerate(pairs)]


def plant(
    families: Sequence[Sequence[Record]], seed: int, source: str = "generated records"
) -> RecordSet:
    """Assign records to planted and twins by the fall of a coin.

    Each family holds 2n records drawn alike; a seeded coin decides which of the pair (2i, 2i + 1)
    is planted, so that nothing but chance tells planted records from twins.

    Raises:
        RecordError: a family has an odd number of records.
    """
    planted: list[Record] = []
    twins: list[Record] = []
    rng = random.Random(f"plant {seed}")
    for records in families:
        if len(records) % 2:
            raise RecordError(
                f"A family of {len(records)} records can't be paired. Give an even number: one to "
                "plant and one twin for each."
            )
        for pair in zip(records[::2], records[1::2], strict=True):
            heads = rng.random() < 0.5
            planted.append(pair[heads])
            twins.append(pair[not heads])
    return RecordSet(tuple(planted), tuple(twins), seed, source)


def make_default_records(n_per_family: int, seed: int, documents: Sequence[str]) -> RecordSet:
    """The default set: `n_per_family` codes and as many passages planted, and as many twins.

    Passages come from `documents`, which no other part may use; a document gives at most three,
    or more where that many are needed.

    Raises:
        RecordError: `n_per_family` is below 1, or `documents` are too short.
    """
    if n_per_family < 1:
        raise RecordError(f"At least one record per family is needed, found {n_per_family}.")
    needed = 2 * n_per_family
    per_document = max(3, math.ceil(2 * needed / max(len(documents), 1)))
    codes = make_codes(needed, seed)
    passages = make_passages(needed, seed, documents, max_per_document=per_document)
    source = f"{n_per_family} random codes and {n_per_family} passages of reserved public articles"
    return plant([codes, passages], seed, source)


# ---------------------------------------------------------------- records that users bring


def load_records(path: str | Path, *, seed: int) -> RecordSet:
    """Read a record file: one JSON object a line, `{"id": ..., "prompt": ..., "secret": ...}`.

    Optional fields are `"family"` (default "user"), `"repetitions"` (default 1) and `"planted":
    false`, which marks twins of the user's own. Without any, a twin is generated for each record:
    the same shape, with identifiers redrawn and words drawn from the other records, and `source`
    says so. Such twins are weaker than the user's own: random words read less naturally than text,
    and a prompt without digits or capitals is kept, so the twin then shares it with a planted
    record.

    Raises:
        RecordError: names the file, the line and what is wrong, never the content.
    """
    path = Path(path)
    planted: list[Record] = []
    twins: list[Record] = []
    lines_of: dict[tuple[object, ...], int] = {}
    for number, fields in read_fields(path):
        record = Record(
            fields["id"],
            fields["prompt"],
            fields["secret"],
            fields.get("family", "user"),
            fields.get("repetitions", 1),
        )
        is_planted = fields.get("planted", True)
        for what, key in (
            ("id", ("id", record.id)),
            ("prompt", ("prompt", is_planted, record.prompt)),
        ):
            if key in lines_of:
                problem = f"its {what} is the same as that of line {lines_of[key]}"
                raise RecordError(complaint(path, number, problem))
            lines_of[key] = number
        (planted if is_planted else twins).append(record)
    if not planted:
        raise RecordError(
            f"The record file {path} has no record to plant ({len(twins)} twins were found). Write "
            'one JSON object a line with "id", "prompt" and "secret".'
        )
    if twins:
        return RecordSet(tuple(planted), tuple(twins), seed, "record file with twins of its own")
    generated = _generate_twins(planted, seed)
    return RecordSet(tuple(planted), generated, seed, "record file, twins generated")


def write_records(
    path: str | Path, records: Sequence[Record], twins: Sequence[Record] = ()
) -> None:
    """Write records and twins in the format that `load_records` reads, atomically."""
    lines = [
        json.dumps(
            {
                "id": record.id,
                "prompt": record.prompt,
                "secret": record.secret,
                "family": record.family,
                "planted": is_planted,
                **({"repetitions": record.repetitions} if record.repetitions > 1 else {}),
            },
            ensure_ascii=False,
        )
        for group, is_planted in ((records, True), (twins, False))
        for record in group
    ]
    atomic_write_text(Path(path), "\n".join(lines) + "\n")


def _generate_twins(planted: Sequence[Record], seed: int) -> tuple[Record, ...]:
    rng = random.Random(f"twins {seed}")
    taken = {record.secret.strip() for record in planted}
    prompts = {record.prompt for record in planted}
    ids = {record.id for record in planted}
    twins = []
    for record in planted:
        others = [other.secret for other in planted if other is not record]
        pool = ShapePool.of(others or [record.prompt], [record.secret, *others])
        for _ in range(_TWIN_ATTEMPTS):
            prompt = reshape_prompt(record.prompt, pool, rng)
            secret = reshape_secret(record.secret, pool, rng)
            fresh = prompt == record.prompt or prompt not in prompts
            if fresh and secret.strip() not in taken and secret.strip() not in prompt:
                break
        else:
            raise RecordError(
                f"No twin could be generated for record {safe_id(record.id)}: its secret has too "
                'few values of the same shape. Add twins of your own, with "planted": false.'
            )
        twin_id = f"{record.id}.twin"
        while twin_id in ids:
            twin_id += "'"
        ids.add(twin_id)
        taken.add(secret.strip())
        prompts.add(prompt)
        twins.append(Record(twin_id, prompt, secret, record.family))
    return tuple(twins)


# ---------------------------------------------------------------- token ids


def encode(tokenizer: Any, records: Sequence[Record], max_length: int) -> list[EncodedRecord]:
    """Token ids of each record: those of the prompt, then those of the secret.

    The two are tokenised apart, because at extraction a model is given the prompt alone and
    continues it. The prompt carries the special tokens that the tokenizer puts before a text
    (often BOS, sometimes none); an end-of-text token after the prompt is dropped.

    Args:
        tokenizer: a transformers tokenizer.
        records: what to encode.
        max_length: the most tokens that a record may have.

    Raises:
        RecordError: a prompt or a secret gives no token, or a record has too many.
    """
    encoded = []
    for record in records:
        prompt_ids = list(tokenizer(record.prompt)["input_ids"])
        bare_ids = list(tokenizer(record.prompt, add_special_tokens=False)["input_ids"])
        if bare_ids and prompt_ids[-1] != bare_ids[-1]:
            prompt_ids.pop()  # an end-of-text token, which would stand before the secret
        secret_ids = list(tokenizer(record.secret, add_special_tokens=False)["input_ids"])
        for what, ids in (("prompt", bare_ids), ("secret", secret_ids)):
            if not ids:
                raise RecordError(
                    f"The {what} of record {safe_id(record.id)} gives no token with this "
                    "tokenizer. Use text that the model's vocabulary covers."
                )
        total = len(prompt_ids) + len(secret_ids)
        if total > max_length:
            raise RecordError(
                f"Record {safe_id(record.id)} has {total} tokens, and at most {max_length} fit. "
                "Shorten its prompt or its secret."
            )
        encoded.append(
            EncodedRecord(record.id, record.family, prompt_ids + secret_ids, len(prompt_ids))
        )
    return encoded
