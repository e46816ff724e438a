"""`report` and `compare` on files: what is written, where, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_examples import kill_switch, provenance, run_results, throughput_case

from libortho.cli import main
from libortho.report import render
from libortho.results import Results, to_json


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """before.json, the same run as same.json, and others that differ."""
    fails = kill_switch(hits_alpha0=12, verdict="fails", verdict_reason="it leaks")
    runs = {
        "before": run_results(),
        "same": run_results(),
        "worse": run_results(exp1_kill_switch=fails),
        "slower": run_results(throughput=(throughput_case("alpha1", "decode", 13.0),)),
        "elsewhere": run_results(provenance=provenance(device_name="A card")),
    }
    for name, results in runs.items():
        (tmp_path / f"{name}.json").write_text(to_json(results), encoding="utf-8")
    return tmp_path


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


# --- report -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [("r.html", "html"), ("r", "html"), ("r.md", "markdown"), ("r.json", "benchmark-json")],
)
def test_the_format_follows_the_files_name(
    name: str, form: Any, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", files / "before.json", "--out", files / "new" / name) == 0
    written = (files / "new" / name).read_text(encoding="utf-8")
    assert written == render([("before.json", run_results())], form)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(files / "new" / name) in captured.err


def test_without_out_it_goes_to_standard_output(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", files / "before.json", files / "worse.json", "--format", "markdown") == 0
    text = capsys.readouterr().out
    assert "before.json" in text
    assert "❌ **Fails**" in text
    arguments = ("report", files / "before.json", "--format", "benchmark-json")
    assert run(*arguments, "--better", "smaller") == 0
    entries = json.loads(capsys.readouterr().out)
    assert "exp2_null_test.arms.alpha1.ppl" in {entry["name"] for entry in entries}


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 0}', "no JSON"])
def test_what_is_no_results_file_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.json").write_text(content)
    out = tmp_path / "report.html"
    assert run("report", tmp_path / "odd.json", "--out", out) == 2
    assert "is no results file that can be used" in capsys.readouterr().err
    assert not out.exists()
    assert run("report", tmp_path / "missing.json") == 2


def test_a_place_that_cannot_be_written_is_one_paragraph(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", files / "before.json", "--out", files / "before.json" / "r.html") == 2
    assert "could not be written" in capsys.readouterr().err


# --- compare ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "code"), [("same", 0), ("worse", 1), ("slower", 0), ("elsewhere", 2)]
)
def test_the_exit_code_is_the_answer(
    after: str, code: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compare", files / "before.json", files / f"{after}.json")
    assert run(*arguments) == code
    written = capsys.readouterr()
    assert (written.out == "") == (code == 2)
    assert run(*arguments, "--json") == code
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_code"] == code
    assert facts["comparable"] == (code != 2)
    assert facts["worse"] == (code == 1)
    assert bool(facts["figures"]) == (code != 2)


def test_better_is_no_reason_for_1(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", files / "worse.json", files / "before.json") == 0
    text = capsys.readouterr().out
    assert "better" in text
    assert text.splitlines()[-1].startswith("0 worse, ")


def test_what_changed_is_shown_with_its_rule(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", files / "before.json", files / "worse.json") == 1
    lines = capsys.readouterr().out.splitlines()
    (rate,) = [line for line in lines if "planted records extracted, alpha = 0" in line]
    for part in ("worse", "0 of 40", "12 of 40", "McNemar on the same records, p = 0.00049"):
        assert part in rate
    (verdict,) = [line for line in lines if "verdict, privacy" in line]
    assert verdict.split()[:5] == ["worse", "verdict,", "privacy", "passes", "fails"]
    assert not any("decode" in line for line in lines)
    run("compare", files / "before.json", files / "worse.json", "--all")
    assert "decode, alpha = 1" in capsys.readouterr().out


def test_a_factor_makes_it_stricter(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("compare", files / "before.json", files / "slower.json")
    assert run(*arguments, "--factor", "1.2") == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "decode, alpha = 1" in x]
    assert "a factor of 1.2 counts" in line
    assert "-28.6%" in line
    with pytest.raises(SystemExit):
        run(*arguments, "--factor", "1")


def test_other_cards_are_compared_only_anyway(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("compare", files / "before.json", files / "elsewhere.json")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "the device is cpu in one run and A card in the other" in error
    assert "--anyway" in error
    assert run(*arguments, "--anyway") == 0
    assert "NOT COMPARABLE: the device is cpu" in capsys.readouterr().out


def test_figures_of_the_json_are_those_of_the_files(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compare", files / "before.json", files / "worse.json", "--json")
    facts = json.loads(capsys.readouterr().out)
    (rate,) = [
        f for f in facts["figures"] if f["name"] == "exp1_kill_switch.extraction_rate_alpha0"
    ]
    assert rate["before"]["value"] == 0.0
    assert rate["after"]["counts"] == [12, 40]
    assert rate["outcome"] == "worse"
    assert rate["relative_change"] is None
    results: Results = run_results()
    assert results.exp2_null_test is not None
    (ratio,) = [f for f in facts["figures"] if f["name"] == "exp2_null_test.arms.alpha1.ratio"]
    assert ratio["before"]["low95"] == results.exp2_null_test.arms["alpha1"].ratio_low95
