"""`audit` on a tiny artefact: verdict, exit code, what is written, and what is refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuned_artefacts import SECRET, TWIN, N, record_lines

import libortho
from libortho.audit import MIN_FAMILY_RECORDS
from libortho.audit_artefact import audit_artefact
from libortho.cli import main
from libortho.errors import RecordError
from libortho.models import resolve_model
from libortho.results import read_results


@pytest.fixture
def tuned(shelf: Path) -> Path:
    """The folder of models, records and artefacts."""
    return shelf


def run(tuned: Path, *arguments: str, records: str = "records.jsonl", full: str = "full") -> int:
    where = ["--model", "plain", "--corpus", "public.txt", "--records", records]
    paths = {"plain", "public.txt", records}
    placed = [str(tuned / word) if word in paths else word for word in where]
    common = ["--device", "cpu", "--cache-dir", str(tuned / "cache")]
    return main(["audit", str(tuned / full), *placed, *common, *arguments])


def test_a_clean_artefact_is_private_and_0(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit.json"
    assert run(tuned, "--no-attacks", "--out", str(out)) == 0
    written = capsys.readouterr()
    assert "audit of checkpoint: PRIVATE BY CONSTRUCTION (30 planted records)" in written.out
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


def test_limits_decide_about_the_exit_code(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tuned, "--no-attacks", "--min-privacy-ratio", "8") == 0
    assert run(tuned, "--no-attacks", "--min-privacy-ratio", "20") == 1
    assert "at least 20 is asked for" in capsys.readouterr().err
    assert run(tuned, "--no-attacks", full="leaky") == 1
    assert "it is judged 'leaks'" in capsys.readouterr().err


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
