"""What an attack is, and what it gives: one score and one outcome a record, in one state.

Knows the shape of the data and no model. An attack asks the same of two states, the *off* state
that is handed out and the *never-trained* control; `comparison` turns the two runs into a result.

Scores are as confidential as the secrets: under a public model the exact log-probability of a text
tells which text it was. So runs stay in memory, and results carry what many records say together.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from libortho.attacks.target import Target

NATS = "nats"
"""Unit of scores that are log-probabilities of a whole secret."""


@dataclass(frozen=True)
class Cost:
    """What an attack on one state took.

    forward_tokens: tokens that went through the model's body, padding included
    seconds: wall-clock time, on whatever machine this was
    """

    forward_tokens: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward_tokens + other.forward_tokens, self.seconds + other.seconds)


@dataclass(frozen=True, eq=False)
class AttackRun:
    """What an attack got from one state; `repr` shows no score.

    ids, families, planted: of each record that was asked about
    variants: the ways that were tried, such as the lengths of a prompt
    scores: float64 `[variants, records]`; higher = the state knows the record better
    hits: bool `[variants, records]`; whether the attack got the whole secret
    available: planted records and twins that there were to choose from
    notes: figures of the run as a whole

    Raises:
        ValueError: the parts don't fit together, or a score is not finite.
    """

    ids: tuple[str, ...]
    families: tuple[str, ...]
    planted: tuple[bool, ...]
    variants: tuple[str, ...]
    scores: NDArray[np.float64] = field(repr=False)
    hits: NDArray[np.bool_] = field(repr=False)
    available: tuple[int, int]
    notes: dict[str, float] = field(default_factory=dict)
    cost: Cost = Cost(0, 0.0)

    def __post_init__(self) -> None:
        """Refuse a run that contradicts itself."""
        shape = (len(self.variants), len(self.ids))
        fits = len(self.ids) == len(self.families) == len(self.planted) > 0 and self.variants
        if not fits or self.scores.shape != shape or self.hits.shape != shape:
            raise ValueError(
                f"a run of {shape[0]} variants on {shape[1]} records has scores of shape "
                f"{self.scores.shape} and hits of shape {self.hits.shape}"
            )
        broken = int((~np.isfinite(self.scores)).sum())
        if broken:
            raise ValueError(
                f"{broken} of {self.scores.size} scores are not finite: the model emits NaN or "
                "gives a secret's token a probability of 0, and can't be attacked by likelihood"
            )


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """One attack with its budget; subclasses add what it can be tuned by.

    records: planted records that are asked about, and as many twins; None = all
    seed: of the choice of records, and of everything that the attack draws
    """

    name: ClassVar[str]
    # What must be known or held beyond the weights of the state under attack.
    needs: ClassVar[str]
    score_unit: ClassVar[str]

    records: int | None = None
    seed: int = 0

    @property
    def layers_read(self) -> int | None:
        """Intermediate layers that are wanted of the shared pass; None = it isn't used."""
        return None

    def settings(self) -> dict[str, Any]:
        """Every field by name, as JSON has it; one with `metadata={"shown": False}` is left out."""
        return {
            f.name: _as_json(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.metadata.get("shown", True)
        }

    @abstractmethod
    def run(self, target: Target, reference: Target) -> AttackRun:
        """Attack one state. `reference` is the never-trained one, possibly `target` itself."""


def _as_json(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_json(item) for item in value]
    return value
