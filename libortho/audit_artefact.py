"""An audit of a saved artefact on its owner's records, in one call.

Knows which public inputs an artefact is held against: the model that it was made from, separated
anew by its own recipe, is the never-trained control. What an audit does is `audit_run`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from .artifact import separation_of
from .attacks import Attack, default_attacks, relearning_attacks
from .attacks.dose import DOSES
from .audit import MIN_FAMILY_RECORDS
from .audit_records import reshape_references
from .audit_results import AuditResult
from .audit_run import Plan, run_audit
from .corpora import Corpus
from .errors import RecordError
from .hardware import default_compute_dtype, resolve_device
from .methods import Ingredients, saved_artefact
from .models import ResolvedModel
from .records import RecordSet


def audit_artefact(
    folder: str | Path,
    records: RecordSet,
    *,
    public_model: ResolvedModel,
    corpus: Corpus,
    attacks: bool = True,
    relearn: bool = False,
    compute_dtype: torch.dtype | None = None,
    device: str = "auto",
    cache_dir: str | Path | None = None,
) -> AuditResult:
    """Judge the off state of an artefact that `save` wrote after tuning.

    Args:
        folder: the artefact, with its private stream.
        records: what it was tuned on, and twins.
        public_model: the model that it was separated from.
        corpus: the text that it was calibrated on, if "private by construction" is to be found.
        attacks: whether to attack it and to draw the dose curve; slow.
        relearn: whether to attack by fine-tuning as well; slower.
        compute_dtype: of activations; the device's own if None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        cache_dir: where the control is kept; None is the default.

    Raises:
        ArtifactError: the folder is no artefact, or holds no private stream.
        ModelLoadError: it was not made from this model.
        RecordError: a family has too few records for any verdict, or one can't be encoded.
    """
    check_enough(records)
    device = resolve_device(device)
    separation = separation_of(folder)
    ingredients = Ingredients(
        resolved=public_model,
        corpus=corpus,
        records=records,
        separation=separation,
        compute_dtype=compute_dtype or default_compute_dtype(device)[0],
        device=device,
        cache_dir=cache_dir,
    )
    states = saved_artefact(Path(folder), ingredients)
    made: tuple[Attack, ...] = default_attacks(records.seed) if attacks else ()
    if relearn:
        made += relearning_attacks(corpus.replay, records.seed)
    plan = Plan(
        attacks=made,
        references=reshape_references(records.planted, seed=records.seed) if attacks else {},
        doses=DOSES if attacks else (),
        public_text=corpus.test,
    )
    config = {"artefact": Path(folder).absolute().name, "separation": separation.to_dict()}
    return run_audit(states, records, plan, model=public_model.name, config=config)


def check_enough(records: RecordSet) -> None:
    """Raise `RecordError` for fewer records than can carry a verdict; loads nothing."""
    few = list(_too_few(records))
    if few:
        raise RecordError(
            f"An audit needs at least {MIN_FAMILY_RECORDS} planted records and as many twins in "
            f"each family; found {', '.join(few)}. Add records, or give them one family."
        )


def _too_few(records: RecordSet) -> Iterator[str]:
    planted = Counter(record.family for record in records.planted)
    twins = Counter(record.family for record in records.twins)
    for family in planted | twins:
        for n, kind in ((planted[family], "planted"), (twins[family], "twins")):
            if n < MIN_FAMILY_RECORDS:
                yield f"{n} {kind} in one"
