"""The stages of `bench.gpu_memory`, on a tiny geometry and the CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import memory_stages
from bench.memory_stages import GEOMETRIES, STAGES, Job
from bench.memory_watch import own_mib, watched
from libortho import load
from libortho.budget import stream_bytes
from libortho.switch import ortho_layers


def test_the_stages_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(memory_stages.RECIPE, calibration_tokens=256, calibration_window=64)
    monkeypatch.setattr(memory_stages, "RECIPE", recipe)
    for name, value in (("CONTEXT", 24), ("NEW_TOKENS", 3), ("TUNING_STEPS", 1), ("RECORDS", 2)):
        monkeypatch.setattr(memory_stages, name, value)
    job, entry = Job("tiny", tmp_path, "cpu", "gtx4050"), GEOMETRIES["tiny"]
    found = {name: stage(job) for name, stage in STAGES.items()}
    json.dumps(found)

    assert found["write"]["parameters"] == entry.parameters
    assert 4.3 < found["separate"]["bits_per_linear_weight"] < 4.6
    run = found["run"]
    assert run["alpha_changes_logits"]
    assert run["loss_is_finite"]
    assert run["peak_reserved_mib"] is None
    assert run["predicted_over_measured"] is None  # a CPU reserves nothing
    tune = found["tune"]["probe"]
    assert tune["steps"] == 1
    # Entries of a row are whole numbers: of 256 columns 0.5 % is one.
    assert tune["entries"] == pytest.approx(stream_bytes(entry, memory_stages.DENSITY) / 4, rel=0.3)
    model, _ = load(job.separated)
    assert all(la.private_columns.shape[0] for la in ortho_layers(model).values())


def test_what_a_block_holds_for_a_moment_is_seen() -> None:
    if own_mib() is None:
        pytest.skip("this system doesn't say what a process holds of its own")
    with watched("cpu") as found:
        held = bytearray(96 << 20)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.1)
        del held
    assert found["seconds"] >= 0.1
    assert found["peak_own_host_mib"] >= found["before_own_host_mib"] + 80
    assert found["peak_reserved_mib"] is None
