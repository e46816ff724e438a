"""The conditions of a run, and which models fit in them, said before anything is loaded.

Knows profiles, memory sizes, and how to cap a CUDA process. Doesn't know how a model is loaded or
measured, nor how its bytes are counted (`budget` does).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from .budget import (
    CUBLAS_WORKSPACE_CONFIG,
    RunRecipe,
    recipes,
    run_budget,
    stream_bytes,
    tuning_floor_mib,
    workspace_bytes,
)
from .errors import ConfigError, HardwareError
from .hardware import GIB, MIB, cpu_facts
from .registry import REGISTRY, ModelEntry

RESERVED_GIB = 1.0
"""GiB of a card that models can't have: CUDA's context, the display, fragmentation.

Of the 6,141 MiB of an RTX 4050 it leaves 5.0 GiB, the lower end of what is usable in practice.
"""
FOUR_BIT_BELOW_GIB = 8.0
"""Cards smaller than this get 4 bits, or a smaller model, where what was asked for doesn't fit."""


@dataclass(frozen=True)
class Profile:
    """Conditions that every arm of a run shares. They choose what is run, and promise nothing.

    vram_gib_total, vram_gib_usable: the card's memory, and the part that the process may reserve;
        0 for a profile without a card
    batch_size, sequence_length: sequences a forward pass, and tokens a window
    canaries_per_family: planted records of each family
    windows: windows of text that perplexity is measured on
    bandwidth_gb_per_s: memory bandwidth of the card that the profile stands for, 1e9 bytes/s
    models: (registry name, bits) that the guide compares on that card
    """

    name: str
    vram_gib_total: float
    vram_gib_usable: float
    batch_size: int
    sequence_length: int
    canaries_per_family: int
    windows: int
    bandwidth_gb_per_s: float
    description: str
    models: tuple[tuple[str, int], ...] = ()


_PROFILES = (
    Profile(
        name="gtx4050",
        vram_gib_total=6.0,
        vram_gib_usable=5.0,
        batch_size=1,
        sequence_length=512,
        canaries_per_family=20,
        windows=50,
        bandwidth_gb_per_s=192.0,
        description="RTX 4050 laptop: 6 GB, 192 GB/s, batch 1, 512 tokens",
        models=(("llama-3.2-3b", 4), ("llama-3-8b", 4)),
    ),
    Profile(
        name="rtx4090",
        vram_gib_total=24.0,
        vram_gib_usable=23.0,
        batch_size=4,
        sequence_length=512,
        canaries_per_family=20,
        windows=52,
        bandwidth_gb_per_s=1008.0,
        description="RTX 4090: 24 GB, 1,008 GB/s, batch 4, 512 tokens",
        models=(("llama-3-8b", 4), ("llama-3-8b", 16)),
    ),
    Profile(
        name="a100",
        vram_gib_total=80.0,
        vram_gib_usable=79.0,
        batch_size=8,
        sequence_length=512,
        canaries_per_family=20,
        windows=56,
        bandwidth_gb_per_s=2039.0,
        description="A100 SXM: 80 GB, 2,039 GB/s, batch 8, 512 tokens",
        models=(("llama-3-8b", 16), ("llama-3-70b", 4)),
    ),
    Profile(
        name="cpu",
        vram_gib_total=0.0,
        vram_gib_usable=0.0,
        batch_size=1,
        sequence_length=512,
        canaries_per_family=20,
        windows=50,
        bandwidth_gb_per_s=0.0,
        description="no card: host memory decides, batch 1, 512 tokens",
        models=(("smollm2", 4),),
    ),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _PROFILES}
"""By name. Bandwidths are the makers' (NVIDIA's data sheets)."""


@dataclass(frozen=True)
class Fit:
    """Whether a model fits, by which recipe (the leanest if by none), the arithmetic in words."""

    ok: bool
    needed_mib: float
    usable_mib: float
    reason: str
    recipe: RunRecipe


@dataclass(frozen=True)
class Choice:
    """What will run: a model and its recipe, and in the notes whatever differs from the request."""

    entry: ModelEntry
    recipe: RunRecipe
    notes: tuple[str, ...]

    @property
    def bits(self) -> int:
        return self.recipe.bits


def get_profile(name: str) -> Profile:
    """The profile of that name. Raises `ConfigError` with the names that there are."""
    if name not in PROFILES:
        raise ConfigError(f"There is no profile {name!r}. Choose one of: {', '.join(PROFILES)}.")
    return PROFILES[name]


def prepare_environment() -> None:
    """Bound cuBLAS's workspace; works only before CUDA starts. A value set by the user stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE_CONFIG)


def enforce(profile: Profile, device: str | torch.device) -> str:
    """Cap torch's memory on a card bigger than the profile's, and say what was done.

    The cap counts what the caching allocator reserves, cuBLAS's workspace included, and not the
    CUDA context; an allocation above it raises torch's out-of-memory error.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"{profile.name}: memory is not capped, because the device is {device.type}"
    if not profile.vram_gib_total:
        return f"{profile.name}: memory is not capped, because the profile has no card"
    total_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    if total_gib <= profile.vram_gib_total:
        return f"{profile.name}: memory is not capped, because the card has {total_gib:.1f} GiB"
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(profile.vram_gib_usable / total_gib, index)
    return (
        f"{profile.name}: memory capped at {profile.vram_gib_usable:.1f} of the card's "
        f"{total_gib:.1f} GiB"
    )


def usable_on_card(card_total_gib: float) -> float:
    """GiB of a card that a model can count on."""
    return max(0.0, card_total_gib - RESERVED_GIB)


def fits(
    entry: ModelEntry,
    usable_gib: float,
    bits: int,
    sequence_length: int = 512,
    *,
    batch_size: int = 1,
    head_bits: int | None = None,
    tuned_here: bool = False,
) -> Fit:
    """Whether a separated, tuned model runs in that much card memory, and by which recipe.

    The first of `budget.recipes` that fits is taken, and of them only those with `head_bits` if
    that is given. `tuned_here`: it must not be hopeless to tune its private stream there either.
    """
    usable = usable_gib * 1024
    tried = []
    for recipe in _candidates(bits, head_bits):
        budget = run_budget(entry, recipe, sequence_length, batch_size)
        needed = budget.total_mib
        text = (
            f"{entry.name} at {recipe.words}, needs {needed:,.0f} MiB (linear layers and norms "
            f"{budget.weights_mib:,.0f}, embedding and head {budget.embedding_mib:,.0f}, streams "
            f"{budget.streams_mib:,.0f}, KV cache {budget.kv_cache_mib:,.0f}, workspace "
            f"{budget.workspace_mib:,.0f}, overhead {budget.overhead_mib:,.0f}) and {usable:,.0f} "
            "MiB are usable"
        )
        floor = tuning_floor_mib(entry, recipe)
        if tuned_here and needed <= usable < floor:
            text += f": it would run, but to tune its private stream takes {floor:,.0f} at least"
            needed = floor
        if needed <= usable:
            return Fit(True, needed, usable, f"{text}: it fits.", recipe)
        tried.append((needed, recipe, text))
    needed, recipe, text = tried[-1]
    reason = f"{text}: {needed - usable:,.0f} MiB too many."
    if len(tried) > 1:
        reason += f" With {tried[0][1].words}, it would need {tried[0][0]:,.0f} MiB."
    return Fit(False, needed, usable, reason, recipe)


def _candidates(bits: int, head_bits: int | None) -> list[RunRecipe]:
    found = recipes(bits)
    if head_bits is None:
        return list(found)
    # Where none has it, the defaults with it: what was asked for is what is run.
    return [r for r in found if r.head_bits == head_bits] or [
        replace(found[0], head_bits=head_bits)
    ]


def host_fit(entry: ModelEntry, host_gib: float, bytes_per_parameter: int = 2) -> Fit:
    """Whether host memory holds what a run without a card reads: the unquantised model and streams.

    bytes_per_parameter: 2 for a checkpoint in 16 bits, 4 where the CPU computes in float32
    """
    recipe = RunRecipe()
    streams = stream_bytes(entry, recipe.residual_density + recipe.private_density)
    workspace = workspace_bytes(entry, recipe.bits, 512)
    needed = (entry.parameters * bytes_per_parameter + streams + workspace) / MIB
    usable = host_gib * 1024
    reason = (
        f"{entry.name} needs {needed:,.0f} MiB of host memory ({bytes_per_parameter} bytes a "
        f"parameter, streams, workspace) and {usable:,.0f} MiB are available"
    )
    ok = needed <= usable
    return Fit(ok, needed, usable, f"{reason}: it {'fits' if ok else 'does not fit'}.", recipe)


def largest_that_fits(
    usable_gib: float, bits: int, head_bits: int | None = None
) -> ModelEntry | None:
    """The registry's model of most parameters that can be tuned and run in so much, if any can."""
    return _largest(
        [
            entry
            for entry in REGISTRY.values()
            if fits(entry, usable_gib, bits, head_bits=head_bits, tuned_here=True).ok
        ]
    )


def choose(
    entry: ModelEntry,
    card_total_gib: float | None,
    bits: int,
    strict: bool = False,
    *,
    head_bits: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 1,
    host_gib: float | None = None,
    host_bytes_per_parameter: int = 2,
    tuned_here: bool = True,
) -> Choice:
    """What to run on a card of that size, or, with None, in host memory.

    Below 8 GB a model that doesn't fit goes to 4 bits, and one that doesn't fit even then gives way
    to the largest that does. From 8 GB on nothing is changed silently: the error names what fits.
    Either way embedding and head go to 8 bits, groups become larger and the private stream smaller
    where only that makes a model fit, and the notes say so. `host_gib` defaults to the host memory
    available now; `tuned_here` is False for a model that is tuned already.

    Raises `HardwareError` if nothing fits, if a replacement was needed and `strict` forbids it, or
    if the linear weights alone, at 4 bits, exceed the memory: no option makes such a model fit, and
    a small stand-in for it would answer another question.
    """
    if card_total_gib is None:
        available = cpu_facts().available_gib if host_gib is None else host_gib
        return _choose_on_host(entry, available, bits, strict, head_bits, host_bytes_per_parameter)
    _refuse_hopeless(entry, card_total_gib, "the card")
    usable = usable_on_card(card_total_gib)
    run: dict[str, Any] = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "head_bits": head_bits,
        "tuned_here": tuned_here,
    }
    fit = fits(entry, usable, bits, **run)
    if fit.ok:
        return Choice(entry, fit.recipe, _named(entry, fit.recipe, head_bits))
    if card_total_gib >= FOUR_BIT_BELOW_GIB:
        raise HardwareError(f"{fit.reason} {_alternatives(entry, usable, bits)}")
    notes: list[str] = []
    if bits > 4:
        notes.append(f"{fit.reason} Taken to 4 bits.")
        fit = fits(entry, usable, 4, **run)
        if fit.ok:
            return Choice(entry, fit.recipe, (*notes, *_named(entry, fit.recipe, head_bits)))
    other = largest_that_fits(usable, 4, head_bits)
    if strict or other is None:
        raise HardwareError(f"{fit.reason} {_alternatives(entry, usable, 4)}")
    notes.append(f"{fit.reason} Replaced by {other.name}, the largest registry model that fits.")
    recipe = fits(other, usable, 4, **run).recipe
    return Choice(other, recipe, (*notes, *_named(other, recipe, head_bits)))


def _named(entry: ModelEntry, recipe: RunRecipe, head_bits: int | None) -> tuple[str, ...]:
    """A note on a recipe that is not the default one, if memory is why."""
    asked = replace(
        recipes(recipe.bits)[0], head_bits=head_bits or recipes(recipe.bits)[0].head_bits
    )
    if recipe == asked:
        return ()
    return (f"{entry.name} only fits with {recipe.words}: so it is separated and tuned.",)


def _choose_on_host(
    entry: ModelEntry,
    host_gib: float,
    bits: int,
    strict: bool,
    head_bits: int | None,
    bytes_per_parameter: int,
) -> Choice:
    _refuse_hopeless(entry, host_gib, "host memory")
    recipe = _candidates(bits, head_bits)[0]
    fit = host_fit(entry, host_gib, bytes_per_parameter)
    basis = "No card is used, so host memory decides and no card's limit is enforced."
    if fit.ok:
        return Choice(entry, recipe, (f"{basis} {fit.reason}",))
    other = _largest(
        [e for e in REGISTRY.values() if host_fit(e, host_gib, bytes_per_parameter).ok]
    )
    if strict or other is None:
        hint = f"{other.name} would fit." if other else "No registry model fits: free some memory."
        raise HardwareError(f"{basis} {fit.reason} {hint}")
    swapped = f"Replaced by {other.name}, the largest registry model that fits."
    return Choice(other, recipe, (f"{basis} {fit.reason} {swapped}",))


def _refuse_hopeless(entry: ModelEntry, memory_gib: float, where: str) -> None:
    linear_mib = entry.linear_parameters * 4 / 8 / MIB
    if linear_mib > memory_gib * 1024:
        raise HardwareError(
            f"{entry.name} can't run here: its {entry.linear_parameters:,} linear weights take "
            f"{linear_mib:,.0f} MiB at 4 bits, without scales, embedding or streams, and {where} "
            f"has {memory_gib * 1024:,.0f} MiB. Choose a smaller model with --model; `python -m "
            "libortho check-gpu` lists what fits."
        )


def _alternatives(entry: ModelEntry, usable: float, bits: int) -> str:
    """The remedies for a model that doesn't fit, as a sentence."""
    lower = [b for b in (8, 4) if b < bits and fits(entry, usable, b).ok]
    if lower:
        return f"It fits with --quantization-bits {lower[0]}."
    other = largest_that_fits(usable, 4)
    if other is None:
        return "No registry model fits: run on the CPU with --device cpu, or on a bigger card."
    return f"The largest registry model that fits is --model {other.name} at 4 bits."


def _largest(entries: list[ModelEntry]) -> ModelEntry | None:
    return max(entries, key=lambda entry: entry.parameters, default=None)
