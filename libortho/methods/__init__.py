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

from .blind_hessian import blind_hessian
from .blind_kfac import blind_kfac
from .ingredients import Ingredients
from .int4 import dense_int4
from .ortho import never_trained, ortho, random_slots, saved
from .pair import pair
from .qlora import qlora
from .states import Fingerprints, TwoStates

METHODS: Mapping[str, Callable[[Ingredients], TwoStates]] = {
    "ortho": ortho,
    "qlora": qlora,
    "blind-hessian": blind_hessian,
    "blind-kfac": blind_kfac,
    "B0-never-trained": never_trained,
    "B1-dense-int4": dense_int4,
    "B2-random-slots": random_slots,
}
"""Every row of a comparison, by the name that its `TwoStates` has."""

__all__ = ["METHODS", "Fingerprints", "Ingredients", "TwoStates", "pair", "saved"]
