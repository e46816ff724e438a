"""The journal: what an unfinished run has measured, kept on disk until the run is finished.

A journal belongs to a job: the same cases under the same settings, code, packages and machine. A
run that is killed leaves it behind, the next run of the job takes the measurements over and says
so, and a run that ends regularly removes it, so that whoever asks again measures anew. One run at a
time holds a job's journal, under a lock that the operating system drops with the process.

Within a journal each measurement lies under a key of what was measured (weights, text, records).
An entry is written whole or not at all and carries a checksum; a damaged one is named, never used.

Knows keys, JSON and files, not what is measured. It is no place for what is confidential: a prompt,
a secret, or a single record's likelihood, by which a guess could be checked (see `evidence`). What
results files publish may stand in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from .fetch import cache_folder
from .files import atomic_write_text
from .typed_json import FieldError, check_json_values, from_json

T = TypeVar("T")

EXPIRY_DAYS = 30
"""A journal that nobody has resumed for so long is removed by any other run of the cache."""

_DAY_S = 24 * 60 * 60


class Journal:
    """The journal of one job, held by this run unless another run of the job holds it.

    resumed: measurements that were taken over, and when each was made (ISO 8601, UTC)
    notes: what else a user should know: damaged entries, a journal that can't be had
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        code: Iterable[Path] = (),
        cache_dir: str | Path | None = None,
        fresh: bool = False,
    ) -> None:
        """Open the journal, and start a new one if there is none.

        Args:
            job: what makes two runs the same job, as JSON types. Versions of Python and of all
                packages, and this package's source, are added.
            code: folders with further source that measures.
            cache_dir: where it is kept; None is the default.
            fresh: begin anew, whatever an interrupted run has left.
        """
        self.resumed: dict[str, str] = {}
        self.notes: list[str] = []
        self._kept: set[Path] = set()
        root = cache_folder(cache_dir) / "unfinished"
        root.mkdir(exist_ok=True)
        _remove_expired(root)
        sources = [Path(__file__).parent, *code]
        name = _digest({"job": job, "environment": _environment(), "code": _source(sources)})
        self._folder = root / name
        self._lock = _lock_of(self._folder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self.notes.append(
                "another run of the same job is in progress: this one measures everything itself, "
                "and could not be resumed"
            )
            return
        except (OSError, NotImplementedError) as error:
            self.notes.append(f"this run could not be resumed: its journal can't be had ({error})")
            return
        Path(self._lock.lock_file).touch()  # its age is the journal's
        if fresh:
            _remove(self._folder)

    @property
    def held(self) -> bool:
        """Whether measurements are taken over and kept."""
        return self._lock.is_locked

    def measured(self, name: str, kind: Any, make: Callable[[], T], **determined_by: Any) -> T:
        """A measurement: an interrupted run's, or made now and kept.

        Args:
            name: what a user calls it, such as "perplexity, alpha1".
            kind: its type: a dataclass, or what `typed_json` knows.
            make: measures it; whatever it raises is raised, and nothing is kept.
            determined_by: everything beside the job that it depends on, as JSON types.
        """
        return self.timed(name, kind, make, **determined_by)[0]

    def timed(
        self, name: str, kind: Any, make: Callable[[], T], **determined_by: Any
    ) -> tuple[T, float]:
        """As `measured`, with the seconds that it took when it was made."""
        path = self._folder / f"{_digest({'name': name, **determined_by})}.json"
        if self.held and path.exists():
            try:
                entry = _read(path, name)
                value: T = from_json(kind, entry["value"])
            except (OSError, ValueError, RecursionError) as error:
                self.notes.append(f"kept and damaged, so measured anew: {name} ({error})")
            else:
                self._kept.add(path)
                self.resumed[name] = entry["made"]
                return value, float(entry["seconds"])
        value, seconds = made_now(name, kind, make)
        if self.held:
            try:
                _write(path, name, value, seconds)
                self._kept.add(path)
            except (OSError, ValueError) as error:
                self.notes.append(f"not kept for a later run: {name} ({error})")
        return value, seconds

    def close(self, *, finished: bool) -> None:
        """Let go of the journal: it goes with a finished run, and waits for the next otherwise."""
        if not self.held:
            return
        if self.resumed:
            self.notes.append(self._what_was_resumed())
        if finished:
            _remove(self._folder)
            with suppress(OSError):  # Windows keeps open files
                Path(self._lock.lock_file).unlink()
        elif self._kept:
            self.notes.append(
                "this run did not finish; measurements kept, for the same command to go on from: "
                f"{len(self._kept)}"
            )
        self._lock.release()

    def _what_was_resumed(self) -> str:
        first, last = min(self.resumed.values()), max(self.resumed.values())
        when = first if first == last else f"{first} to {last}"
        return (
            f"resumed from an interrupted run, measured {when}: {'; '.join(self.resumed)}. "
            "--fresh measures everything anew"
        )


def made_now(name: str, kind: Any, make: Callable[[], T]) -> tuple[T, float]:
    """A measurement and its seconds, kept nowhere; takes what `Journal.timed` takes."""
    began = time.perf_counter()
    value = make()
    return value, round(time.perf_counter() - began, 3)


# ---------------------------------------------------------------- entries


def _write(path: Path, name: str, value: Any, seconds: float) -> None:
    made = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"name": name, "made": made, "seconds": seconds, "value": _plain(value)}
    check_json_values(entry)
    content = entry | {"sha256": _digest({"key": path.stem, **entry}, digits=64)}
    atomic_write_text(path, json.dumps(content, allow_nan=False, indent=1))


def _read(path: Path, name: str) -> dict[str, Any]:
    """An entry. Raises `OSError`, `ValueError` or `RecursionError` if it is damaged."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise FieldError("it is no entry")
    found = content.pop("sha256", None)
    if found != _digest({"key": path.stem, **content}, digits=64) or content.get("name") != name:
        raise FieldError("its checksum is another")
    return content


def _plain(value: Any) -> Any:
    """Dataclasses and tuples of them as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------- keys


def _digest(content: Any, digits: int = 24) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:digits]


@functools.cache
def _environment() -> list[str]:
    """Python and every installed package with its version: any of them may compute something."""
    packages = set()
    for found in metadata.distributions():
        with suppress(TypeError, KeyError):  # a folder that an uninstallation left behind
            packages.add(f"{found.name} {found.version}")
    return [platform.python_version(), platform.platform(), *sorted(packages)]


def _source(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- folders


def _lock_of(folder: Path) -> FileLock:
    return FileLock(f"{folder}.lock")


def _remove(folder: Path) -> None:
    """Remove a journal in one step: half of it would be taken for an interrupted run's."""
    dropped = folder.with_name(f".{folder.name}.dropped")
    shutil.rmtree(dropped, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def _remove_expired(root: Path) -> None:
    for path in root.glob("*.lock"):
        with suppress(OSError, NotImplementedError, Timeout):
            if time.time() - path.stat().st_mtime > EXPIRY_DAYS * _DAY_S:
                lock = _lock_of(path.with_suffix(""))
                with lock.acquire(timeout=0):
                    _remove(path.with_suffix(""))
                    path.unlink()
