"""WikiText-2 raw from the hub, put together so that its bytes are those of the official files.

Knows: the dataset's revision, its rows, the official test split's SHA-256. Doesn't know: splits of
ours. Source: Merity et al., "Pointer Sentinel Mixture Models", 2016; the raw files.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from libortho.errors import CorpusError
from libortho.fetch import CACHE_VARIABLE, cache_folder

DATASET = "Salesforce/wikitext"
CONFIGURATION = "wikitext-2-raw-v1"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
# Of the official wiki.test.raw, 1,290,590 bytes.
RAW_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"

# " = Title = " opens an article; sections have more equals signs.
_HEADING = re.compile(r"^ = ([^=\n].*?) = \n", re.MULTILINE)


def load(cache_dir: str | Path | None = None) -> tuple[str, str]:
    """The raw train and test text. Raises `CorpusError` if out of reach or of other bytes."""
    # Imported here: it takes seconds, and most runs don't need it.
    import datasets  # noqa: PLC0415

    own_cache = cache_dir is not None or os.environ.get(CACHE_VARIABLE)
    try:
        rows = datasets.load_dataset(
            DATASET,
            CONFIGURATION,
            revision=REVISION,
            cache_dir=str(cache_folder(cache_dir) / "datasets") if own_cache else None,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(
            f"wikitext2 ({DATASET} at {REVISION[:8]}) is not cached and can't be downloaded: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]} Check the network and "
            "HF_HUB_OFFLINE, or give a local copy of wiki.test.raw with --corpus FILE."
        ) from error
    test = join_rows(rows["test"]["text"])
    found = hashlib.sha256(test.encode()).hexdigest()
    if found != RAW_TEST_SHA256:
        raise CorpusError(
            f"The test split of {DATASET} at {REVISION[:8]} is not the official raw file: SHA-256 "
            f"{found}, expected {RAW_TEST_SHA256}. Give a local copy of wiki.test.raw with "
            "--corpus FILE."
        )
    return join_rows(rows["train"]["text"]), test


def join_rows(rows: Iterable[str]) -> str:
    """The file that the rows were read from. Each row is a line with its newline.

    Blank lines hold one space in the file and are empty rows in the dataset.
    """
    return "".join(row if row.strip() else " \n" for row in rows)


def articles(text: str) -> list[str]:
    """The text cut before each article's heading; joined by nothing they are the text again."""
    starts = [match.start() for match in _HEADING.finditer(text)]
    bounds = [0, *(start for start in starts if start > 0), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    return [piece for piece in pieces if piece]


def title(article: str) -> str:
    """The heading of an article, or an empty string if it has none."""
    match = _HEADING.search(article)
    return match.group(1) if match else ""
