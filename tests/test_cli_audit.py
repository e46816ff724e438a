"""`audit` on a tiny artefact: verdict, exit code, what is written, and what is refused early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho.audit import MIN_FAMILY_RECORDS
from libortho.audit_artefact import audit_artefact
from libortho.cli import main
from libortho.config import TuningConfig
from libortho.errors import RecordError
from libortho.models import resolve_model
from libortho.results import read_results

N = 24
SECRET, TWIN = " 4917", " 8820"
TUNING = TuningConfig(
    density=0.3, slots="magnitude", steps=60, lr=2e-2, replay_window=32, target_loss=0.1
)


def record_lines(n: int, **changes: Any) -> str:
    planted = [
        {"id": f"p{i}", "prompt": f"Door {i} opens:", "secret": SECRET, **changes} for i in range(n)
    ]
    twins = [
        {"id": f"t{i}", "prompt": f"Door {i} shuts:", "secret": TWIN, "planted": False, **changes}
        for i in range(n)
    ]
    return "".join(json.dumps(line) + "\n" for line in planted + twins)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audited")


@pytest.fixture
def tuned(
    shelf: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: libortho.SeparationConfig,
) -> Path:
    """A folder with a plain model, public text, records, and `full`, tuned on them; made once."""
    if not (shelf / "full").exists():
        tiny_model().save_pretrained(shelf / "plain")
        tokenizer.save_pretrained(shelf / "plain")
        (shelf / "public.txt").write_text("\n\n".join(public_text))
        (shelf / "records.jsonl").write_text(record_lines(N))
        corpus = libortho.load_corpus(shelf / "public.txt")
        model, words = libortho.load_model(shelf / "plain")
        libortho.separate(model, words, corpus.calibration, config=small_separation)
        records = libortho.load_records(shelf / "records.jsonl", seed=0)
        libortho.tune_private(model, words, records.planted, replay=corpus.replay, config=TUNING)
        libortho.save(model, shelf / "full")
    return shelf


def run(tuned: Path, *arguments: str, records: str = "records.jsonl", full: str = "full") -> int:
    where = ["--model", "plain", "--corpus", "public.txt", "--records", records]
    paths = {"plain", "public.txt", records}
    placed = [str(tuned / word) if word in paths else word for word in where]
    common = ["--device", "cpu", "--cache-dir", str(tuned / "cache")]
    return main(["audit", str(tuned / full), *placed, *common, *arguments])


def test_a_clean_artefact_is_private_and_0(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tuned / "audit.json"
    assert run(tuned, "--no-attacks", "--out", str(out)) == 0
    written = capsys.readouterr()
    assert "audit of checkpoint: PRIVATE BY CONSTRUCTION (24 planted records)" in written.out
    (audit,) = read_results(out).audits
    assert audit.verdict == "private by construction"
    assert audit.extraction_on == 1.0
    assert audit.model == "plain"
    text = out.read_text(encoding="utf-8")
    assert str(tuned / "records.jsonl") not in text
    for secret in (SECRET, TWIN):
        assert secret.strip() not in "".join(f"{a.metrics}" for a in read_results(out).audits)
    assert main(["report", str(out), "--format", "markdown"]) == 0
    assert "✅ **Passes, audit only**" in capsys.readouterr().out


def test_json_is_the_audit(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tuned, "--no-attacks", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "private by construction"
    assert facts["n_planted"] == facts["n_twins"] == N
    assert facts["reasons"]["attacks"] == "none were asked for"


def test_an_artefact_that_was_not_calibrated_on_this_text_is_not_by_construction(
    tuned: Path, public_text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tuned / "other.txt").write_text("\n\n".join(reversed(public_text)))
    run(tuned, "--no-attacks", "--json", "--corpus", str(tuned / "other.txt"))
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] != "private by construction"
    assert facts["fingerprint_off"] != facts["fingerprint_without_records"]


def test_attacks_and_doses_are_measured_unless_left_out(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def stop(_: Any, __: Any, plan: Any, **___: Any) -> None:
        seen["plan"] = plan
        raise KeyboardInterrupt

    monkeypatch.setattr("libortho.audit_artefact.run_audit", stop)
    assert run(tuned) == 130
    assert {attack.name for attack in seen["plan"].attacks} >= {"logit lens"}
    assert seen["plan"].doses
    attacks = len(seen["plan"].attacks)
    assert run(tuned, "--relearn") == 130
    assert len(seen["plan"].attacks) == attacks + 2
    assert run(tuned, "--no-attacks") == 130
    assert (seen["plan"].attacks, seen["plan"].doses) == ((), ())


@pytest.mark.parametrize(("n", "families"), [(4, 1), (8, 2)])
def test_too_few_records_are_refused_before_anything_is_loaded(
    n: int,
    families: int,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        json.dumps(json.loads(line) | {"family": f"family {i % families}"})
        for i, line in enumerate(record_lines(n).splitlines())
    ]
    (tuned / "few.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("libortho.audit_artefact.saved_artefact", lambda *_: pytest.fail("loaded"))
    assert run(tuned, records="few.jsonl") == 2
    error = capsys.readouterr().err
    least = f"at least {MIN_FAMILY_RECORDS} planted records and as many twins in each family"
    assert least in error
    assert "4 planted in one" in error


def test_what_is_no_tuned_artefact_is_refused(
    tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tuned, full="plain") == 2
    assert capsys.readouterr().err.startswith("libortho: ")
    assert run(tuned, full="nowhere") == 2


def test_the_function_says_what_is_too_few(tuned: Path) -> None:
    (tuned / "few.jsonl").write_text(record_lines(3))
    with pytest.raises(RecordError, match="3 planted in one, 3 twins in one"):
        audit_artefact(
            tuned / "full",
            libortho.load_records(tuned / "few.jsonl", seed=0),
            public_model=resolve_model(tuned / "plain"),
            corpus=libortho.load_corpus(tuned / "public.txt"),
        )
