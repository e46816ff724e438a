"""The fields of a recipe as options: one for each, with its default, so that none is forgotten."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from libortho.config import SeparationConfig, TuningConfig

Recipe = TypeVar("Recipe", SeparationConfig, TuningConfig)

_HELP: Mapping[str, str] = {
    "bits": "4 or 8 bits of the lattice, 16 for none",
    "group_size": "weights that share a scale and a zero point, -1 for one group a row",
    "residual_density": "share of the entries that the residual corrects",
    "search": "take min-max ranges instead of searching for the best",
    "calibration_tokens": "tokens of public text to calibrate on",
    "calibration_window": "tokens of a calibration window",
    "head_bits": "8 to pack embedding and output head too, 16 to leave them",
    "density": "share of the entries that the private stream may change",
    "slots": "where they are: probe, gradient, magnitude or random",
    "probe_steps": "steps of the probe that chooses them",
    "probe_lr": "its step size",
    "steps": "optimiser steps, at most",
    "lr": "peak learning rate",
    "replay_weight": "weight of the divergence from alpha = 0 on public text",
    "replay_window": "tokens of public text a step",
    "records_per_step": "records in a step",
    "target_loss": "nats per secret token of the worst record at which tuning ends",
    "seed": "order of records, and random slots",
}


def add_recipe(parser: argparse.ArgumentParser, kind: type[Recipe], title: str) -> None:
    """One option for each field of a recipe; one that is true by default gets `--no-FIELD`."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        option, text = field.name.replace("_", "-"), _HELP[field.name]
        if field.default is True:
            group.add_argument(
                f"--no-{option}", dest=field.name, action="store_false", default=True, help=text
            )
        else:
            group.add_argument(
                f"--{option}",
                dest=field.name,
                type=type(field.default),
                default=field.default,
                metavar=type(field.default).__name__.upper(),
                help=f"{text} (default: %(default)s)",
            )


def recipe_of(kind: type[Recipe], options: argparse.Namespace) -> Recipe:
    """The recipe that the options describe; raises `ConfigError` for one that makes no sense."""
    fields: dict[str, Any] = {f.name: getattr(options, f.name) for f in dataclasses.fields(kind)}
    return kind.from_dict(fields)
