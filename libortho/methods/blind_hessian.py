"""blind-hessian: only the fine-tuned weights are known, and what rounds badly is called private.

Base is INT4 of the fine-tuned weights; ortho takes the entries of the largest `r**2 * diag(H)`, r
being the base's error and diag(H) estimated on public text. It is the first libortho's method, and
it can promise nothing: whatever a record left in the other entries stays in the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import artifact, store
from ..files import alone
from ..hardware import release_memory
from ..models import ResolvedModel, load_model, load_tokenizer
from ..separation import separate
from ..switch import alpha, ortho_layers
from . import loaders
from .dense import fine_tuned
from .ingredients import Ingredients
from .states import TwoStates

PROMISE = "none: off is the fine-tuned model, rounded, without the entries that round worst"
_CODE = (
    *("calibration", "lattice", "linear", "separation", "split", "stream"),
    "methods/blind_hessian",
)


def prepare(ingredients: Ingredients) -> TwoStates:
    """On is base + ortho, off the base alone, exported and read back."""
    dense, report = fine_tuned(ingredients)
    full, never = (_split(model, ingredients) for model in (dense, ingredients.resolved))
    off, control = (
        store.exported(folder, cache_dir=ingredients.cache_dir).folder for folder in (full, never)
    )

    def remake() -> Any:
        model, _ = _blindly(ingredients.resolved, ingredients)
        for layer in ortho_layers(model).values():
            layer.set_private(layer.private_columns[:0], layer.private_values[:0])
        return model

    return TwoStates(
        name="blind-hessian",
        promise=PROMISE,
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=loaders.of_artefact(full, ingredients.device),
        off_loader=loaders.of_artefact(off, ingredients.device),
        never_loader=loaders.of_artefact(control, ingredients.device),
        remake_loader=remake,
        dial=alpha,
        off_artifact=off,
        report=report,
    )


def residual_to_private(model: Any) -> Any:
    """Put a separated model's residual where alpha switches it, in place; returns the model."""
    for layer in ortho_layers(model).values():
        columns, values = layer.residual_columns, layer.residual_values
        layer.residual_columns, layer.residual_values = columns[:0], values[:0]
        layer.set_private(columns, values)
    return model


def _blindly(resolved: ResolvedModel, ingredients: Ingredients) -> tuple[Any, Any]:
    model, tokenizer = load_model(resolved, device=ingredients.device)
    separate(model, tokenizer, ingredients.corpus.calibration, config=ingredients.separation)
    return residual_to_private(model), tokenizer


def _split(resolved: ResolvedModel, ingredients: Ingredients) -> Path:
    folder = store.place(
        f"{resolved.name}-blind-hessian",
        code=_CODE,
        cache_dir=ingredients.cache_dir,
        model=resolved.identity,
        calibration=ingredients.corpus.calibration.sha256,
        config=ingredients.separation.to_dict(),
        device=ingredients.device_type,
    )
    with alone(folder):
        if not folder.exists():
            model, _ = _blindly(resolved, ingredients)
            artifact.save(model, folder)
            del model
            release_memory()
    return folder
