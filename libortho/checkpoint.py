"""A folder with a transformers checkpoint: is it complete and plain, and what are its bytes?

Knows: file names, config.json, safetensors headers, hashes. Builds no model and unpickles nothing.
Doesn't know: where the folder came from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from libortho.errors import ModelLoadError
from libortho.fetch import cache_folder
from libortho.files import atomic_write_text, sha256_of

# Written by libortho beside weights that it converted; says what they were converted from.
ORIGIN_FILE = "libortho_origin.json"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What determines a loaded model; other files (README, licence) are not part of its identity.
_IDENTITY_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises `ModelLoadError` if missing or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelLoadError(
            f"{folder} is not a transformers checkpoint: it has no config.json (found: {found}). "
            "Give the folder that holds config.json, the *.safetensors files and the tokenizer; "
            "for a hub cache that is the folder below snapshots/."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(
            f"{path} is not valid JSON ({error}). Copy or download the checkpoint again."
        ) from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} is not a JSON object. Download the checkpoint again.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, whether they exist or not; [] if none."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{index} is not a valid index of weight files. Download the checkpoint again."
            ) from error
    single = folder / SINGLE_FILE
    return [single] if single.is_file() else []


def is_complete(folder: Path) -> bool:
    """Whether config, every weight file and a tokenizer are there (an interrupted download?)."""
    files = weight_files(folder)
    return (
        (folder / "config.json").is_file()
        and bool(files)
        and all(file.is_file() for file in files)
        and any((folder / name).is_file() for name in TOKENIZER_FILES)
    )


def check_plain(folder: Path) -> None:
    """Raise `ModelLoadError`, with the remedy, unless the folder holds a plain checkpoint.

    Plain: known to transformers without remote code, not quantised, safetensors, with a tokenizer.
    """
    config = read_config(folder)
    _check_not_quantised(folder, config)
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelLoadError(
            f"{folder} needs code of its own (config.json has auto_map, and transformers doesn't "
            f"know model_type {config.get('model_type')!r}). libortho never runs code that comes "
            "with a checkpoint. Use a model that transformers supports by itself, or upgrade "
            "transformers if it has been added since."
        )
    _check_weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelLoadError(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Copy the "
            "tokenizer files of the same model into it, or save them there with "
            "tokenizer.save_pretrained(folder)."
        )


def _check_not_quantised(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "ortho":
        raise ModelLoadError(
            f"{folder} is already separated. Read it with libortho.load(folder); load_model is for "
            "the plain model that a separation starts from."
        )
    raise ModelLoadError(
        f"{folder} is already quantised (quant_method {method!r}), so its weights are not the "
        "plain ones that a separation starts from. Use the unquantised checkpoint of this model."
    )


def _check_weight_files(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        pickles = sorted(e.name for e in folder.iterdir() if e.suffix in _PICKLE_SUFFIXES)
        found = (
            f"only pickled weights ({', '.join(pickles[:4])}), which can run code when read"
            if pickles
            else "no weight files"
        )
        raise ModelLoadError(
            f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}; found {found}. Download the "
            "safetensors revision of the model, or convert weights that you trust yourself with "
            "model.save_pretrained(folder), which writes safetensors."
        )
    for file in files:
        if not file.is_file():
            raise ModelLoadError(
                f"{folder} is incomplete: {INDEX_FILE} names {file.name}, which is not there. "
                "Finish the download or the copy."
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} is truncated or corrupt ({error}; {file.stat().st_size:,} bytes). Delete "
                f"{file if _origin(folder) is None else folder} and download it again."
            ) from error


def _origin(folder: Path) -> dict[str, Any] | None:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return origin if isinstance(origin, dict) else None


def dtype_on_disk(folder: Path) -> torch.dtype:
    """The dtype that most tensors of the checkpoint are stored in; read from headers only."""
    counts: Counter[str] = Counter()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            counts.update(tensors.get_slice(key).get_dtype() for key in tensors.keys())  # noqa: SIM118
    name = counts.most_common(1)[0][0] if counts else "no tensors"
    if name not in _DTYPES:
        raise ModelLoadError(
            f"The weights in {folder} are stored as {name}. A separation starts from plain "
            f"floating-point weights ({', '.join(_DTYPES)}); use an unquantised checkpoint."
        )
    return _DTYPES[name]


def identity_of(folder: Path, cache_dir: str | Path | None = None) -> str:
    """SHA-256 over the names and contents of all files that determine the loaded model.

    Each file's hash is remembered in the cache by path, size and modification time, because hashing
    a large checkpoint takes longer than evaluating a cached artefact.
    """
    memo_folder = cache_folder(cache_dir) / "hashes"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _IDENTITY_SUFFIXES and file.name != ORIGIN_FILE and file.is_file():
            digest.update(f"{file.name}\0{_remembered_sha256(file, memo_folder)}\n".encode())
    return digest.hexdigest()


def _remembered_sha256(file: Path, memo_folder: Path) -> str:
    status = file.stat()
    path = str(file.resolve())
    stamp = [path, status.st_size, status.st_mtime_ns]
    memo = memo_folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or not one of ours: hash the file
    sha256 = sha256_of(file)
    atomic_write_text(memo, json.dumps({"stamp": stamp, "sha256": sha256}))
    return sha256


def read_origin(folder: Path) -> dict[str, Any]:
    """What `libortho_origin.json` says about converted weights; empty if there is none."""
    return _origin(folder) or {}
