"""Audits of several runs in one file, and the READMEs' table of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import audits
from bench.audits import merged
from bench.readme import AUDITS
from bench.readme_audits import audit_rows, seed_facts
from bench.readme_texts import CATALOGUES
from libortho.errors import ConfigError
from libortho.results import Results, read_results, to_json

FOLDER = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture(scope="module")
def measured() -> Results:
    return read_results(FOLDER / AUDITS)


def of(run: Results, *numbers: int, **provenance: Any) -> Results:
    """A run of some of the audits alone."""
    chosen = tuple(run.audits[i] for i in numbers)
    return replace(run, audits=chosen, provenance=replace(run.provenance, **provenance))


def test_audits_of_all_runs_are_kept_with_their_commands(measured: Results, tmp_path: Path) -> None:
    parts = [of(measured, 0, command=("pytest", "a")), of(measured, 2, 1, command=("pytest", "b"))]
    files = []
    for number, part in enumerate(parts):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(to_json(part), encoding="utf-8")
    audits.main(["--out", str(tmp_path / "all.json"), *map(str, files)])
    found = read_results(tmp_path / "all.json")
    assert found.audits == (measured.audits[0], measured.audits[2], measured.audits[1])
    assert found.provenance.command == ("pytest", "a", ";", "pytest", "b")


def test_what_does_not_belong_together_is_refused(measured: Results) -> None:
    one, other = of(measured, 0), of(measured, 1)
    with pytest.raises(ConfigError, match=r"differ in torch: .* and 9\.9"):
        merged([one, of(measured, 1, torch="9.9")])
    with pytest.raises(ConfigError, match=f"{one.audits[0].method} was audited twice"):
        merged([one, other, one])
    with pytest.raises(ConfigError, match="are two tables"):
        merged([one, replace(other, audits=(replace(other.audits[0], model="else"),))])
    with pytest.raises(ConfigError, match="holds an audit"):
        merged([of(measured)])


def test_a_row_says_what_its_audit_found(measured: Results) -> None:
    words = CATALOGUES["README.md"]
    rows = {(row[0], row[1]): row for row in audit_rows(measured, words)}
    assert len(rows) == len(measured.audits)
    for audit in measured.audits:
        row = rows[f"`{audit.method}`", str(audit.seed)]
        assert row[-1] == f"*{audit.verdict}*"
        assert row[3].startswith(f"{audit.extraction_on:.1%} [")
        leaking = sum(f.p_adjusted <= 0.05 for f in audit.findings if f.question != "control")
        assert row[7] == f"{leaking} of {audit.tests}"
        assert (row[8] == "not run") == (not audit.attacks)
        assert (leaking > 0) == (audit.verdict == "leaks")
    without = replace(measured, audits=(replace(measured.audits[0], attacks=()),))
    assert audit_rows(without, words)[0][8] == "not run"


def test_the_spread_over_seeds_is_of_all_of_them(measured: Results) -> None:
    ours = [audit for audit in measured.audits if audit.method == "ortho"]
    facts = seed_facts(measured)
    assert facts["method"] == "`ortho`"
    assert facts["seeds"] == len(ours) == 5
    rates = sorted(audit.extraction_on for audit in ours)
    assert facts["on"] == f"{rates[0]:.1%}–{rates[-1]:.1%}"
    lowest = min(audit.privacy_ratio_lower95 for audit in ours)
    assert facts["ratio"].startswith(f"{lowest:.1f}–")
    assert lowest >= 35
    assert (facts["off"], facts["seen"]) == ("0.0%", "0")  # the same for all of them
    (one,) = (audit for audit in ours if audit.seed == 0)
    assert seed_facts(replace(measured, audits=(one,)))["on"] == f"{one.extraction_on:.1%}"
