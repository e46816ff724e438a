"""`separate_shards`: a checkpoint on disk becomes an artefact on disk, block by block.

Knows a model's outline, its shards and public text. At any time one block's weights are on the
device, beside the activations of the calibration text, and what is done is written and forgotten:
neither the device nor the host ever holds the model. Sees no private record.

The model's own forward pass leads through the blocks, once, with all windows together. A block is
filled from the shards when its turn comes, run on each window by itself as `separate` runs it, and
separated. So the outcome is that of `separate`, bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import artifact, layout, stream
from .blockwise import Walk, blocks_of, name_of
from .config import NO_LATTICE, SeparationConfig
from .embedding import empty_embeddings
from .errors import ArtifactError, ModelLoadError, SeparationError
from .files import atomic_folder
from .linear import OrthoLinear
from .models import (
    ResolvedModel,
    linear_layers,
    load_model,
    outline_model,
    replace_module,
    resolve_model,
)
from .separation import calibration_windows, check_width, separate
from .shards import Shards
from .switch import bits_per_linear_weight, bits_per_weight
from .tensorfile import TensorFile


@dataclass(frozen=True)
class SeparationReport:
    """What a separation from disk to disk made, and how long it took.

    streamed: the model was never whole in memory
    bits_per_linear_weight: stored bits over weights of the separated layers, base and residual
    bits_per_weight: the same with embedding and head
    """

    folder: Path
    base_fingerprint: str
    bits_per_linear_weight: float
    bits_per_weight: float
    seconds: float
    streamed: bool


def separate_shards(
    model: str | Path | ResolvedModel,
    out: str | Path,
    calibration: Sequence[str],
    *,
    config: SeparationConfig | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> SeparationReport:
    """Separate the checkpoint called `model` into the folder `out`, which must not exist.

    model: as in `load_model`
    calibration: public documents, as in `separate`
    device: where blocks are run and separated

    The folder appears whole or not at all. Raises what `load_model`, `separate` and `save` do, and
    `SeparationError` for an architecture whose blocks can't be told apart (`why_not_streamed`).
    """
    began = time.perf_counter()
    out = Path(out)
    config = config or SeparationConfig()
    if out.exists():
        raise ArtifactError(f"{out} exists already. Choose another folder, or remove it first.")
    resolved = model if isinstance(model, ResolvedModel) else resolve_model(model, cache_dir)
    skeleton, tokenizer = outline_model(resolved)
    reason = why_not_streamed(skeleton)
    if reason is not None:
        raise SeparationError(f"{reason} Load it with load_model and call separate instead.")
    for name, layer in linear_layers(skeleton).items():
        check_width(layer, name)
    shards = _checked_shards(resolved, skeleton)
    windows = calibration_windows(tokenizer, calibration, config)
    outline = separated_outline(skeleton, config)
    with atomic_folder(out) as unfinished:
        path = unfinished / artifact.BASE_FILE
        with TensorFile(path, artifact.base_state(outline), {"format": "pt"}) as file:
            Walk(skeleton, shards, file, config, torch.device(device)).run(windows)
        tensors = layout.read_tensors(path)
        fingerprint = artifact.describe(unfinished, outline, tensors, config, tokenizer)
        del tensors
    return _report(out, fingerprint, outline, began, streamed=True)


def separate_checkpoint(
    model: str | Path | ResolvedModel,
    out: str | Path,
    calibration: Sequence[str],
    *,
    config: SeparationConfig | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> SeparationReport:
    """As `separate_shards`, and in memory for an architecture that can't be streamed."""
    resolved = model if isinstance(model, ResolvedModel) else resolve_model(model, cache_dir)
    if why_not_streamed(outline_model(resolved)[0]) is None:
        return separate_shards(resolved, out, calibration, config=config, device=device)
    began = time.perf_counter()
    whole, tokenizer = load_model(resolved, device=device)
    separate(whole, tokenizer, calibration, config=config)
    artifact.save(whole, out)
    return _report(Path(out), artifact.base_fingerprint(whole), whole, began, streamed=False)


def _report(
    folder: Path, fingerprint: str, model: Any, began: float, *, streamed: bool
) -> SeparationReport:
    return SeparationReport(
        folder,
        fingerprint,
        bits_per_linear_weight(model),
        bits_per_weight(model),
        time.perf_counter() - began,
        streamed,
    )


def why_not_streamed(model: Any) -> str | None:
    """Why a model can't be taken block by block, or None if it can."""
    kind = type(model).__name__
    if not isinstance(blocks_of(model), nn.ModuleList):
        return f"{kind} keeps its blocks in no list called `layers`, so they can't be streamed."
    prefix = f"{name_of(model, blocks_of(model))}."
    outside = [name for name in linear_layers(model) if not name.startswith(prefix)]
    if outside:
        return f"{kind} has linear layers outside of its blocks ({outside[0]})."
    return None


def separated_outline(model: Any, config: SeparationConfig) -> Any:
    """What separation makes of a model's outline: modules, shapes and dtypes on the meta device."""
    outline = copy.deepcopy(model)
    for name, linear in linear_layers(outline).items():
        slots = 0
        if config.bits != NO_LATTICE:
            slots = stream.slots_per_row(linear.in_features, config.residual_density)
        layer = OrthoLinear(
            linear.in_features,
            linear.out_features,
            bits=config.bits,
            group_size=config.group_size,
            residual_slots=slots,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )
        replace_module(outline, name, layer)
    if config.head_bits != NO_LATTICE:
        empty_embeddings(outline, model.dtype)
    return outline


def _checked_shards(resolved: ResolvedModel, model: Any) -> Shards:
    shards = Shards(resolved.folder)
    shards.check(artifact.base_state(model))
    if model.config.tie_word_embeddings:
        modules = model.get_input_embeddings(), model.get_output_embeddings()
        names = [f"{name_of(model, module)}.weight" for module in modules if module is not None]
        there = [shards.read(n, resolved.dtype_on_disk, "cpu") for n in names if n in shards]
        if len(there) == 2 and not torch.equal(*there):
            raise ModelLoadError(
                f"{resolved.folder}: config.json ties {names[0]} and {names[1]}, and the files "
                "hold different ones. Set tie_word_embeddings to false, or convert the checkpoint "
                "again."
            )
    return shards
