"""Ways to open what is stored: an artefact, a plain checkpoint, or a separation made anew.

Knows folders and recipes. Each gives a `Loader`: nothing is read before it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import artifact
from ..config import SeparationConfig
from ..models import ResolvedModel, load_model
from ..separation import separate
from .ingredients import Ingredients
from .states import Loader


def of_artefact(folder: Path, device: str) -> Loader:
    """What `libortho.save` or `libortho.export_base` wrote, at alpha = 1."""

    def load() -> Any:
        return artifact.load(folder, device=device)[0]

    return load


def of_checkpoint(resolved: ResolvedModel, ingredients: Ingredients) -> Loader:
    """A plain checkpoint, in the run's compute dtype."""

    def load() -> Any:
        dtype = ingredients.compute_dtype
        return load_model(resolved, dtype=dtype, device=ingredients.device)[0]

    return load


def of_separation(ingredients: Ingredients, recipe: SeparationConfig) -> Loader:
    """The public model separated now, from public inputs alone and without the cache."""

    def load() -> Any:
        model, tokenizer = load_model(ingredients.resolved, device=ingredients.device)
        return separate(model, tokenizer, ingredients.corpus.calibration, config=recipe)

    return load
