"""Check and time the kernels on a GPU: `python -m bench.gpu_kernels --out kernels.json`.

Checks them against float64, then times decode at the layer shapes of Llama 3 8B and Llama 3.2 3B
over candidate configs, with PyTorch's INT4 product and dense products on the same card beside them,
going round more operands than the L2 cache holds. Stops in time: sections come in order of
importance, and the file is written after each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu_checks import (
    CASES,
    CASES_SEED,
    check_between,
    check_layer,
    check_overlap,
    check_random,
    check_switching,
)
from bench.gpu_run import Run, Section
from bench.gpu_single_token import single_token
from bench.gpu_timings import (
    DENSITY,
    SEVERAL,
    SHAPES,
    bandwidth,
    eager,
    format_cases,
    formats,
    prompt_cases,
    prompts,
    several_candidates,
    several_tokens,
)
from bench.kernel_cases import Case, random_cases
from bench.kernel_compiler import Compiler
from bench.sanitizer import sanitized
from libortho.kernels import autotune
from libortho.kernels.configs import DecodeConfig


def measured_lines(run: Run) -> list[str]:
    """The winners, as lines for `libortho.kernels.configs.MEASURED`."""
    lines = []
    for section in ("8B, 1 token", "3B, 1 token", "fused, 1 token", "several tokens"):
        for entry in run.found.get(section, {}).values():
            if isinstance(entry, dict) and "shape" in entry and entry["with_streams"][0]["us"]:
                best = entry.get("best", {})
                # What decoding launches is captured, and overlaps where the card can do it.
                best = best.get("streams, overlapped", best.get("streams"))
                best = best or entry["with_streams"][0]["config"]
                config = DecodeConfig(**best)
                key = (*entry["shape"], entry.get("tokens", 1))
                lines.append(f"{key}: {config},")
    return lines


def _check_cases() -> list[Case]:
    cases = random_cases(CASES, CASES_SEED)
    return [c for case in cases for c in (case, replace(case, config=None))]


def _single_cases(family: str) -> list[Case]:
    shapes = [Case(*shape) for shape in SHAPES[family].values()]
    streams = [replace(case, paired=True).with_streams(DENSITY) for case in shapes]
    both = [c for pair in zip(streams, shapes, strict=True) for c in pair]
    return [replace(c, config=k) for c in both for k in autotune.candidates(c.shape, 1)]


def _several_cases() -> list[Case]:
    cases = [
        Case(*shape, n, paired=True).with_streams(DENSITY)
        for n in SEVERAL
        for shape in SHAPES["8B"].values()
    ]
    return [replace(c, config=k) for c in cases for k in several_candidates(c)]


SECTIONS: dict[str, tuple[Section, Callable[[], list[Case]]]] = {
    "random cases": (check_random, _check_cases),
    "between products": (check_between, list),
    "overlap": (check_overlap, list),
    "switching": (check_switching, list),
    "8B, 1 token": (single_token("8B"), lambda: _single_cases("8B")),
    "fused, 1 token": (single_token("fused"), lambda: _single_cases("fused")),
    "layer": (check_layer, list),
    "sanitizer": (sanitized("random cases", "between products"), list),
    "prompts": (prompts, lambda: list(prompt_cases().values())),
    "eager": (eager, list),
    "3B, 1 token": (single_token("3B"), lambda: _single_cases("3B")),
    "several tokens": (several_tokens, _several_cases),
    "formats": (formats, format_cases),
}
"""What is done and what has to be built for it, in the order of importance."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file is written")
    parser.add_argument("--seconds", type=float, default=230.0, help="time that may be taken")
    parser.add_argument("--cases", type=int, default=CASES, help="random cases to check")
    parser.add_argument("--only", choices=tuple(SECTIONS), nargs="+", help="some sections only")
    parser.add_argument(
        "--processes",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that build kernels",
    )
    options = parser.parse_args()
    # Nothing that was tuned before may enter, and the platform's folder need not exist.
    os.environ["LIBORTHO_CACHE"] = tempfile.mkdtemp()
    chosen = {name: SECTIONS[name] for name in options.only or SECTIONS}
    major, minor = torch.cuda.get_device_capability(0)
    compiler = Compiler(options.processes, 10 * major + minor)
    for _, cases in chosen.values():
        compiler.submit(cases())
    run = Run("bench.gpu_kernels", options.out, options.seconds, compiler)
    run.cases = options.cases
    try:
        run.section("bandwidth", bandwidth)
        for name, (measure, _) in chosen.items():
            run.section(name, measure)
        run.found["measured"] = measured_lines(run)
        run.write()
    finally:
        compiler.close()
    print("\n".join([*run.found.get("measured", ()), *run.lines]))  # noqa: T201


if __name__ == "__main__":
    main()
