"""Where a result came from: versions, machine, command, commit.

It knows package metadata and git, not models or measurements. What it writes is meant to be
published, so the paths of a user's files and folders are left out of the command.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_HIDDEN = {
    "--records": "<record file>",
    "--results-dir": "<folder>",
    "--cache-dir": "<folder>",
    "--checkpoint": "<folder>",
    "--corpus": "<corpus>",  # its name and hash stand elsewhere in the result
}
"""Options whose values are paths however they are written, and what is shown in their place."""

_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
"""How a path of someone's disk begins; a hub's id or a file of the repository doesn't."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Conditions of a run. A version is null if the package is not installed."""

    timestamp_utc: str  # when the run ended, ISO 8601
    command: tuple[str, ...]  # arguments, without paths
    libortho: str | None
    python: str
    torch: str | None
    transformers: str | None
    bitsandbytes: str | None
    platform: str  # operating system and architecture
    cpu_model: str
    cpu_cores: int  # logical cores that the process may use
    device_name: str  # "cpu", or the card's name
    compute_dtype: str  # of activations, such as "bfloat16"
    git_commit: str | None  # null if the package doesn't run from a checkout
    git_dirty: bool | None  # whether tracked files differed from that commit


def collect_provenance(
    *,
    command: Sequence[str],
    cpu_model: str,
    cpu_cores: int,
    device_name: str,
    compute_dtype: str,
    now: datetime | None = None,
) -> Provenance:
    """Fill in what this process and its packages say of themselves.

    Args:
        command: arguments of the run, as in `sys.argv`.
        cpu_model: name of the processor.
        cpu_cores: logical cores that the process may use.
        device_name: "cpu", or the card's name.
        compute_dtype: dtype of activations.
        now: time of the run with a time zone; the present if None.
    """
    commit, dirty = _git_state()
    return Provenance(
        timestamp_utc=(now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        command=public_command(command),
        libortho=_version("libortho"),
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        bitsandbytes=_version("bitsandbytes"),
        platform=f"{platform.system()} {platform.machine()}",
        cpu_model=cpu_model,
        cpu_cores=cpu_cores,
        device_name=device_name,
        compute_dtype=compute_dtype,
        git_commit=commit,
        git_dirty=dirty,
    )


def public_command(command: Sequence[str]) -> tuple[str, ...]:
    """The arguments, with a word in the place of every path that tells about someone's disk."""
    shown = []
    hidden: str | None = None
    for argument in command:
        option, equals, value = argument.partition("=")
        if hidden is not None:
            shown.append(hidden)
        elif equals and option in _HIDDEN:
            shown.append(f"{option}={_HIDDEN[option]}")
        elif equals and _PATH.match(value):
            shown.append(f"{option}=<path>")
        else:
            shown.append("<path>" if _PATH.match(argument) else argument)
        hidden = _HIDDEN.get(argument) if hidden is None else None
    return tuple(shown)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds this very file, if one does."""
    here = Path(__file__)
    # Installed into an environment inside some other project's checkout, this file is untracked.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()
