"""What a separation, a training and a tuning are determined by: frozen records, nothing else.

They are written into artefacts and into cache keys, so every field that can change a byte of the
outcome is here, and nothing that can't.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from .errors import ConfigError
from .lattice import PER_ROW

NO_LATTICE = 16
"""Bits that mean: leave the base unquantised."""

Slots = Literal["probe", "gradient", "magnitude", "random"]


class _Record:
    """Dictionary conversion that refuses unknown fields instead of dropping them."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(unknown)}; it was probably written by a "
                "newer libortho: upgrade to read it."
            )
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            value = fields.get(field.name, field.default)
            kinds = (int, float) if isinstance(field.default, float) else type(field.default)
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(
                field.default, bool
            ):
                raise ConfigError(
                    f"{cls.__name__}.{field.name} must be a {type(field.default).__name__}; found "
                    f"{value!r}."
                )
        return cls(**fields)


@dataclass(frozen=True)
class SeparationConfig(_Record):
    """How public weights become base + residual.

    bits: 4 or 8 for the lattice, 16 for no lattice (the base keeps the checkpoint's weights)
    group_size: weights that share a scale and a zero point, or -1 for one group a row
    residual_density: share of the entries that the residual corrects, in [0, 1]
    search: choose ranges by Hessian-weighted error (False: min-max, the plain INT4 baseline)
    calibration_tokens: tokens of public text from which diag(H) is estimated
    calibration_window: tokens a calibration window holds
    head_bits: 8 for a lattice of embedding and output head as well, 16 to leave them as they are
    """

    bits: int = 4
    group_size: int = 64
    residual_density: float = 0.005
    search: bool = True
    calibration_tokens: int = 8192
    calibration_window: int = 512
    head_bits: int = NO_LATTICE

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, NO_LATTICE):
            raise ConfigError(f"bits must be 4, 8 or 16; found {self.bits}.")
        if self.head_bits not in (8, NO_LATTICE):
            raise ConfigError(f"head_bits must be 8 or 16; found {self.head_bits}.")
        if self.group_size != PER_ROW and self.group_size < 2:
            raise ConfigError(
                f"group_size must be at least 2, or {PER_ROW} for one per row; found "
                f"{self.group_size}."
            )
        _check_share("residual_density", self.residual_density)
        if self.calibration_tokens < self.calibration_window or self.calibration_window < 2:
            raise ConfigError(
                "calibration needs at least one window of 2 tokens; found "
                f"{self.calibration_tokens} tokens in windows of {self.calibration_window}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields; `head_bits` only if it is not 16, for the fingerprints of older artefacts."""
        fields = super().to_dict()
        if self.head_bits == NO_LATTICE:
            del fields["head_bits"]
        return fields


@dataclass(frozen=True)
class TrainingConfig(_Record):
    """How records are taught, whatever it is that learns them.

    steps: optimiser steps at most; training ends earlier once every record is learned
    lr: peak learning rate of Adam
    replay_weight: weight of the KL divergence to the untrained model on public text, in nats per
        token
    replay_window: tokens of public text a step
    records_per_step: records in a step
    target_loss: mean nats per secret token of the worst record at which training ends
    seed: order of records, and whatever else is drawn
    """

    steps: int = 100
    lr: float = 3e-3
    replay_weight: float = 2.0
    replay_window: int = 256
    records_per_step: int = 10
    target_loss: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_counts("steps", "replay_window", "records_per_step")
        self._check_rates("lr")
        if not 0 <= self.target_loss < math.inf:
            raise ConfigError(
                f"target_loss must be finite and not negative; found {self.target_loss}."
            )
        if not 0 <= self.replay_weight < math.inf:
            raise ConfigError(
                f"replay_weight must be finite and not negative; found {self.replay_weight}."
            )

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}.")

    def _check_rates(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be finite and above 0; found {getattr(self, name)}."
                )


@dataclass(frozen=True)
class TuningConfig(TrainingConfig):
    """How the private stream is trained on records; further fields are `TrainingConfig`'s.

    density: share of the entries that the private stream may change, in (0, 1]
    slots: where they are: by |delta| of a short probe over many candidates, by the gradient's
        magnitude, by the weight's magnitude, or at random (a control)
    probe_steps, probe_lr: length and step of the probe
    """

    density: float = 0.01
    slots: Slots = "probe"
    probe_steps: int = 24
    probe_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("density", self.density)
        if self.density == 0:
            raise ConfigError(
                "density must be above 0: a private stream of no entries holds nothing."
            )
        if self.slots not in get_args(Slots):
            raise ConfigError(f"slots must be one of {get_args(Slots)}; found {self.slots!r}.")
        self._check_counts("probe_steps")
        self._check_rates("probe_lr")

    @property
    def optimiser_steps(self) -> int:
        """Steps at most, those of the probe included: what other methods get as well."""
        return self.steps + (self.probe_steps if self.slots == "probe" else 0)


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be in [0, 1]; found {value}.")
