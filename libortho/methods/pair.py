"""Two checkpoints from outside as two states: what was private, and what is handed out instead.

Nothing is known of how they were made, so nothing is promised and nothing can be made again.
"""

from __future__ import annotations

from ..models import ResolvedModel, load_tokenizer
from . import loaders
from .alike import check_alike
from .ingredients import Ingredients
from .states import TwoStates

PROMISE = "unknown: both checkpoints came from outside"


def checkpoint_pair(
    public: ResolvedModel,
    private: ResolvedModel,
    ingredients: Ingredients,
    *,
    never: ResolvedModel | None = None,
) -> TwoStates:
    """Off is `public`, on is `private`, both as plain checkpoints.

    never: a checkpoint of the same model that never saw the records; without one an audit has only
        the twins to compare with

    Raises `ModelLoadError` if architectures or tokenizers differ.
    """
    records = (*ingredients.records.planted, *ingredients.records.twins)
    others = [(private, "the private model")]
    others += [] if never is None else [(never, "the never-trained model")]
    for other, name in others:
        check_alike(public.folder, other.folder, ("the public model", name), records)
    return TwoStates(
        name="pair",
        promise=PROMISE,
        tokenizer=load_tokenizer(public.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=loaders.of_checkpoint(private, ingredients),
        off_loader=loaders.of_checkpoint(public, ingredients),
        never_loader=None if never is None else loaders.of_checkpoint(never, ingredients),
        off_artifact=public.folder,
        report={"public": public.identity, "private": private.identity},
    )
