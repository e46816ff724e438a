"""What the scripts for a card can be rehearsed of without one."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds; not with this")

from bench import sanitizer
from bench.decode_models import GEOMETRIES, bytes_per_token, random_model, why_not
from bench.decode_timings import AWAY, Conditions, decode, switching
from bench.gpu_run import Run
from bench.readme import FOLDER, KERNELS
from bench.readme_kernels import decode_facts, decode_rows, kernel_facts, kernel_rows
from bench.readme_texts import ENGLISH
from libortho.fusion import fuse_projections

CPU = torch.device("cpu")
CONDITIONS = Conditions(CPU, torch.bfloat16, context=12, new=4, repeats=1)


class NoCompiler:
    def counts(self) -> dict[str, int]:
        return {}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("bench.gpu_decode", tmp_path / "out.json", 60.0, NoCompiler())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ortho", "int4pack", "dense", "nf4"])
def test_every_kind_of_model_decodes(kind: str, run: Run) -> None:
    run.found["bandwidth"] = {"copy_gb_per_s": 100.0}
    found: dict[str, Any] = {}
    decode(CONDITIONS, "tiny", run, found, kind=kind)
    assert found["tokens_per_s"] == pytest.approx(1e3 / found["token_ms"])
    assert found["share_of_copy"] == pytest.approx(found["gb_per_s"] / 100)
    ratio = found["projected_tokens_per_s_at_192_gb_per_s"] / found["tokens_per_s"]
    assert ratio == pytest.approx(1.92)
    if kind == "ortho":
        assert found["bytes_per_token, alpha 0"] < found["bytes_per_token"]


def test_a_step_reads_the_weights_once() -> None:
    model = random_model("tiny", "ortho", dtype=torch.bfloat16, device=CPU)
    sizes = GEOMETRIES["tiny"]
    width, inner, layers = 256, 512, 2
    head, norms = 512 * width * 2, (2 * layers + 1) * width * 2
    dense = bytes_per_token(random_model("tiny", "dense", dtype=torch.bfloat16, device=CPU), 0)
    linear = layers * (2 * width * width + 2 * 128 * width + 3 * width * inner)
    rotary = 2 * 32 * 4
    assert dense == linear * 2 + head + norms + rotary
    read = bytes_per_token(model, 0)
    cache = bytes_per_token(model, 10) - read
    assert cache == 10 * 2 * layers * sizes["num_key_value_heads"] * 64 * 2
    fuse_projections(model)
    assert bytes_per_token(model, 0) == read
    # INT4 with float16 scale and zero a group of 128: 4.25 bits; and a few entries a row.
    assert linear * 4.25 / 8 < read - head - norms < linear * 4.25 / 8 * 1.15


def test_switching_is_seen(run: Run) -> None:
    found: dict[str, Any] = {}
    switching(CONDITIONS, "tiny", run, found)
    assert found["switched_back_is_the_same"]
    far = found["changes"][f"alpha {AWAY:g}"]
    assert far["next_logits_change"] > 0.1
    assert far["logits_before_beside_plain"] < 0.05
    assert far["next_logits_beside_plain"] is None or far["next_logits_beside_plain"] < 0.05


def test_what_is_missing_has_a_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.decode_models.find_spec", lambda name: None)
    assert why_not("gemlite") == "gemlite is not installed"
    found: dict[str, Any] = {}
    decode(CONDITIONS, "tiny", run, found, kind="ortho", head_bits=8)
    assert found["tokens_per_s"] is None
    assert "no 8-bit embedding" in found["reason"]


def test_the_sanitizer_is_found_and_its_errors_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: (None, ["PATH"]))
    found: dict[str, Any] = {}
    sanitizer.sanitized("random cases")(run, found)
    assert found["errors"] is None
    assert "in PATH" in found["reason"]
    tool = tmp_path / "tool"
    monkeypatch.setattr(sanitizer, "find", lambda: (tool, []))
    for status, errors in ((0, 0), (9, 3), (1, None)):
        tool.write_text(f"#!/bin/sh\necho ERROR SUMMARY: {errors} errors; exit {status}\n")
        tool.chmod(0o755)
        began = time.monotonic()
        sanitizer.sanitized("random cases")(run, found)
        assert found["errors"] == errors
        assert time.monotonic() - began < 10


def test_the_tables_of_the_readme_are_filled_from_a_rehearsal(run: Run) -> None:
    for name, kind in (("8B ortho", "ortho"), ("8B nf4, eager", "nf4"), ("3B gemlite", "gemlite")):
        run.section(name, functools.partial(decode, CONDITIONS, "tiny", kind=kind))
    run.section("8B switching", functools.partial(switching, CONDITIONS, "tiny"))
    run.found |= {"conditions": CONDITIONS.described(), "bandwidth": {"copy_gb_per_s": 100.0}}
    run.write()
    found = json.loads(run.out.read_text(encoding="utf-8"))
    rows = decode_rows(found, ENGLISH)
    measured = 2 if why_not("nf4") else 3
    assert [row[0] for row in rows] == [
        *("8B **alpha = 1**", "8B **alpha = 0**", "8B bitsandbytes NF4 as it is")
    ][:measured]
    ours = found["8B ortho"]
    ends = [1e3 / ours["token_ms_spread"][i] for i in (1, 0)]
    assert rows[0][1] == f"{ours['tokens_per_s']:.0f} [{ends[0]:.0f}, {ends[1]:.0f}]"
    assert ends[0] <= ours["tokens_per_s"] <= ends[1]
    assert rows[0][2] == "–"  # the bandwidth came too late to be used
    assert ENGLISH["decoding"].format(**decode_facts(found))


def test_files_of_both_layouts_make_the_kernels_table() -> None:
    old = json.loads((FOLDER / KERNELS).read_text(encoding="utf-8"))
    case = old["8B, 1 token"]["q, o"]
    new = {"random cases": {"checked": 4, "failures": []}} | {
        key: old[key] for key in ("environment", "bandwidth", "3B, 1 token")
    }
    share = case.get("base_share_of_copy_bandwidth", case.get("base_share_of_copy"))
    new["8B, 1 token"] = {
        "q, o": {k: v for k, v in case.items() if "share" not in k} | {"base_share_of_copy": share},
        "down": {"with_streams": [], "reason": "no candidate could be timed"},
    }
    assert kernel_facts(new)["checked"] == 4
    assert kernel_rows(new)[0] == kernel_rows(old)[0]
    assert len(kernel_rows(new)) == 1 + len(old["3B, 1 token"])
