"""Separated and tuned artefacts on disk, each under a key of everything that determines it.

Knows how to make what is missing and how to find what is there. Anything that could change a byte
is in the key: the model's content, the text's, the recipe, the code that carries it out, and the
versions and the type of device that compute it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import artifact
from .config import SeparationConfig, TuningConfig
from .corpora import Split
from .fetch import cache_folder
from .files import atomic_write_text
from .models import ResolvedModel, load_model
from .precision import dtype_name
from .records import RecordSet
from .separation import separate
from .tuning import tune_private

_SEPARATING = ("calibration", "lattice", "linear", "precision", "separation", "stream", "windows")
_TUNING = ("scoring", "tuning")
"""Modules whose text is part of the keys."""


@dataclass(frozen=True)
class Stored:
    """An artefact's folder, and whether it was there already."""

    folder: Path
    reused: bool


def separated(
    resolved: ResolvedModel,
    calibration: Split,
    config: SeparationConfig,
    *,
    device: str | torch.device,
    cache_dir: str | Path | None = None,
) -> Stored:
    """The model as base + residual; separated at first use."""
    key = _key(
        model=resolved.identity,
        calibration=calibration.sha256,
        config=config.to_dict(),
        device=torch.device(device).type,
        code=_code(_SEPARATING),
    )
    folder = _folder(cache_dir) / f"{_plain(resolved.name)}-{key}"
    if _whole(folder):
        return Stored(folder, reused=True)
    model, tokenizer = load_model(resolved, device=device)
    separate(model, tokenizer, calibration, config=config)
    artifact.save(model, folder)
    return Stored(folder, reused=False)


def tuned(
    base: Path,
    records: RecordSet,
    replay: Split,
    config: TuningConfig,
    *,
    compute_dtype: torch.dtype,
    device: str | torch.device,
    cache_dir: str | Path | None = None,
) -> tuple[Stored, dict[str, Any]]:
    """A separated model with a private stream tuned on the planted records, and its report."""
    key = _key(
        base=base.name,
        records=records.fingerprint,
        replay=replay.sha256,
        config=config.to_dict(),
        compute=dtype_name(compute_dtype),
        device=torch.device(device).type,
        code=_code(_TUNING),
    )
    folder = _folder(cache_dir) / f"{base.name.rpartition('-')[0]}-tuned-{key}"
    report_file = folder.with_name(folder.name + ".report.json")
    if _whole(folder) and report_file.exists():
        return Stored(folder, reused=True), json.loads(report_file.read_text(encoding="utf-8"))
    model, tokenizer = artifact.load(base, device=device)
    report = tune_private(
        model,
        tokenizer,
        records.planted,
        replay=replay,
        config=config,
        compute_dtype=compute_dtype,
    ).to_dict()
    atomic_write_text(report_file, json.dumps(report))
    artifact.save(model, folder)
    return Stored(folder, reused=False), report


def remembered_losses(
    make: Callable[[], Sequence[float]],
    *,
    cache_dir: str | Path | None = None,
    **determined_by: Any,
) -> tuple[list[float], bool]:
    """Losses that depend on nothing but `determined_by`; (values, whether they were remembered)."""
    path = _folder(cache_dir) / f"losses-{_key(**determined_by, code=_code(('scoring',)))}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8")), True
    losses = list(make())
    atomic_write_text(path, json.dumps(losses))
    return losses, False


def record_salt(cache_dir: str | Path | None = None) -> bytes:
    """This cache's own random salt for record hashes: 16 bytes, made once, never published."""
    path = cache_folder(cache_dir) / "record_salt"
    if not path.exists():
        atomic_write_text(path, secrets.token_hex(16))
        path.chmod(0o600)
    return bytes.fromhex(path.read_text(encoding="utf-8"))


def _folder(cache_dir: str | Path | None) -> Path:
    folder = cache_folder(cache_dir) / "artefacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _whole(folder: Path) -> bool:
    """An artefact's folder is renamed into place when it is complete, so its manifest suffices."""
    return (folder / artifact.BASE_MANIFEST).exists()


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in name)


def _key(**determined_by: Any) -> str:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    # An artefact of another format could not be read again.
    form = artifact.FORMAT_VERSION
    content: Mapping[str, Any] = {**determined_by, "versions": versions, "format": form}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _code(modules: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in modules:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
