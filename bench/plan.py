"""Which model runs at how many bits, settled before anything is fetched or loaded.

What was asked for, or what a small card forces in its place; the notes name every difference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from libortho import hardware, profiles
from libortho.artifact import separation_of
from libortho.budget import RunRecipe, recipes
from libortho.checkpoint import read_config
from libortho.registry import REGISTRY, ModelEntry, entry_from_config
from libortho.settings import Settings


class Plan(NamedTuple):
    """A model's name or folder, how it is separated, and what differs from the request."""

    model: str
    recipe: RunRecipe
    notes: tuple[str, ...]

    @property
    def bits(self) -> int:
        return self.recipe.bits


def plan_of(settings: Settings) -> Plan:
    """The run's plan; raises an `OrthoError` where nothing can run.

    An artefact of the user's own is audited as it is: its bits count, and nothing stands in for it.
    """
    checkpoint = settings.checkpoint
    return _plan(
        settings.model,
        settings.quantization_bits if checkpoint is None else separation_of(checkpoint).bits,
        settings.strict_model or checkpoint is not None,
        settings.profile,
        settings.device,
        settings.head_bits,
        checkpoint is None,
    )


@lru_cache
def _plan(
    model: str,
    bits: int,
    strict: bool,
    profile: str,
    device: str,
    head_bits: int | None,
    tuned_here: bool,
) -> Plan:
    entry = REGISTRY.get(model) or _entry_of_folder(Path(model).expanduser())
    if entry is None:  # a hub id: its geometry is known only once it is fetched
        recipe = recipes(bits)[0]
        return Plan(model, replace(recipe, head_bits=head_bits or recipe.head_bits), ())
    on_card = hardware.resolve_device(device) != "cpu"
    conditions = profiles.get_profile(profile)
    choice = profiles.choose(
        entry,
        conditions.vram_gib_total if on_card else None,
        bits,
        strict=strict,
        head_bits=head_bits,
        sequence_length=conditions.sequence_length,
        batch_size=conditions.batch_size,
        host_gib=None if on_card else hardware.cpu_facts().total_gib,
        tuned_here=tuned_here,
    )
    name = model if choice.entry is entry else choice.entry.name
    return Plan(name, choice.recipe, choice.notes)


def _entry_of_folder(folder: Path) -> ModelEntry | None:
    if not (folder / "config.json").is_file():
        return None
    return entry_from_config(folder.name, read_config(folder))
