"""Artefacts on disk: `save`, `load`, `export_base` and `base_fingerprint`.

Knows files and separated models. A folder holds

    model.safetensors     base, residual and everything that was not separated
    libortho.json         what made them, hashes of the files, and the base's fingerprint
    config.json, ...      as transformers writes them, with the tokenizer's files
    private.safetensors   the private stream   } only where there is one:
    private.json          its hash and origin  } `export_base` writes neither

The first three are the same bytes whatever the private stream is, or whether there is one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from . import stream
from .config import SeparationConfig
from .errors import ArtifactError, ConfigError, ShapeError
from .files import atomic_folder, atomic_write_text, sha256_of
from .linear import OrthoLinear
from .models import linear_layers, replace_module, stored_tokenizer
from .separation import SEPARATION, TOKENIZER
from .switch import ortho_layers

FORMAT_VERSION = 1
BASE_FILE, BASE_MANIFEST = "model.safetensors", "libortho.json"
PRIVATE_FILE, PRIVATE_MANIFEST = "private.safetensors", "private.json"
_PRIVATE = ("private_columns", "private_values")
VOLATILE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Fields of a transformers config that don't change what the model computes."""


def save(model: Any, folder: str | Path) -> Path:
    """Write a separated model with its private stream, if it has one; returns the folder.

    The folder appears whole or not at all, and must not exist yet. Raises `ArtifactError` if it
    does or can't be written, `SeparationError` for a model that is not separated.
    """
    return _write(model, folder, private=True)


def export_base(model: Any, folder: str | Path) -> Path:
    """Write what alpha = 0 is, with not one byte of the private stream; as `save` otherwise."""
    return _write(model, folder, private=False)


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Read an artefact back as (model, tokenizer), at alpha = 1, in eval mode.

    Every file is compared with its hash, and every tensor with the shape and dtype that the format
    demands. Raises `ArtifactError` for anything missing, truncated, altered, unexpected or written
    by a newer format.
    """
    folder = Path(folder)
    manifest = _verified_manifest(folder, BASE_MANIFEST)
    separation = _separation_in(manifest, folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = stored_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ArtifactError(f"{folder} can't be read: {said} Export it again.") from error
    tensors = _read_tensors(folder / BASE_FILE)
    private = {}
    if (folder / PRIVATE_MANIFEST).exists() or (folder / PRIVATE_FILE).exists():
        _verified_manifest(folder, PRIVATE_MANIFEST)
        private = _read_tensors(folder / PRIVATE_FILE)

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, linear in linear_layers(model).items():
        replace_module(model, name, _empty_layer(name, linear, separation, tensors, private))
    _fill(model, tensors, private, folder)
    model.tie_weights()
    model.config.dtype = getattr(torch, manifest["dtype"])
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    setattr(model, SEPARATION, separation)
    setattr(model, TOKENIZER, tokenizer)
    return model.eval().requires_grad_(False).to(device), tokenizer


def separation_of(folder: str | Path) -> SeparationConfig:
    """The recipe that an artefact's base was made by, its files verified; raises as `load` does."""
    folder = Path(folder)
    return _separation_in(_verified_manifest(folder, BASE_MANIFEST), folder)


def base_fingerprint(model_or_folder: Any) -> str:
    """SHA-256, hex, over everything that alpha = 0 computes with: config and tensors.

    Of a live model or of an artefact's folder, with the same outcome. It does not depend on the
    private stream, on alpha, on the device, or on where the model lies. Raises as `load` does.
    """
    if isinstance(model_or_folder, (str, Path)):
        folder = Path(model_or_folder)
        manifest = _verified_manifest(folder, BASE_MANIFEST)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _digest(_read_tensors(folder / BASE_FILE), manifest["separation"], config)
    model = model_or_folder
    ortho_layers(model)
    config = json.loads(model.config.to_json_string(use_diff=True))
    return _digest(_base_tensors(model), getattr(model, SEPARATION).to_dict(), config)


# --- writing ------------------------------------------------------------------------------------


def _write(model: Any, folder: str | Path, *, private: bool) -> Path:
    folder = Path(folder)
    layers = ortho_layers(model)
    if folder.exists():
        raise ArtifactError(f"{folder} exists already. Choose another folder, or remove it first.")
    separation: SeparationConfig = getattr(model, SEPARATION)
    tensors = _base_tensors(model)
    try:
        with atomic_folder(folder) as unfinished:
            config = copy.deepcopy(model.config)
            config.dtype = model.dtype
            config.save_pretrained(unfinished)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(unfinished)
            getattr(model, TOKENIZER).save_pretrained(unfinished)
            save_file(tensors, unfinished / BASE_FILE, {"format": "pt"})
            fingerprint = base_fingerprint(model)
            manifest = {
                "format_version": FORMAT_VERSION,
                "separation": separation.to_dict(),
                "dtype": str(model.dtype).removeprefix("torch."),
                "base_fingerprint": fingerprint,
                "files": _hashes(unfinished, ("config.json", BASE_FILE)),
            }
            _write_json(unfinished / BASE_MANIFEST, manifest)
            slots = sum(layer.private_columns.shape[0] for layer in layers.values())
            if private and slots:
                entries = {
                    f"{name}.{kind}": getattr(layer, kind).cpu().contiguous()
                    for name, layer in layers.items()
                    for kind in _PRIVATE
                }
                save_file(entries, unfinished / PRIVATE_FILE, {"format": "pt"})
                manifest = {
                    "format_version": FORMAT_VERSION,
                    "base_fingerprint": fingerprint,
                    "files": _hashes(unfinished, (PRIVATE_FILE,)),
                }
                _write_json(unfinished / PRIVATE_MANIFEST, manifest)
    except (OSError, SafetensorError) as error:
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) >> 20
        free = shutil.disk_usage(_existing_parent(folder)).free >> 20
        raise ArtifactError(
            f"{folder} could not be written: {error}. About {needed} MiB are needed and {free} MiB "
            "are free there; nothing was left behind."
        ) from error
    return folder


def _base_tensors(model: Any) -> dict[str, Tensor]:
    """Everything but the private stream, by name; a head tied to the embedding goes unsaid."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] in _PRIVATE or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _hashes(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())


def _digest(
    tensors: Mapping[str, Tensor], separation: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    lasting = {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
    digest = hashlib.sha256()
    header = {"format_version": FORMAT_VERSION, "separation": separation, "config": lasting}
    digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


# --- reading ------------------------------------------------------------------------------------


def _verified_manifest(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}. Give the folder that save wrote.")
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ArtifactError(
            f"{folder} has no {name}; it holds {found}. Give a folder that libortho.save or "
            "libortho.export_base wrote, whole."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = int(manifest["format_version"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Export the artefact again.") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version} and this libortho reads {FORMAT_VERSION}. "
            "Upgrade libortho, or export the artefact again."
        )
    for file, expected in files.items():
        target = folder / Path(file).name
        if not target.exists():
            raise ArtifactError(f"{folder} lacks {file}. Copy the artefact again, whole.")
        if sha256_of(target) != expected:
            raise ArtifactError(
                f"{target} is not the file that was saved: its SHA-256 differs from the one in "
                f"{name}. It is truncated or was altered; copy the artefact again."
            )
    return manifest


def _separation_in(manifest: Mapping[str, Any], folder: Path) -> SeparationConfig:
    try:
        return SeparationConfig.from_dict(manifest["separation"])
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(
            f"{folder / BASE_MANIFEST} names no recipe that can be read: {error} Export it again."
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} can't be read: {error}. It is missing or truncated; copy the artefact again."
        ) from error


def _empty_layer(
    name: str,
    linear: nn.Linear,
    separation: SeparationConfig,
    tensors: Mapping[str, Tensor],
    private: Mapping[str, Tensor],
) -> OrthoLinear:
    """A layer of the format that the tensors claim; `_fill` then holds them to it."""
    residual = tensors.get(f"{name}.residual_columns")
    secret = private.get(f"{name}.private_columns")
    weight = tensors.get(f"{name}.weight")
    return OrthoLinear(
        linear.in_features,
        linear.out_features,
        bits=separation.bits,
        group_size=separation.group_size,
        residual_slots=0 if residual is None else residual.shape[0],
        private_slots=0 if secret is None else secret.shape[0],
        bias=linear.bias is not None,
        dtype=torch.float32 if weight is None else weight.dtype,
        device="meta",
    )


def _fill(
    model: Any, tensors: Mapping[str, Tensor], private: Mapping[str, Tensor], folder: Path
) -> None:
    """Put the tensors into the model; shapes, dtypes and names must be exactly as expected."""
    head = model.get_output_embeddings()
    tied = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if module is head and model.config.tie_word_embeddings
    }
    layers = ortho_layers(model)
    expected = dict(model.state_dict())
    given = {**tensors, **private}
    for name, layer in layers.items():
        if layer.private_columns.shape[0] == 0:
            for kind in _PRIVATE:
                given[f"{name}.{kind}"] = torch.zeros(0, layer.out_features).to(
                    getattr(layer, kind).dtype
                )
    unknown = sorted(set(given) - set(expected))
    misplaced = sorted(n for n in tensors if n.rpartition(".")[2] in _PRIVATE)
    missing = sorted(set(expected) - set(given) - tied)
    if unknown or misplaced or missing:
        raise ArtifactError(
            f"{folder} does not hold what its configuration says: missing {missing[:3]}, "
            f"unexpected {(unknown + misplaced)[:3]}. It was altered or mixed with another "
            "artefact; copy it again."
        )
    for name, tensor in given.items():
        want = expected[name]
        fixed = not want.is_floating_point() or name.rpartition(".")[2] in (
            *("scales", "zeros", "residual_values", "private_values"),
        )
        if tensor.shape != want.shape or (fixed and tensor.dtype != want.dtype):
            raise ArtifactError(
                f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)} and should be "
                f"{want.dtype} {list(want.shape)}. Copy the artefact again."
            )
    model.load_state_dict(given, strict=False, assign=True)
    for name, layer in layers.items():
        layer.alpha = torch.ones(())  # not stored: the caller's choice
        try:
            for kind in ("residual", "private"):
                stream.check(
                    getattr(layer, f"{kind}_columns"),
                    getattr(layer, f"{kind}_values"),
                    layer.in_features,
                    layer.out_features,
                    f"{name}'s {kind} stream",
                )
        except ShapeError as error:
            raise ArtifactError(f"{folder}: {error} Copy the artefact again.") from error
