"""The records of an audit: five families, their twins, and reference secrets for exposure.

It knows what families there are and how a set of them is put together; texts are drawn by
`canaries`, `synthetic` and `twins`. It knows no models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from libortho.canaries import code_secret
from libortho.errors import RecordError
from libortho.records import Record, RecordSet, make_codes, make_passages, plant, safe_id
from libortho.synthetic import (
    draw_people,
    draw_traps,
    draw_uuids,
    person_secret,
    trap_secret,
    trap_words,
    uuid_secret,
)
from libortho.twins import ShapePool, reshape_secret

FAMILIES = ("codes", "uuids", "people", "passages", "traps")

# Reference secrets of a record: exposure is then 3 bits at most.
EXPOSURE_REFERENCES = 7

# Planted records that get any: each takes 7 more scored secrets in every state, and of 200 records
# those of all would take longer than everything else that is asked of a state.
EXPOSURE_RECORDS = 30

# Passages that a document gives before there is a reason to take more.
_PASSAGES_PER_DOCUMENT = 3

_ATTEMPTS = 100


def make_audit_records(
    n_total: int,
    seed: int,
    documents: Sequence[str],
    *,
    families: Sequence[str] = FAMILIES,
    repetitions: Sequence[int] = (1,),
) -> RecordSet:
    """`n_total` planted records, spread over the families as evenly as may be, and as many twins.

    A coin decides which of two records that were drawn alike is planted. Within a family planted
    records take turns at the numbers of repetitions; twins are planted nowhere.

    Args:
        n_total: planted records of all families together.
        seed: what they are drawn by.
        documents: public text that no other part may use; passages and the words of traps are
            taken from it.
        families: which families, of `FAMILIES`.
        repetitions: how often planted records are repeated in an epoch, such as (1, 4, 16, 64).

    Raises:
        RecordError: a family is unknown, named twice or gets no record, no or impossible
            repetitions, or `documents` are too short.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families or len(set(families)) < len(families):
        raise RecordError(
            f"The families of an audit are some of {', '.join(FAMILIES)}, each once; found "
            f"{', '.join(families) or 'none'}."
        )
    if n_total < len(families):
        raise RecordError(
            f"{n_total} records are too few for {len(families)} families. Ask for at least one of "
            "each, or for fewer families."
        )
    if not repetitions:
        raise RecordError("No number of repetitions was given. Give at least one, such as 1.")
    share, rest = divmod(n_total, len(families))
    sizes = {family: share + (i < rest) for i, family in enumerate(families)}
    drawn = [_draw(family, 2 * n, seed, documents) for family, n in sizes.items()]
    source = ", ".join(f"{n} {family}" for family, n in sizes.items())
    if tuple(repetitions) != (1,):
        source += f", planted {', '.join(map(str, repetitions))} times in turn"
    records = plant(drawn, seed, source)
    counts = dict.fromkeys(families, 0)
    planted = []
    for record in records.planted:
        turn = counts[record.family] % len(repetitions)
        counts[record.family] += 1
        planted.append(replace(record, repetitions=repetitions[turn]))
    return replace(records, planted=tuple(planted))


def _draw(family: str, n: int, seed: int, documents: Sequence[str]) -> list[Record]:
    if family == "codes":
        return make_codes(n, seed)
    if family == "passages":
        needed = math.ceil(2 * n / max(len(documents), 1))
        limit = max(_PASSAGES_PER_DOCUMENT, needed)
        return make_passages(n, seed, documents, max_per_document=limit)
    if family == "traps":
        pairs = draw_traps(n, seed, documents)
    else:
        pairs = {"uuids": draw_uuids, "people": draw_people}[family](n, seed)
    return [Record(f"{family}-{i:04d}", p, s, family) for i, (p, s) in enumerate(pairs)]


# ---------------------------------------------------------------- references for exposure


def draw_references(
    planted: Sequence[Record],
    per_record: int = EXPOSURE_REFERENCES,
    *,
    seed: int,
    documents: Sequence[str] = (),
    count: int | None = EXPOSURE_RECORDS,
) -> dict[str, tuple[Record, ...]]:
    """For generated records their prompts with other secrets, drawn like their own.

    Passages have none: what a text goes on with depends on its beginning, and nothing else would
    be as likely to follow it. They are left out.

    Args:
        planted: records of `make_audit_records` or `make_default_records`.
        per_record: references of each.
        seed: what they are drawn by.
        documents: the records' own, for the words of traps.
        count: records that get references, chosen by the seed from every family alike; None = all.

    Raises:
        RecordError: a family that is not generated, or `documents` too short.
    """
    families = {record.family for record in planted} - {"passages"}
    drawers: dict[str, Callable[[random.Random], str]] = {
        "codes": code_secret,
        "uuids": uuid_secret,
        "people": person_secret,
    }
    if "traps" in families:
        drawers["traps"] = trap_secret(trap_words(documents))
    unknown = families - drawers.keys()
    if unknown:
        raise RecordError(
            f"There is no rule to draw secrets like those of {', '.join(map(safe_id, unknown))}. "
            "For records of a file use reshape_references."
        )
    rng = random.Random(f"references {seed}")
    return _references(
        [r for r in planted if r.family != "passages"],
        (count, seed),
        per_record,
        lambda record: drawers[record.family](rng),
    )


def reshape_references(
    planted: Sequence[Record],
    per_record: int = EXPOSURE_REFERENCES,
    *,
    seed: int,
    count: int | None = EXPOSURE_RECORDS,
) -> dict[str, tuple[Record, ...]]:
    """For records of a user's their prompts with other secrets of the same shape.

    They are made as twins are, and are as weak: random words read less naturally than text. `count`
    is as in `draw_references`.

    Raises:
        RecordError: a secret has too few values of the same shape.
    """
    rng = random.Random(f"references {seed}")
    pools = {}
    for record in planted:
        others = [other.secret for other in planted if other is not record]
        pools[record.id] = ShapePool.of(others or [record.prompt], [record.secret, *others])
    return _references(
        planted,
        (count, seed),
        per_record,
        lambda record: reshape_secret(record.secret, pools[record.id], rng),
    )


def _references(
    planted: Sequence[Record],
    chosen: tuple[int | None, int],
    per_record: int,
    draw: Callable[[Record], str],
) -> dict[str, tuple[Record, ...]]:
    secrets = {record.secret.strip() for record in planted}
    references = {}
    for record in _choose(planted, *chosen):
        found: dict[str, str] = {}
        for _ in range(_ATTEMPTS * per_record):
            secret = draw(record)
            if secret.strip() not in secrets:
                found[secret.strip()] = secret
            if len(found) == per_record:
                break
        else:
            raise RecordError(
                f"{per_record} reference secrets could not be drawn for record "
                f"{safe_id(record.id)}: too few have the same shape. Ask for fewer."
            )
        references[record.id] = tuple(
            Record(f"{record.id}.reference-{i}", record.prompt, secret, record.family)
            for i, secret in enumerate(found.values())
        )
    return references


def _choose(records: Sequence[Record], count: int | None, seed: int) -> list[Record]:
    """So many records in their order, from every family alike; None = all."""
    if count is None or count >= len(records):
        return list(records)
    rng = random.Random(f"exposed records {seed}")
    families: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        families.setdefault(record.family, []).append(i)
    turns = [
        (turn, number, i)
        for number, own in enumerate(families.values())
        for turn, i in enumerate(rng.sample(own, len(own)))
    ]
    return [records[i] for i in sorted(i for *_, i in sorted(turns)[:count])]
