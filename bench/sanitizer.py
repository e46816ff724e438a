"""The kernels' checks once more under NVIDIA's compute-sanitizer, where there is one.

Knows where the tool may lie and how its outcome reads. It isn't part of PyTorch or Triton: a
machine that has no CUDA toolkit has none, and then the section says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.gpu_run import Run, Section

NAME = "compute-sanitizer"
TOOL = "memcheck"
CASES = 8
"""Random cases that are checked under it: it slows a kernel down ten to a hundred times."""
SECONDS = 60.0
"""Time that it may take."""
ERRORS = 9
"""Its exit status if it found an error."""
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def find() -> tuple[Path | None, list[str]]:
    """The tool, or None; and where it was looked for."""
    site = Path(sysconfig.get_paths()["purelib"])
    looked = [
        f"PATH ({NAME})",
        *("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/cuda*/bin"),
        *(str(site / pattern) for pattern in ("nvidia/**", "triton/backends/nvidia/bin")),
    ]
    on_path = shutil.which(NAME)
    if on_path is not None:
        return Path(on_path), looked
    for folder in looked[1:]:
        root = Path(folder).anchor
        for path in sorted(Path(root).glob(f"{folder.removeprefix(root)}/{NAME}")):
            if path.is_file() and os.access(path, os.X_OK):
                return path, looked
    return None, looked


def sanitized(*sections: str) -> Section:
    """Some sections of `bench.gpu_kernels` run in a process of its own, under the tool."""

    def measure(run: Run, found: dict[str, Any]) -> None:
        tool, looked = find()
        found.update(tool=TOOL, sections=sections, errors=None, version=None)
        if tool is None:
            found["reason"] = f"no {NAME} in {', '.join(looked)}"
            run.lines.append(f"{NAME}: not run, there is none on this machine")
            return
        out = run.out.with_suffix(".sanitized.json")
        seconds = min(SECONDS, run.left_s - 5)
        module = [sys.executable, "-m", "bench.gpu_kernels", "--out", str(out), "--only", *sections]
        limits = ["--seconds", str(seconds), "--cases", str(CASES), "--processes", "4"]
        command = [str(tool), "--tool", TOOL, "--error-exitcode", str(ERRORS), *module, *limits]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds + 10
            )
        except subprocess.TimeoutExpired:
            found["reason"] = f"it took more than {seconds + 10:.0f} s"
            run.lines.append(f"{NAME}: {found['reason']}")
            return
        found.update(outcome(done.returncode, done.stdout + done.stderr))
        run.lines.append(f"{NAME} --tool {TOOL}, {', '.join(sections)}: {found['errors']} errors")

    return measure


def outcome(status: int, text: str) -> dict[str, Any]:
    """What the tool says of a run: its errors, or why their number is not known."""
    summary = _SUMMARY.search(text)
    # No error is claimed only if the program itself came to its end.
    errors = int(summary[1]) if summary and status in (0, ERRORS) else None
    found: dict[str, Any] = {"exit_status": status, "errors": errors, "tail": text[-1500:]}
    if errors is None:
        found["reason"] = f"it ended with status {status} and no summary"
    return found
