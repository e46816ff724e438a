"""Writing files so that a reader never sees half of one.

Knows: hashing, and replacing a file or a folder in one step of the file system. Every write goes to
a temporary neighbour first, because a rename is atomic only within one file system.
Doesn't know: what is in the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

ABANDONED_AFTER_S = 24 * 60 * 60
"""Age of a temporary file or folder that no writer can still be busy with."""

log = logging.getLogger(__name__)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits, read in blocks. Raises `OSError` as `open` does."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_sibling(path: Path) -> Path:
    # Not `tempfile`: its files are private to the user, and a shared cache should follow the umask.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in a folder: their temporary files and folders.

    Not one of them is ever read, but an unfinished model takes as much room as a finished one.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # gone, or another user's
            if time.time() - path.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` at success.

    On any exception, an interrupt included, the temporary file is removed and `path` stays as it
    was. Two writers at once are safe: the last one wins, whole. The parent folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        # To the disk before the rename, or a power cut could leave the new name on empty blocks.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with the newlines that it has, so that `path` is old or new, whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`, and rename it to `final` at success.

    On any exception the temporary folder is removed. If another process made `final` in the
    meantime, that one is kept and this one dropped, so the caller reads `final` in either case.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(final)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Run a block that makes a folder, in one process at a time.

    Whoever else wants it waits, and should then find it: look for it inside the block.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process, which is making %s", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
