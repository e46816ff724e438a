"""The READMEs say what was measured, in step with each other, and name what there is."""

import re
import string
from collections import Counter

import pytest
from documented import PAGES, READMES, ROOT, blocks, code_spans, prose, read

from bench import readme
from bench.readme import CARD_RUN, RUNS, block_of, render
from bench.readme_texts import CATALOGUES, Catalogue
from libortho.cli import _parser
from libortho.results import read_results
from libortho.settings import SETTINGS
from libortho_pytest.gates import REQUIRE_GATE
from libortho_pytest.options import OPTIONS

ENGLISH, CHINESE = READMES
OF_OTHERS = {"--index-url", "--upgrade", "--check", "--junitxml", "--showlocals"}
"""Options of other people's programs: pip, ensurepip, ruff, pytest."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@pytest.mark.parametrize("name", READMES)
def test_every_quoted_figure_is_in_the_result_files(name):
    assert block_of(read(name)) == render(name)


@pytest.mark.parametrize("name", [*RUNS, CARD_RUN])
def test_result_files_hold_what_is_quoted_and_pass(name):
    results = read_results(ROOT / "bench" / "results" / name)
    assert results.exp2_null_test is not None
    assert results.exp2_null_test.verdict == "passes"
    if name in (RUNS[0], CARD_RUN):  # the others are about perplexity alone
        assert results.exp1_kill_switch is not None
        assert results.exp1_kill_switch.verdict == "passes"


@pytest.mark.parametrize("name", READMES)
def test_every_option_of_the_readme_exists(name):
    written = set(re.findall(r"`(--[a-z-]+)`", read(name)))
    known = {setting.option for setting in SETTINGS}
    assert known <= written | {"--cache-dir", "--results-dir", "--seed"}
    assert written <= known


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("mark", ["main", "tests"])
def test_the_two_commands_can_be_found(mark, name):
    after = read(name).split(f"<!-- command: {mark} -->\n")[1]
    assert after.startswith("```\n")
    assert "pytest" in after.split("```")[1]


# --- the two languages --------------------------------------------------------------------------


def sections(name: str) -> list[str]:
    """The text between headings, code blocks left out."""
    return re.split(r"(?m)^#+ .*$", prose(name))


def levels(name: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"(?m)^(#+) ", prose(name))]


def figures(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    lines = re.findall(r"(?m)^\|(.*)\|$", text)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_headings_are_as_many_and_of_the_same_levels():
    assert levels(ENGLISH) == levels(CHINESE)


def test_the_blocks_are_the_same_but_for_comments():
    first, second = ([b[1:] for b in blocks(name)] for name in READMES)
    assert first == second


@pytest.mark.parametrize("number", range(len(sections(ENGLISH))))
def test_a_section_has_the_same_figures_and_code(number):
    first, second = (sections(name)[number] for name in READMES)
    assert figures(first) == figures(second)
    assert Counter(code_spans(first)) == Counter(code_spans(second))


def test_tables_have_the_same_options_defaults_and_figures():
    """Row by row: the code and the figures of each cell, and which cells are empty."""
    first, second = (rows(read(name)) for name in READMES)
    assert len(first) == len(second)
    for here, there in zip(first, second, strict=True):
        assert [bool(cell) for cell in here] == [bool(cell) for cell in there]
        for one, other in zip(here, there, strict=True):
            assert figures(one) == figures(other)
            assert Counter(code_spans(one)) == Counter(code_spans(other))


def test_links_are_the_same_but_for_those_to_each_other():
    found = [Counter(re.findall(r"\]\(([^)]+)\)", read(name))) for name in READMES]
    assert found[0].pop(CHINESE) == found[1].pop(ENGLISH) == 1
    assert found[0] == found[1]


def fields(text: str) -> Counter[str | None]:
    return Counter(name for _, name, _, _ in string.Formatter().parse(text) if name)


@pytest.mark.parametrize("words", CATALOGUES.values(), ids=CATALOGUES)
def test_a_catalogue_has_every_text_with_its_figures(words: Catalogue):
    english = CATALOGUES[ENGLISH]
    assert words.keys() == english.keys()
    for key, text in english.items():
        assert fields(words[key]) == fields(text), key
        assert figures(words[key]) == figures(text), key


def test_blocks_are_written_between_the_marks(tmp_path, monkeypatch):
    for name in READMES:
        old = block_of(read(name))
        (tmp_path / name).write_text(read(name).replace(old, "of another run"), encoding="utf-8")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    readme.main(["--write"])
    assert {n: (tmp_path / n).read_text(encoding="utf-8") for n in READMES} == {
        n: read(n) for n in READMES
    }


# --- every page ---------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings, for links to them."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(str(there.resolve().relative_to(ROOT))), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in READMES])
def test_every_option_that_a_page_names_exists(page):
    known = {setting.option for setting in SETTINGS} | OF_OTHERS | {REQUIRE_GATE}
    known |= {option.flag for option in OPTIONS}
    for action in _parser()._actions:
        for command in (action.choices or {}).values():
            known |= set(command._option_string_actions)
    words = [w.partition("=")[0] for span in code_spans(prose(page)) for w in span.split()]
    named = {w for w in words if w.startswith("--") and not w.endswith("-")}
    assert named <= known, named - known
