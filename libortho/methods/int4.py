"""B1: the densely fine-tuned model, and plain INT4 of it with no ortho at all.

If this is private already, alpha deserves no credit; if it leaks, an audit must see it. It recites
next to nothing and still knows more than half of each secret.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import store
from ..config import SeparationConfig
from ..models import ResolvedModel, load_tokenizer
from . import loaders
from .dense import fine_tuned
from .ingredients import Ingredients
from .states import TwoStates

PROMISE = "none: off is the fine-tuned model, rounded"


def prepare(ingredients: Ingredients) -> TwoStates:
    """On is the fine-tuned checkpoint, off its weights rounded to nearest on a min-max range."""
    dense, report = fine_tuned(ingredients)
    recipe = plain(ingredients.separation)
    off, never = (_rounded(model, recipe, ingredients) for model in (dense, ingredients.resolved))
    return TwoStates(
        name="B1-dense-int4",
        promise=PROMISE,
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=loaders.of_checkpoint(dense, ingredients),
        off_loader=loaders.of_artefact(off, ingredients.device),
        never_loader=loaders.of_artefact(never, ingredients.device),
        remake_loader=loaders.of_separation(ingredients, recipe),
        off_artifact=off,
        report=report,
    )


def plain(separation: SeparationConfig) -> SeparationConfig:
    """The same bits and groups as people round to them: no search for ranges, no residual."""
    return replace(separation, residual_density=0.0, search=False)


def _rounded(model: ResolvedModel, recipe: SeparationConfig, ingredients: Ingredients) -> Path:
    return store.separated(
        model,
        ingredients.corpus.calibration,
        recipe,
        device=ingredients.device,
        cache_dir=ingredients.cache_dir,
    ).folder
