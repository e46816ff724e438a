"""The files of an artefact: their names, hashes, headers and tensors, and the checks on them.

Knows files, and what a model with separated layers expects of them. It doesn't know how such a
model is built or written (`artifact`), nor how transformers loads one (`hf`).

Format version 2. Version 1 was never released: its tensors lay in `model.safetensors`, which
transformers without libortho took for a plain checkpoint with every linear weight missing. Now two
things stand in the way of that: the tensors lie under another name, and `config.json` names as
`transformers_weights` a sentence that says what to install, which transformers refuses and prints.

A layer's tensors are those of `OrthoLinear`. Where the recipe has `head_bits` 8 the embedding is
`packed` uint8 `[rows, hidden]` with float16 `scales` and `zeros` `[rows, 1]`, by the formula of
`lattice`, and so is the head unless it is tied: then it has no tensors. A recipe that doesn't name
`head_bits` has 16, which is the model's own `weight`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import stream
from .config import SeparationConfig
from .errors import ArtifactError, ConfigError, ShapeError
from .files import sha256_of
from .linear import OrthoLinear
from .switch import ortho_layers

FORMAT_VERSION = 2
BASE_FILE, BASE_MANIFEST = "base.safetensors", "libortho.json"
PRIVATE_FILE, PRIVATE_MANIFEST = "private.safetensors", "private.json"
PRIVATE_BUFFERS = ("private_columns", "private_values")

QUANT_METHOD = "ortho"
WEIGHTS_FIELD = "transformers_weights"
"""Field of config.json from which transformers takes the name of the file with the weights."""
WITHOUT_LIBORTHO = (
    "none, because this checkpoint is separated into base and streams, which only libortho reads: "
    "run `pip install libortho`, and `import libortho` before from_pretrained"
)
"""What stands in that field. It ends in no file name on purpose: transformers then raises it."""

VOLATILE_FIELDS = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("quantization_config", WEIGHTS_FIELD),
)
"""Fields of a transformers config that don't change what the model computes, or that a fingerprint
takes from elsewhere (the recipe)."""

_FIXED = ("scales", "zeros", "residual_values", "private_values")
"""Floating-point tensors whose dtype is part of the format; a model's own may be any."""
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"U8": torch.uint8, "U16": torch.uint16},
}


def quantization_config(separation: SeparationConfig) -> dict[str, Any]:
    """The entry of config.json that makes transformers ask for libortho's quantiser."""
    method = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    return method | separation.to_dict()


def digest_of(
    tensors: Mapping[str, Tensor], separation: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """SHA-256, hex, over a base's tensors (on the CPU), its recipe, and the lasting config."""
    lasting = {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
    digest = hashlib.sha256()
    header = {"format_version": FORMAT_VERSION, "separation": separation, "config": lasting}
    digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256, hex, of files in a folder, by name."""
    return {name: sha256_of(folder / name) for name in names}


def verified_manifest(folder: Path, name: str) -> dict[str, Any]:
    """A manifest of an artefact, all of whose files have the hashes that it states.

    Raises `ArtifactError` for anything missing, damaged, altered or written by another format.
    """
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


def has_private(folder: Path, base_manifest: Mapping[str, Any]) -> bool:
    """Whether a private stream lies in a folder; verified, and tuned on this very base, if so."""
    if not any((folder / name).exists() for name in (PRIVATE_MANIFEST, PRIVATE_FILE)):
        return False
    manifest = verified_manifest(folder, PRIVATE_MANIFEST)
    if manifest.get("base_fingerprint") != base_manifest.get("base_fingerprint"):
        raise ArtifactError(
            f"{folder} has the private stream of another base: {PRIVATE_MANIFEST} and "
            f"{BASE_MANIFEST} name different fingerprints. Copy both from one artefact."
        )
    return True


def separation_in(manifest: Mapping[str, Any], folder: Path) -> SeparationConfig:
    """The recipe that a manifest states; raises `ArtifactError` for none that can be read."""
    try:
        return SeparationConfig.from_dict(manifest["separation"])
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(
            f"{folder / BASE_MANIFEST} names no recipe that can be read: {error} Export it again."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(_unreadable(path, error)) from error


def read_headers(path: Path) -> dict[str, Tensor]:
    """Shapes and dtypes of a safetensors file, by name, as tensors on the meta device."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                kind = _DTYPES[piece.get_dtype()]
                tensors[name] = torch.empty(piece.get_shape(), dtype=kind, device="meta")
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(_unreadable(path, error)) from error
    return tensors


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} can't be read: {error}. It is missing or truncated; copy the artefact again."


def empty_layer(
    name: str,
    linear: nn.Linear,
    separation: SeparationConfig,
    tensors: Mapping[str, Tensor],
    private: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
) -> OrthoLinear:
    """A layer on the meta device of the format that an artefact's tensors claim.

    dtype: that of an unquantised weight and of the bias. `check_tensors` holds them to the format.
    """
    residual = tensors.get(f"{name}.residual_columns")
    secret = private.get(f"{name}.private_columns")
    return OrthoLinear(
        linear.in_features,
        linear.out_features,
        bits=separation.bits,
        group_size=separation.group_size,
        residual_slots=0 if residual is None else residual.shape[0],
        private_slots=0 if secret is None else secret.shape[0],
        bias=linear.bias is not None,
        dtype=dtype,
        device="meta",
    )


def check_tensors(
    model: Any, tensors: Mapping[str, Tensor], private: Mapping[str, Tensor], folder: Path
) -> None:
    """Names, shapes and dtypes must be exactly those of a model with `empty_layer`s.

    Takes tensors or their headers. Raises `ArtifactError` for the first difference.
    """
    head = model.get_output_embeddings()
    tied = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if module is head and model.config.tie_word_embeddings
    }
    expected = dict(model.state_dict())
    optional = {
        f"{name}.{kind}"
        for name, layer in ortho_layers(model).items()
        for kind in PRIVATE_BUFFERS
        if layer.private_columns.shape[0] == 0
    }
    given = {**tensors, **private}
    unknown = sorted(set(given) - set(expected))
    misplaced = sorted(n for n in tensors if n.rpartition(".")[2] in PRIVATE_BUFFERS)
    missing = sorted(set(expected) - set(given) - tied - optional)
    if unknown or misplaced or missing:
        raise ArtifactError(
            f"{folder} does not hold what its configuration says: missing {missing[:3]}, "
            f"unexpected {(unknown + misplaced)[:3]}. It was altered or mixed with another "
            "artefact; copy it again."
        )
    for name, tensor in given.items():
        want = expected[name]
        fixed = not want.is_floating_point() or name.rpartition(".")[2] in _FIXED
        same = tensor.dtype == want.dtype if fixed else tensor.is_floating_point()
        if tensor.shape != want.shape or not same:
            raise ArtifactError(
                f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)} and should be "
                f"{want.dtype} {list(want.shape)}. Copy the artefact again."
            )


def finish_layers(
    layers: Mapping[str, OrthoLinear], private: Mapping[str, Tensor], folder: Path
) -> None:
    """Give loaded layers their private streams (none if `private` is empty) and alpha = 1.

    Raises `ArtifactError` for a stream whose columns are out of range or order.
    """
    for name, layer in layers.items():
        device = layer.residual_columns.device
        layer.alpha = torch.ones((), device=device)  # not stored: the caller's choice
        sizes = layer.in_features, layer.out_features
        nothing = torch.zeros(0, layer.out_features)
        columns = private.get(f"{name}.private_columns", nothing.to(torch.uint16))
        values = private.get(f"{name}.private_values", nothing.half())
        try:
            residual = layer.residual_columns, layer.residual_values
            stream.check(*residual, *sizes, f"{name}'s residual stream")
            stream.check(columns, values, *sizes, f"{name}'s private stream")
        except ShapeError as error:
            raise ArtifactError(f"{folder}: {error} Copy the artefact again.") from error
        layer.set_private(columns.to(device), values.to(device))
