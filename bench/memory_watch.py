"""What a process holds while something runs: host memory, the card's memory, and time.

Knows /proc and torch's counters. Host memory is what the process has of its own, anonymous and
shared; pages of mapped files are the page cache's, and counted by nobody here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from libortho import hardware

PERIOD_S = 0.02
"""Seconds between two looks at the host's memory."""
_STATUS = Path("/proc/self/status")
_OWN = ("RssAnon:", "RssShmem:")


def own_mib() -> float | None:
    """MiB of host memory that are this process's own now; None where the system doesn't say."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith(_OWN)]
    return sum(kib) / 1024 if kib else None


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Fill a dictionary with the seconds, and the peaks in MiB, of what runs inside the block.

    `peak_own_host_mib` includes what the process held before; `before_own_host_mib` says how much.
    """
    found: dict[str, Any] = {"before_own_host_mib": own_mib()}
    most = [own_mib() or 0.0]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(PERIOD_S):
            most[0] = max(most[0], own_mib() or 0.0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    hardware.reset_peak(device)
    began = time.perf_counter()
    try:
        yield found
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        found["seconds"] = round(time.perf_counter() - began, 3)
        stop.set()
        thread.join()
        found["peak_own_host_mib"] = most[0] or None
        found["peak_reserved_mib"] = hardware.peak_mib(device)
        if torch.device(device).type == "cuda":
            found["peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / hardware.MIB


def environment(device: str) -> dict[str, Any]:
    """Device, versions, date and command."""
    facts = hardware.cpu_facts()
    return {
        "device": hardware.device_name(device),
        "cpu": facts.model,
        "cores": facts.logical_cores,
        "host_gib": round(facts.total_gib, 1),
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "command": "python -m bench.gpu_memory",
    }
