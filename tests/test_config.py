"""The two recipes: what they refuse, and that they survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from libortho.config import SeparationConfig, TuningConfig
from libortho.errors import ConfigError

Config = type[SeparationConfig] | type[TuningConfig]


@pytest.mark.parametrize(
    "config",
    [
        SeparationConfig(),
        SeparationConfig(8, -1, 0.0, False, 128, 32),
        TuningConfig(),
        TuningConfig(slots="random", steps=1, replay_weight=0.0, seed=-7),
    ],
)
def test_a_recipe_survives_json(config: SeparationConfig | TuningConfig) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(fields) == config


@pytest.mark.parametrize("kind", [SeparationConfig, TuningConfig])
def test_an_unknown_field_is_refused_and_not_dropped(kind: Config) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__} has no field colour, shape.*upgrade"):
        kind.from_dict({**kind().to_dict(), "shape": 1, "colour": 2})


@pytest.mark.parametrize("config", [SeparationConfig(), TuningConfig()])
def test_a_recipe_is_frozen(config: SeparationConfig | TuningConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (SeparationConfig, "bits", 3),
        (SeparationConfig, "bits", 0),
        (SeparationConfig, "group_size", 1),
        (SeparationConfig, "group_size", 0),
        (SeparationConfig, "group_size", -2),
        (SeparationConfig, "residual_density", -0.1),
        (SeparationConfig, "residual_density", 1.5),
        (SeparationConfig, "residual_density", math.nan),
        (SeparationConfig, "calibration_tokens", 511),
        (SeparationConfig, "calibration_window", 1),
        (TuningConfig, "density", 0.0),
        (TuningConfig, "density", 1.01),
        (TuningConfig, "slots", "best"),
        (TuningConfig, "probe_steps", 0),
        (TuningConfig, "steps", 0),
        (TuningConfig, "replay_window", 0),
        (TuningConfig, "records_per_step", 0),
        (TuningConfig, "probe_lr", 0.0),
        (TuningConfig, "lr", -1e-3),
        (TuningConfig, "lr", math.nan),
        (TuningConfig, "replay_weight", -1.0),
        (TuningConfig, "replay_weight", math.nan),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(kind: Config, field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        kind(**{field: value})
    assert field.split("_", maxsplit=1)[0] in str(refusal.value)
    assert str(value) in str(refusal.value) or value == 0.0


def test_the_probe_is_part_of_the_budget() -> None:
    assert TuningConfig(steps=7, probe_steps=5).optimiser_steps == 12
    assert TuningConfig(steps=7, probe_steps=5, slots="random").optimiser_steps == 7


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="bits"):
        SeparationConfig(bits=5)
