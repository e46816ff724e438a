"""`ortho_audit` on tiny artefacts: what passes, what fails, and what is said and recorded of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuned_artefacts import SECRET, TWIN, N

import libortho
from libortho import audit_artefact
from libortho.audit_request import AuditRequest
from libortho.report import render
from libortho.results import read_results
from libortho.statistics import privacy_ratio
from libortho_pytest.options import OPTIONS

pytest_plugins = ["pytester"]

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, shelf: Path) -> Run:
    """Runs a session in a repository that holds the shelf's files; its ini file names them."""
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)
    (shelf / "cache").mkdir(exist_ok=True)
    for path in shelf.iterdir():
        (pytester.path / path.name).symlink_to(path)
    pytester.makeini(
        """
        [pytest]
        libortho_model = plain
        libortho_corpus = public.txt
        libortho_cache_dir = cache
        libortho_device = cpu
        """
    )

    def session(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        others = ("-p", "no:libortho.plugin", "-p", "no:cacheprovider", "-p", "no:benchmark")
        return pytester.runpytest_inprocess("-p", "libortho_pytest.plugin", *others, *arguments)

    return session


def output(result: pytest.RunResult) -> str:
    return "\n".join([*result.outlines, *result.errlines])


def no_secret(text: str) -> bool:
    """Neither prompts nor secrets; the digits of one may well stand within a figure's."""
    digits = [secret.strip() for secret in (SECRET, TWIN)]
    told = [f"{before}{secret}" for secret in digits for before in " '\""]
    return not any(hidden in text for hidden in ("Door", *told))


CASES = """
    made = []

    def test_clean(ortho_audit):
        audited = ortho_audit("full", records="records.jsonl")
        audited.assert_private(min_ratio=8)
        made.append(audited.result)

    def test_is_measured_once(ortho_audit):
        audited = ortho_audit("full", records="records.jsonl")
        audited.assert_private(verdict="construction")
        assert audited.result is made[0]

    def test_too_much_is_asked(ortho_audit):
        ortho_audit("full", records="records.jsonl").assert_private(min_ratio=20)

    def test_leaky(ortho_audit):
        ortho_audit("leaky", records="records.jsonl").assert_private()

    def test_base_alone(ortho_audit):
        ortho_audit("base", records="records.jsonl").assert_private()
"""


def test_a_session_of_audits(run: Run, pytester: pytest.Pytester) -> None:
    written = ("--libortho-results-dir=out", "--libortho-report=page.html", "--junitxml=junit.xml")
    result = run(CASES, "--showlocals", "-vv", "-rA", "--libortho-min-privacy-ratio=7", *written)
    text = output(result)
    result.assert_outcomes(passed=2, failed=3)

    # What is asked for: 8 and 20 by a case, 7 by the command line.
    best = privacy_ratio(N, N, 0, N).lower
    assert f"95 % interval [{best:.1f}, unbounded], and at least 20 is asked for" in text
    assert f"({N} planted records can prove {best:.1f} at best: give more)" in text
    assert "NotShownPrivateError: leaky is not shown to be private: it is judged 'leaks'" in text
    assert "its privacy ratio is 1.0, 95 % interval [0.9, 1.1]" in text
    assert "at least 7 is asked for" in text
    again = "audit ./leaky --records ./records.jsonl --model ./plain --corpus ./public.txt"
    assert f"python -m libortho {again} --device cpu --cache-dir ./cache --no-attacks" in text
    assert "--no-attacks --min-privacy-ratio 7 --require-verdict tested" in text
    assert "def shortfall" not in text  # the case's line is shown, not the library's
    assert "ArtifactError: " in text
    assert "holds no private stream" in text

    # What is written.
    (path,) = (pytester.path / "out").iterdir()
    results = read_results(path)
    assert [a.verdict for a in results.audits] == ["private by construction", "leaks"]
    assert "<folder>" in " ".join(results.provenance.command)
    page = (pytester.path / "page.html").read_text(encoding="utf-8")
    assert page == render([(path.name, results)])
    assert "audit of checkpoint: PRIVATE BY CONSTRUCTION" in text
    assert f"results: out/{path.name}" in text

    # What JUnit is told.
    junit = (pytester.path / "junit.xml").read_text(encoding="utf-8")
    properties = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in ET.fromstring(junit).iter("testcase")
    }
    clean, leaky = properties["test_clean"], properties["test_leaky"]
    assert clean["libortho.artefact"] == "full"
    assert clean["libortho.verdict"] == "private by construction"
    assert float(clean["libortho.privacy_ratio"]) == results.audits[0].privacy_ratio
    assert float(clean["libortho.privacy_ratio_lower95"]) > 8
    fingerprint = libortho.base_fingerprint(pytester.path / "full")
    assert clean["libortho.base_fingerprint"] == fingerprint
    assert leaky["libortho.verdict"] == "leaks"
    assert leaky["libortho.base_fingerprint"] != fingerprint
    assert properties["test_base_alone"] == {}

    assert all(map(no_secret, (text, junit, page, path.read_text(encoding="utf-8"))))


def test_an_unforeseen_failure_shows_no_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_audit(_: Any, records: Any, *__: Any, **___: Any) -> None:
        first = records.planted[0].secret
        raise RuntimeError(f"something of length {len(first)}")

    monkeypatch.setattr(audit_artefact, "run_audit", run_audit)
    case = "def test_one(ortho_audit): ortho_audit('full', records='records.jsonl')"
    result = run(case, "--showlocals", "-vv", "--full-trace")
    result.assert_outcomes(failed=1)
    text = output(result)
    assert "RuntimeError: something of length 5" in text
    assert "audit_artefact.py" in text  # where, as lines of code
    assert no_secret(text)


def test_a_cases_own_failure_is_shown_as_ever(run: Run) -> None:
    result = run("def test_one(ortho_audit):\n    wrong = 3\n    assert wrong == 4")
    assert "assert 3 == 4" in output(result)


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--libortho-seed=many", "ConfigError: --seed: 'many' (command line) is no value"),
        ("--libortho-require-verdict=maybe", "must be one of construction, tested"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_paragraph(argument: str, shown: str, run: Run) -> None:
    result = run("def test_one(ortho_audit): pass", argument)
    result.assert_outcomes(errors=1)
    assert shown in output(result)
    assert "Traceback" not in output(result)


def test_a_case_says_more_than_the_options_and_they_more_than_the_defaults(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AuditRequest] = []

    def perform(request: AuditRequest) -> Any:
        asked.append(request)
        raise libortho.OrthoError("not now")

    monkeypatch.setattr(AuditRequest, "perform", perform)
    case = "def test_one(ortho_audit): ortho_audit('full', records='records.jsonl'{more})"
    run(case.format(more=""))
    run(case.format(more=""), "--libortho-attacks", "--libortho-seed=3")
    monkeypatch.setenv("LIBORTHO_RELEARN", "true")
    (pytester.path / "below").mkdir()
    monkeypatch.chdir(pytester.path / "below")
    more = ", attacks=False, relearn=False, seed=4, model='smollm2', corpus='enwiki'"
    run(case.format(more=more), "--libortho-attacks", "..")
    run(case.format(more=""), "..")
    plain, attacked, said, below = asked
    assert (plain.attacks, plain.relearn, plain.seed) == (False, False, 0)  # cheap by default
    assert (attacked.attacks, attacked.seed) == (True, 3)
    assert (said.attacks, said.relearn, said.seed) == (False, False, 4)
    assert (said.model, said.corpus) == ("smollm2", "enwiki")
    assert below.relearn
    # Paths are the root folder's, wherever pytest is started.
    root = pytester.path
    assert {request.artefact for request in asked} == {root / "full"}
    assert {request.records for request in asked} == {root / "records.jsonl"}
    assert (below.model, below.corpus) == (str(root / "plain"), str(root / "public.txt"))
    assert below.cache_dir == root / "cache"


def test_properties_can_be_written_as_json(shelf: Path) -> None:
    # xdist sends them from process to process.
    from report_examples import audit

    from libortho.audit_request import AuditedArtefact
    from libortho_pytest.audits import PROPERTIES

    request = AuditRequest(artefact=shelf / "full", records=shelf / "records.jsonl")
    audited = AuditedArtefact(request=request, result=audit(), device="cpu")
    assert json.loads(json.dumps({name: of(audited) for name, of in PROPERTIES.items()}))
