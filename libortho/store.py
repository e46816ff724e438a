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
from .files import alone, atomic_write_text, remove_abandoned
from .models import ResolvedModel
from .precision import dtype_name
from .records import RecordSet
from .sharded import separate_checkpoint
from .tuning import tune_private

_SEPARATING = (
    *("blockwise", "calibration", "embedding", "lattice", "linear", "precision", "separation"),
    *("sharded", "split", "stream", "windows"),
)
_TUNING = ("kernels/op", "product", "scoring", "training", "tuning")
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
    folder = place(
        resolved.name,
        code=_SEPARATING,
        cache_dir=cache_dir,
        model=resolved.identity,
        calibration=calibration.sha256,
        config=config.to_dict(),
        device=torch.device(device).type,
    )
    with alone(folder):
        if folder.exists():
            return Stored(folder, reused=True)
        remove_abandoned(folder.parent)
        separate_checkpoint(resolved, folder, calibration, config=config, device=device)
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
    folder = place(
        f"{base.name.rpartition('-')[0]}-tuned",
        code=_TUNING,
        cache_dir=cache_dir,
        base=base.name,
        records=records.fingerprint,
        replay=replay.sha256,
        config=config.to_dict(),
        compute=dtype_name(compute_dtype),
        device=torch.device(device).type,
    )
    with alone(folder):
        if folder.exists() and (report := recall(folder)) is not None:
            return Stored(folder, reused=True), report
        remove_abandoned(folder.parent)
        model, tokenizer = artifact.load(base, device=device)
        report = tune_private(
            model,
            tokenizer,
            records.repeated,
            replay=replay,
            config=config,
            compute_dtype=compute_dtype,
        ).to_dict()
        remember(folder, report)
        if not folder.exists():
            artifact.save(model, folder)
        return Stored(folder, reused=False), report


def exported(full: Path, *, cache_dir: str | Path | None = None) -> Stored:
    """What would be handed out of a saved model: its base alone, written from the model itself."""
    folder = place(
        f"{full.name}-exported",
        code=("artifact", "layout", "linear", "stream"),
        cache_dir=cache_dir,
        full=content_of(full),
    )
    with alone(folder):
        if folder.exists():
            return Stored(folder, reused=True)
        model, _ = artifact.load(full)
        artifact.export_base(model, folder)
        return Stored(folder, reused=False)


def content_of(folder: Path) -> list[str | None]:
    """What tells a saved model from any other: its manifests, which hold the hash of every file."""
    manifests = [folder / artifact.BASE_MANIFEST, folder / artifact.PRIVATE_MANIFEST]
    return [m.read_text(encoding="utf-8") if m.exists() else None for m in manifests]


def place(
    name: str,
    *,
    code: Sequence[str],
    libraries: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    **determined_by: Any,
) -> Path:
    """Where something is kept that depends on nothing but what is given here.

    code: modules of this package whose text determines it, such as "tuning" or "methods/dense"
    libraries: distributions whose versions do, beside torch and transformers
    determined_by: whatever else does, as JSON types

    The folder exists if and only if it is complete: write it with `atomic_folder` alone.
    """
    key = _key(libraries, **determined_by, code=_code(code))
    return _folder(cache_dir) / f"{_plain(name)}-{key}"


def remember(folder: Path, report: Mapping[str, Any]) -> None:
    """Keep a report beside a folder of the store; to be written before the folder appears."""
    atomic_write_text(_report_of(folder), json.dumps(report))


def recall(folder: Path) -> dict[str, Any] | None:
    """The report beside a folder of the store, or None if there is none."""
    path = _report_of(folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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


def _report_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".report.json")


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in name)


def _key(libraries: Sequence[str] = (), **determined_by: Any) -> str:
    names = ("torch", "transformers", "tokenizers", *libraries)
    versions = {name: metadata.version(name) for name in names}
    # An artefact of another format could not be read again.
    form = artifact.FORMAT_VERSION
    content: Mapping[str, Any] = {**determined_by, "versions": versions, "format": form}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _code(modules: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in modules:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()
