"""Artefacts on disk: `save`, `load`, `export_base` and `base_fingerprint`.

Knows separated models and how to put them into a folder and take them out. A folder holds

    base.safetensors      base, residual and everything that was not separated
    libortho.json         what made them, hashes of the files, and the base's fingerprint
    config.json, ...      as transformers writes them, with the tokenizer's files
    README.md             the model card
    private.safetensors   the private stream   } only where there is one:
    private.json          its hash and origin  } `export_base` writes neither

All but the last two are the same bytes whatever the private stream is, or whether there is one.
`layout` says what the files hold and checks them.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from . import card, hub, layout
from .config import NO_LATTICE, SeparationConfig
from .embedding import empty_embeddings
from .errors import ArtifactError
from .files import atomic_folder, atomic_write_text
from .layout import (
    BASE_FILE,
    BASE_MANIFEST,
    FORMAT_VERSION,
    PRIVATE_BUFFERS,
    PRIVATE_FILE,
    PRIVATE_MANIFEST,
    WEIGHTS_FIELD,
    WITHOUT_LIBORTHO,
)
from .models import linear_layers, replace_module, stored_tokenizer
from .precision import dtype_name
from .switch import ortho_layers

SEPARATION, TOKENIZER = "ortho_separation", "ortho_tokenizer"
"""Attributes of a separated model: the `SeparationConfig` that made it, and its tokenizer."""
_ADDED_TO_CONFIG = ("quantization_config", WEIGHTS_FIELD)


def save(model: Any, folder: str | Path) -> Path:
    """Write a separated model with its private stream, if it has one; returns the folder.

    The folder appears whole or not at all, and must not exist yet. Raises `ArtifactError` if it
    does or can't be written, `SeparationError` for a model that is not separated.
    """
    return _write(model, folder, private=True)


def export_base(model: Any, folder: str | Path) -> Path:
    """Write what alpha = 0 is, with not one byte of the private stream; as `save` otherwise.

    This is the folder to publish.
    """
    return _write(model, folder, private=False)


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Read an artefact back as (model, tokenizer), at alpha = 1, in eval mode.

    Every file is compared with its hash, and every tensor with the shape and dtype that the format
    demands. Raises `ArtifactError` for anything missing, truncated, altered, unexpected or written
    by another format.
    """
    folder = Path(folder)
    manifest = layout.verified_manifest(folder, BASE_MANIFEST)
    separation = layout.separation_in(manifest, folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = stored_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ArtifactError(f"{folder} can't be read: {said} Export it again.") from error
    _forget_format(config)
    tensors = layout.read_tensors(folder / BASE_FILE)
    private = {}
    if layout.has_private(folder, manifest):
        private = layout.read_tensors(folder / PRIVATE_FILE)

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, linear in linear_layers(model).items():
        weight = tensors.get(f"{name}.weight")
        dtype = torch.float32 if weight is None else weight.dtype
        layer = layout.empty_layer(name, linear, separation, tensors, private, dtype=dtype)
        replace_module(model, name, layer)
    if separation.head_bits != NO_LATTICE:
        empty_embeddings(model, getattr(torch, manifest["dtype"]))
    layout.check_tensors(model, tensors, private, folder)
    model.load_state_dict(tensors, strict=False, assign=True)
    layout.finish_layers(ortho_layers(model), private, folder)
    model.tie_weights()
    model.config.dtype = getattr(torch, manifest["dtype"])
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    mark(model, separation, tokenizer)
    return model.eval().requires_grad_(False).to(device), tokenizer


def separation_of(folder: str | Path) -> SeparationConfig:
    """The recipe that an artefact's base was made by, its files verified; raises as `load` does."""
    folder = Path(folder)
    return layout.separation_in(layout.verified_manifest(folder, BASE_MANIFEST), folder)


def base_fingerprint(model_or_folder: Any) -> str:
    """SHA-256, hex, over everything that alpha = 0 computes with: config and tensors.

    Of a live model or of an artefact's folder, with the same outcome. It does not depend on the
    private stream, on alpha, on the device, or on where the model lies. Raises as `load` does.
    """
    if isinstance(model_or_folder, (str, Path)):
        folder = Path(model_or_folder)
        manifest = layout.verified_manifest(folder, BASE_MANIFEST)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = layout.read_tensors(folder / BASE_FILE)
        return layout.digest_of(tensors, manifest["separation"], config)
    model = model_or_folder
    ortho_layers(model)
    separation = getattr(model, SEPARATION).to_dict()
    return layout.digest_of(_base_tensors(model), separation, _config_of(model))


# --- a live model --------------------------------------------------------------------------------


def mark(model: Any, separation: SeparationConfig, tokenizer: Any) -> None:
    """Make a model with separated layers know its recipe and tokenizer, and save as an artefact.

    transformers' own `save_pretrained` would put the private stream beside the base, without
    hashes; so this model gets one that writes an artefact, and a `push_to_hub` that uploads one.
    """
    setattr(model, SEPARATION, separation)
    setattr(model, TOKENIZER, tokenizer)
    # Partials, because copies and pickles of the model then carry their own.
    model.save_pretrained = functools.partial(save_pretrained, model)
    model.push_to_hub = functools.partial(push_to_hub, model)


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`model.save_pretrained(folder)` of a separated model: writes what `save` does.

    Unlike `save` it replaces an artefact that is there already, as is usual in transformers. The
    private stream is written if the model has one; publish what `export_base` writes. Of a model
    with peft adapters only these are saved, as transformers does.

    options: those of `push_to_hub`, if that is asked for; transformers' others (`state_dict`,
        `max_shard_size`) have no effect, because a folder holds one whole model
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, save_directory, **options)
        return
    if not is_main_process:
        return
    folder = Path(save_directory)
    if folder.is_dir():
        _replace(model, folder)
    else:
        _write(model, folder, private=True)
    if push_to_hub:
        hub.upload(folder, options.pop("repo_id", folder.name), **_secrecy(model), **options)


def push_to_hub(model: Any, repo_id: str, **options: Any) -> Any:
    """`model.push_to_hub("owner/name")` of a separated model: uploads what `save` writes.

    options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`,
        as transformers has them

    Raises `ArtifactError`, before anything is uploaded, if the model has a private stream and the
    repository is not private.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = _write(model, Path(temporary) / "artefact", private=True)
        return hub.upload(folder, repo_id, **_secrecy(model), **options)


def _secrecy(model: Any) -> dict[str, bool]:
    return {"secret": any(la.private_columns.shape[0] for la in ortho_layers(model).values())}


def _replace(model: Any, folder: Path) -> None:
    """Write a model over whatever artefact lies in a folder; other files stay."""
    unfinished = folder / f".{uuid.uuid4().hex[:12]}.tmp"
    try:
        written = _write(model, unfinished, private=True)
        # Manifests go first and come last: what is interrupted between is no artefact.
        for name in (BASE_MANIFEST, PRIVATE_MANIFEST, PRIVATE_FILE):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(written.iterdir(), key=lambda p: p.name == BASE_MANIFEST):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget_format(config: Any) -> None:
    """Drop from a transformers config what only a file says."""
    for name in _ADDED_TO_CONFIG:
        if hasattr(config, name):
            delattr(config, name)


# --- writing ------------------------------------------------------------------------------------


def _write(model: Any, folder: str | Path, *, private: bool) -> Path:
    folder = Path(folder)
    layers = ortho_layers(model)
    if folder.exists():
        raise ArtifactError(f"{folder} exists already. Choose another folder, or remove it first.")
    if any(name.endswith(".base_layer") for name in layers):
        raise ArtifactError(
            f"this model carries adapters, which {folder} has no place for. Save them with peft, "
            "and the model itself after `unload()`."
        )
    tensors = _base_tensors(model)
    try:
        with atomic_folder(folder) as unfinished:
            save_file(tensors, unfinished / BASE_FILE, {"format": "pt"})
            fingerprint = describe(
                unfinished, model, tensors, getattr(model, SEPARATION), getattr(model, TOKENIZER)
            )
            slots = sum(layer.private_columns.shape[0] for layer in layers.values())
            if private and slots:
                entries = {
                    f"{name}.{kind}": getattr(layer, kind).cpu().contiguous()
                    for name, layer in layers.items()
                    for kind in PRIVATE_BUFFERS
                }
                write_private(unfinished, entries, fingerprint)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) >> 20
        free = shutil.disk_usage(_existing_parent(folder)).free >> 20
        raise ArtifactError(
            f"{folder} could not be written: {error}. About {needed} MiB are needed and {free} MiB "
            "are free there; nothing was left behind."
        ) from error
    return folder


def describe(
    folder: Path,
    model: Any,
    tensors: Mapping[str, Tensor],
    separation: SeparationConfig,
    tokenizer: Any,
) -> str:
    """Write everything that lies beside the tensors of a base; returns its fingerprint.

    model: its configs are taken; its own weights may be on the meta device
    tensors: what `base.safetensors` holds in that folder
    """
    config = _config_of(model)
    _write_json(folder / "config.json", config | _format_of(separation))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fingerprint = layout.digest_of(tensors, separation.to_dict(), config)
    manifest = {
        "format_version": FORMAT_VERSION,
        "separation": separation.to_dict(),
        "dtype": dtype_name(model.dtype),
        "base_fingerprint": fingerprint,
        "files": layout.hashes_of(folder, ("config.json", BASE_FILE)),
    }
    _write_json(folder / BASE_MANIFEST, manifest)
    atomic_write_text(folder / card.CARD_FILE, card.render(manifest, config))
    return fingerprint


def write_private(folder: Path, entries: Mapping[str, Tensor], fingerprint: str) -> None:
    """Put a private stream, tensors by name, beside the base with that fingerprint."""
    save_file(dict(entries), folder / PRIVATE_FILE, {"format": "pt"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "base_fingerprint": fingerprint,
        "files": layout.hashes_of(folder, (PRIVATE_FILE,)),
    }
    _write_json(folder / PRIVATE_MANIFEST, manifest)


def _config_of(model: Any) -> dict[str, Any]:
    """The model's config as transformers writes it, and as if it had never been on a disk."""
    config = copy.deepcopy(model.config)
    _forget_format(config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    return json.loads(config.to_json_string(use_diff=True))


def _format_of(separation: SeparationConfig) -> dict[str, Any]:
    """What tells transformers whose checkpoint this is, with libortho and without it."""
    return {
        "quantization_config": layout.quantization_config(separation),
        WEIGHTS_FIELD: WITHOUT_LIBORTHO,
    }


def base_state(model: Any) -> dict[str, Tensor]:
    """Everything but the private stream, by name; a head tied to the embedding goes unsaid."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] not in PRIVATE_BUFFERS and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _base_tensors(model: Any) -> dict[str, Tensor]:
    """The same on the CPU."""
    tensors = base_state(model)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ArtifactError(
                f"{name} is offloaded, so this model can't be read whole. Load it without a device "
                "map to save it or take its fingerprint."
            )
        tensors[name] = tensor.cpu().contiguous()
    return tensors


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())
