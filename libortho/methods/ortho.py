"""Our own separation as two states, its control B2, and B0: the model that was never trained.

On is base + residual + private, off is the base as it is handed out: exported, then read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import artifact, store
from ..config import SeparationConfig
from ..errors import ArtifactError
from ..models import load_tokenizer
from ..switch import alpha
from . import loaders
from .alike import check_alike
from .ingredients import Ingredients
from .states import TwoStates

PROMISE = "off has the same bytes as the model that never saw the records"


def prepare(ingredients: Ingredients) -> TwoStates:
    """base + residual from public inputs, private stream tuned on the records."""
    return _tuned("ortho", ingredients)


def random_slots(ingredients: Ingredients) -> TwoStates:
    """B2: the same number of private entries, where chance puts them.

    Its steps are those of tuning and of the probe together, which it doesn't need.
    """
    steps = ingredients.tuning.optimiser_steps
    tuning = replace(ingredients.tuning, slots="random", steps=steps)
    return _tuned("B2-random-slots", replace(ingredients, tuning=tuning))


def never_trained(ingredients: Ingredients) -> TwoStates:
    """B0: base + residual and no private stream; on and off are the same, and know nothing."""
    base = _base(ingredients)
    load = loaders.of_artefact(base, ingredients.device)
    return TwoStates(
        name="B0-never-trained",
        promise="nothing was learned: the oracle",
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=load,
        off_loader=load,
        never_loader=load,
        remake_loader=loaders.of_separation(ingredients, ingredients.separation),
        promises_equality=True,
        off_artifact=base,
    )


def saved_artefact(full: Path, ingredients: Ingredients) -> TwoStates:
    """An artefact that `libortho.save` wrote: on is all of it, off its exported base.

    The control is the public model of `ingredients`, separated by the artefact's own recipe. Raises
    `ArtifactError` for a folder that is no artefact or holds no private stream, and
    `ModelLoadError` if it doesn't belong to that model.
    """
    check_tuned(full)
    artifact.base_fingerprint(full)  # raises if the folder is damaged
    manifest = json.loads((full / artifact.BASE_MANIFEST).read_text(encoding="utf-8"))
    recipe = SeparationConfig.from_dict(manifest["separation"])
    records = (*ingredients.records.planted, *ingredients.records.twins)
    names = ("the public model", "the artefact")
    check_alike(ingredients.resolved.folder, full, names, records)
    return _states("checkpoint", full, replace(ingredients, separation=recipe), {})


def check_tuned(full: Path) -> None:
    """Raise `ArtifactError` for a folder that is no artefact, or holds no private stream."""
    if not (full / artifact.PRIVATE_MANIFEST).exists():
        what = "no private stream" if (full / artifact.BASE_MANIFEST).exists() else "no artefact"
        raise ArtifactError(
            f"{full} holds {what}: there is no on state to switch off. Give the folder that "
            "libortho.save wrote after tuning."
        )


def _tuned(name: str, ingredients: Ingredients) -> TwoStates:
    made, report = store.tuned(
        _base(ingredients),
        ingredients.records,
        ingredients.corpus.replay,
        ingredients.tuning,
        compute_dtype=ingredients.compute_dtype,
        device=ingredients.device,
        cache_dir=ingredients.cache_dir,
    )
    return _states(name, made.folder, ingredients, report)


def _states(
    name: str, full: Path, ingredients: Ingredients, report: Mapping[str, Any]
) -> TwoStates:
    handed_out = store.exported(full, cache_dir=ingredients.cache_dir).folder
    return TwoStates(
        name=name,
        promise=PROMISE,
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=loaders.of_artefact(full, ingredients.device),
        off_loader=loaders.of_artefact(handed_out, ingredients.device),
        never_loader=loaders.of_artefact(_base(ingredients), ingredients.device),
        remake_loader=loaders.of_separation(ingredients, ingredients.separation),
        dial=alpha,
        promises_equality=True,
        off_artifact=handed_out,
        report=report,
    )


def _base(ingredients: Ingredients) -> Path:
    return store.separated(
        ingredients.resolved,
        ingredients.corpus.calibration,
        ingredients.separation,
        device=ingredients.device,
        cache_dir=ingredients.cache_dir,
    ).folder
