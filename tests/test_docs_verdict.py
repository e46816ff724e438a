"""The page on how to read the verdict says what the code does: its figures, names and limits."""

from __future__ import annotations

import importlib
import json
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from libortho import contrast
from libortho.audit import AuditVerdictName
from libortho.audit_results import AuditResult
from libortho.results import KillSwitchResult, NullTestResult
from libortho.statistics import privacy_ratio, proportion_interval
from libortho.verdict import VerdictName, kill_switch_verdict

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")


def rows_after(mark: str) -> list[list[str]]:
    """The cells of the table below a mark, its header left out."""
    lines = PAGE.split(f"<!-- {mark} -->\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", rows_after("lower limits"), ids=lambda row: "-".join(row[:3]))
def test_what_so_many_records_prove(row: list[str]) -> None:
    n, on, off, ratio, lower = (float(cell) for cell in row)
    found = privacy_ratio(int(on), int(n), int(off), int(n))
    assert found.ratio == pytest.approx(ratio)
    assert f"{found.lower:.1f}" == row[4] == f"{lower:.1f}"


def test_28_records_are_what_a_gate_of_8_needs() -> None:
    assert privacy_ratio(28, 28, 0, 28).lower >= 8 > privacy_ratio(27, 27, 0, 27).lower
    assert "needs at least 28 records" in PAGE


@pytest.mark.parametrize("row", rows_after("thresholds"), ids=lambda row: row[0].strip("`"))
def test_every_threshold_is_that_of_the_code(row: list[str]) -> None:
    module, _, name = row[0].strip("`").partition(".")
    value = getattr(importlib.import_module(f"libortho.{module}"), name)
    assert float(row[1]) == value


def test_every_verdict_and_question_is_named() -> None:
    for name in (*typing.get_args(VerdictName), *typing.get_args(AuditVerdictName)):
        assert f"`{name}`" in PAGE
    asked = {cells[0] for cells in re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", PAGE)}
    assert set(typing.get_args(contrast.Question)) <= asked


def test_fields_in_code_exist() -> None:
    """Whatever looks like a field is one of a result, a finding or an attack."""
    known = {"beats_never", "never", "export_base"}  # an attack's, a state, a function
    for kind in (KillSwitchResult, NullTestResult, AuditResult, contrast.Finding):
        known |= {field.name for field in fields(kind)}
    for words in (contrast.Question, VerdictName, AuditVerdictName):
        known |= set(typing.get_args(words))
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert named <= known, named - known


def test_the_example_is_the_measured_file() -> None:
    for name, text in re.findall(r"<!-- example: (\S+) -->\n```json\n(.*?)```", PAGE, flags=re.S):
        measured = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
        (section,) = json.loads(text)
        shown: dict[str, Any] = json.loads(text)[section]
        assert shown.items() <= measured[section].items()
    limits = proportion_interval(0, 40)
    assert f"up to {limits.high:.1%}".replace("%", " %") in PAGE


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"fingerprint_equal": False, "hits_alpha1": 0}, "fails"),
        ({"loss_planted_alpha0": 2.0, "hits_alpha1": 0}, "fails"),
        ({"hits_alpha1": 35, "privacy_ratio_lower95": 1.0}, "inconclusive"),
        ({"privacy_ratio_lower95": 7.9}, "fails"),
        ({}, "passes"),
    ],
)
def test_the_order_of_the_four_checks(changes: dict[str, Any], verdict: str) -> None:
    """Each case would be judged otherwise if a later check came first."""
    clean: dict[str, Any] = {
        "hits_alpha1": 40,
        "hits_alpha0": 0,
        "n_planted": 40,
        "privacy_ratio_lower95": 11.3,
        "min_privacy_ratio": 8.0,
        "fingerprint_equal": True,
        "loss_planted_alpha0": 2.9,
        "loss_never_trained_low95": 2.7,
    }
    assert kill_switch_verdict(**(clean | changes)).verdict == verdict
    order = [m.start() for m in re.finditer(r"(?m)^\d\. `", PAGE)]
    named = [PAGE[start:].split("`")[1] for start in order]
    assert named == [
        "fingerprint_equal",
        "loss_planted_alpha0",
        "extraction_rate_alpha1",
        "privacy_ratio_lower95",
    ]
