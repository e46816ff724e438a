"""The README says what was measured, and its commands are the ones that CI runs."""

import re
from pathlib import Path

import pytest

from bench.readme import CARD_RUN, RUNS, render
from libortho.results import read_results
from libortho.settings import SETTINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_quoted_figure_is_in_the_result_files():
    block = README.split("<!-- results -->")[1].split("<!-- end of results -->")[0]
    assert block.strip() == render()


@pytest.mark.parametrize("name", [*RUNS, CARD_RUN])
def test_result_files_hold_what_is_quoted_and_pass(name):
    results = read_results(ROOT / "bench" / "results" / name)
    assert results.exp2_null_test is not None
    assert results.exp2_null_test.verdict == "passes"
    if name in (RUNS[0], CARD_RUN):  # the others are about perplexity alone
        assert results.exp1_kill_switch is not None
        assert results.exp1_kill_switch.verdict == "passes"


def test_every_option_of_the_readme_exists():
    written = set(re.findall(r"`(--[a-z-]+)`", README))
    known = {setting.option for setting in SETTINGS}
    assert known <= written | {"--cache-dir", "--results-dir", "--seed"}
    assert written <= known


@pytest.mark.parametrize("mark", ["main", "tests"])
def test_the_two_commands_can_be_found(mark):
    after = README.split(f"<!-- command: {mark} -->\n")[1]
    assert after.startswith("```\n")
    assert "pytest" in after.split("```")[1]
