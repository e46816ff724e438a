"""Fetching from wheels: real pip on a wheel made here, without an index, and what can go wrong."""

import errno
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from libortho import fetch
from libortho.errors import FetchError
from libortho.fetch import WheelFile, cache_folder, fetch_from_wheel
from libortho.files import atomic_folder, atomic_write_text

CONTENT = b"the file that is wanted\n" * 1000
MEMBER = "carrier/data/wanted.bin"


def wheel_file(sha256: str | None = None, member: str = MEMBER) -> WheelFile:
    return WheelFile(
        distribution="carrier",
        version="1.0",
        member=member,
        sha256=sha256 or hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        wheel_bytes=len(CONTENT),
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel, the only thing that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(
            "carrier-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: not-on-any-index\n",
        )
        archive.writestr(
            "carrier-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    # The machine's own pip settings must not reach into the test.
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def no_pip(monkeypatch):
    """Fail if anything is run, as if there were no network."""

    def refuse(*args, **kwargs):
        pytest.fail("a cached file must not need pip")

    return lambda: monkeypatch.setattr(subprocess, "run", refuse)


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_fetched_once_then_read_from_cache(index, tmp_path, no_pip):
    cache = tmp_path / "cache"
    path = fetch_from_wheel(wheel_file(), cache)
    assert path.read_bytes() == CONTENT
    assert files_below(cache) == ["files/carrier-1.0/wanted.bin"], "the wheel must not stay"
    no_pip()
    assert fetch_from_wheel(wheel_file(), cache) == path


def test_changed_cached_file_is_fetched_again(index, tmp_path):
    path = fetch_from_wheel(wheel_file(), tmp_path / "cache")
    changed = b"x" + CONTENT[1:]
    path.write_bytes(changed)  # same size, other bytes
    fetch_from_wheel(wheel_file(), tmp_path / "cache")
    assert path.read_bytes() == CONTENT


def test_wrong_hash_is_refused_and_leaves_nothing(index, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(FetchError, match=r"not the file that was pinned.*pip config list"):
        fetch_from_wheel(wheel_file(sha256="0" * 64), cache)
    assert files_below(cache) == []


def test_wheel_without_the_member_is_refused(index, tmp_path):
    with pytest.raises(FetchError, match=r"no readable carrier/other\.bin"):
        fetch_from_wheel(wheel_file(member="carrier/other.bin"), tmp_path / "cache")


def test_without_network_the_error_says_how_to_bring_the_wheel(index, tmp_path):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(FetchError, match=r"pip said: .*carrier==1\.0.*PIP_FIND_LINKS"):
        fetch_from_wheel(wheel_file(), tmp_path / "cache")
    assert files_below(tmp_path / "cache") == []


def test_interpreter_without_pip_gets_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="ensurepip"):
        fetch_from_wheel(wheel_file(), tmp_path)


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), FetchError),
        (OSError(errno.EACCES, "Permission denied"), FetchError),
    ],
    ids=["interrupt", "disk-full", "no-permission"],
)
def test_a_fault_while_writing_leaves_no_file(index, tmp_path, monkeypatch, fault, raised):
    cache = tmp_path / "cache"

    def half(source, target, length=0):
        target.write(source.read(100))
        raise fault

    monkeypatch.setattr(fetch.shutil, "copyfileobj", half)
    with pytest.raises(raised) as caught:
        fetch_from_wheel(wheel_file(), cache)
    if getattr(fault, "errno", None) == errno.ENOSPC:
        assert f"{2 * len(CONTENT):,} bytes are needed" in str(caught.value)
    assert files_below(cache) == []


def test_a_full_disk_is_seen_before_anything_is_downloaded(tmp_path, monkeypatch, no_pip):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    no_pip()
    with pytest.raises(FetchError, match="10 are free"):
        fetch_from_wheel(wheel_file(), tmp_path)


def test_cache_folder_argument_wins_over_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBORTHO_CACHE", str(tmp_path / "from-environment"))
    assert cache_folder() == tmp_path / "from-environment"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_cache_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="--cache-dir"):
        cache_folder(tmp_path / "file")


def test_atomic_write_keeps_the_old_text_on_failure(tmp_path):
    path = tmp_path / "result.json"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "new \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old"
    assert files_below(tmp_path) == ["result.json"]


def test_atomic_folder_disappears_on_failure(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("...")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_keeps_the_one_that_came_first(tmp_path):
    final = tmp_path / "model"
    with atomic_folder(final) as folder:
        (folder / "weights").write_text("second")
        final.mkdir()
        (final / "weights").write_text("first")
    assert (final / "weights").read_text() == "first"
    assert files_below(tmp_path) == ["model/weights"]
