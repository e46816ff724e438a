"""Methods and controls behind one interface: a model with an on state and an off state.

    states = METHODS["ortho"](ingredients)
    with states.on() as model: ...      # knows the records
    with states.off() as model: ...     # what is handed out
    with states.never() as model: ...   # what off would be had there been no records
    states.fingerprints()               # is off private by construction? computed, not assumed

Preparing one is slow the first time and kept on disk under everything that determines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import blind_hessian, blind_kfac, int4, ortho, qlora
from .ingredients import Ingredients
from .ortho import check_tuned, saved_artefact
from .pair import checkpoint_pair
from .states import Fingerprints, TwoStates

METHODS: Mapping[str, Callable[[Ingredients], TwoStates]] = {
    "ortho": ortho.prepare,
    "qlora": qlora.prepare,
    "blind-hessian": blind_hessian.prepare,
    "blind-kfac": blind_kfac.prepare,
    "B0-never-trained": ortho.never_trained,
    "B1-dense-int4": int4.prepare,
    "B2-random-slots": ortho.random_slots,
}
"""Every row of a comparison, by the name that its `TwoStates` has."""

__all__ = [
    "METHODS",
    "Fingerprints",
    "Ingredients",
    "TwoStates",
    "check_tuned",
    "checkpoint_pair",
    "saved_artefact",
]
