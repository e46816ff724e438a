"""A run on a GPU: its conditions, its time limit, its file, and how a launch is timed.

Knows CUDA graphs and events; not what is measured.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.kernel_cases import Case, Operands, make_operands
from bench.kernel_compiler import Compiler
from libortho.files import atomic_write_text

CACHES = 3
"""Times the L2 cache that the operands of a timing take, so that it holds none of them."""
LAUNCHES = 48
"""Launches in a graph at least, so that starting the graph is a small part of its time."""
REPLAYS = 9
"""Timed replays of a graph, of which the median counts."""


class Run:
    """What was found so far, the lines to print at the end, and the time that is left."""

    def __init__(self, module: str, out: Path, seconds: float, compiler: Compiler) -> None:
        self.out, self.seconds, self.compiler = out, seconds, compiler
        self._began = time.monotonic()
        self.found: dict[str, Any] = {"environment": environment(module), "section_seconds": {}}
        self.lines: list[str] = []
        self.cases: int | None = None  # random cases to check, all if None

    @property
    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self._began)

    def section(self, name: str, measure: Section) -> None:
        """Let `measure` fill one section and write the file; what fails leaves the rest."""
        found = self.found[name] = {}
        if self.left_s < 5:
            found["skipped"] = "no time was left"
            return
        began = time.monotonic()
        try:
            measure(self, found)
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            self.lines.append(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}")
        self.found["section_seconds"][name] = round(time.monotonic() - began, 1)
        self.write()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def write(self) -> None:
        self.found["compiled"] = self.compiler.counts()
        atomic_write_text(self.out, json.dumps(self.found, indent=1, default=str) + "\n")


Section = Callable[[Run, dict[str, Any]], None]
"""Fills a dictionary of its own."""


def environment(module: str) -> dict[str, Any]:
    """Card, versions, date and command; without a card, what a rehearsal ran on."""
    found: dict[str, Any] = {
        "card": None,
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "command": " ".join(["python -m", module, *(Path(a).name for a in sys.argv[1:])]),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found


class Captured(NamedTuple):
    """A graph of launches; `results` are the tensors that a replay fills."""

    graph: torch.cuda.CUDAGraph
    launches: int
    results: list[Any]

    def replay_us(self) -> float:
        """Microseconds of a launch in one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / self.launches


def capture(calls: Sequence[Callable[[], Any]], launches: int = LAUNCHES) -> Captured:
    """A graph that goes round the calls until there are enough launches, replayed once."""
    calls[0]()
    torch.cuda.synchronize()
    rounds = max(1, round(launches / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for _ in range(rounds) for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, rounds * len(calls), results)


def median_us(
    calls: Sequence[Callable[[], Any]], *, launches: int = LAUNCHES, replays: int = REPLAYS
) -> float:
    captured = capture(calls, launches)
    return statistics.median(captured.replay_us() for _ in range(replays))


def sets_for(bytes_each: int) -> int:
    """How many sets of operands of a size don't fit in the L2 cache together, by far."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHES * l2 // bytes_each))


def operand_sets(case: Case) -> list[Operands]:
    return [make_operands(case, seed) for seed in range(sets_for(case.bytes_read))]
