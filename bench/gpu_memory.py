"""Whether whole models fit: `python -m bench.gpu_memory --out memory.json`.

Writes a checkpoint of a model's exact geometry with random weights, separates it from its shards,
puts a private stream beside it, loads it, runs it, and tunes it, under the profile's cap on the
card's memory. Weights are random, so speed and memory are reported and nothing else. Each stage is
a process of its own, so that none inherits another's memory; the file is written after each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.memory_stages import STAGES, Job
from bench.memory_watch import environment
from libortho.files import atomic_write_text

MODELS = {"8B": "llama-3-8b", "3B": "llama-3.2-3b"}
PLAN = (
    ("8B", ("write", "separate", "run")),
    ("3B", ("write", "separate", "run", "tune")),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file is written")
    parser.add_argument("--seconds", type=float, default=290.0, help="time that may be taken")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "tiny"], default=list(MODELS))
    parser.add_argument("--folder", type=Path, help="where checkpoints are written [temporary]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", default="gtx4050")
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone, for its file")
    options = parser.parse_args()
    if options.stage:
        _stage(options)
    else:
        _all(options)


def _stage(options: argparse.Namespace) -> None:
    """One stage, in this process."""
    job = Job(options.models[0], options.folder, options.device, options.profile)
    try:
        found = STAGES[options.stage](job)
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    atomic_write_text(options.out, json.dumps(found, indent=1, default=str) + "\n")


def _all(options: argparse.Namespace) -> None:
    began = time.monotonic()
    temporary = Path(tempfile.mkdtemp(dir=options.folder))
    found: dict[str, Any] = {"environment": environment(options.device), "weights": "random"}
    stages = dict(PLAN) | {"tiny": ("write", "separate", "run", "tune")}
    try:
        for model in options.models:
            found[model] = {}
            for stage in stages[model]:
                left = options.seconds - (time.monotonic() - began)
                found[model][stage] = _in_a_process(options, model, stage, temporary, left)
                atomic_write_text(options.out, json.dumps(found, indent=1) + "\n")
                print(f"{model}, {stage}: {json.dumps(found[model][stage])[:600]}", flush=True)  # noqa: T201
            shutil.rmtree(temporary / model, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _in_a_process(
    options: argparse.Namespace, model: str, stage: str, folder: Path, left: float
) -> dict[str, Any]:
    if left < 5:
        return {"skipped": "no time was left"}
    out = folder / "stage.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu_memory", "--stage", stage, "--models", model]
    command += ["--folder", str(folder / model), "--out", str(out)]
    command += ["--device", options.device, "--profile", options.profile]
    began = time.monotonic()
    try:
        done = subprocess.run(command, timeout=left, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"stopped after {left:.0f} s: no time was left"}
    result: dict[str, Any] = {"failed": f"exit code {done.returncode}: {done.stderr[-2000:]}"}
    if out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    return result | {"process_seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
