"""What an audit must come to, and the command that makes it again."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from report_examples import audit
from tuned_artefacts import N

from libortho import cli
from libortho.audit_request import AuditedArtefact, AuditRequest, NotShownPrivateError
from libortho.audit_results import AuditResult
from libortho.errors import ArtifactError, RecordError
from libortho.records import Record, RecordSet
from libortho.statistics import privacy_ratio

REQUEST = AuditRequest(artefact=Path("models/full"), records=Path("some records.jsonl"))


def audited(result: AuditResult, **limits: Any) -> AuditedArtefact:
    return AuditedArtefact(request=REQUEST, result=result, device="cpu", **limits)


def test_what_is_private_enough_raises_nothing() -> None:
    clean = audited(audit())
    clean.assert_private()
    clean.assert_private(min_ratio=52.9, verdict="construction")
    audited(audit(verdict="private as far as tested")).assert_private()


def test_a_ratio_below_the_limit_is_told_with_its_interval_and_the_command() -> None:
    with pytest.raises(AssertionError) as raised:
        audited(audit()).assert_private(min_ratio=53)
    text = str(raised.value)
    assert "its privacy ratio is 400.0, 95 % interval [52.9, " in text
    assert "at least 53 is asked for at the lower limit" in text
    assert "200 planted records can prove 52.9 at best: give more" in text
    assert "python -m libortho audit models/full --records 'some records.jsonl'" in text
    assert "--min-privacy-ratio 53 --require-verdict tested" in text
    assert "judged" not in text


@pytest.mark.parametrize("verdict", ["leaks", "inconclusive"])
def test_neither_a_leak_nor_no_verdict_passes_whatever_the_ratio(verdict: Any) -> None:
    result = audit(verdict=verdict, verdict_reason="this is why")
    with pytest.raises(NotShownPrivateError, match=f"it is judged '{verdict}'.*: this is why"):
        audited(result).assert_private(min_ratio=1)


def test_construction_is_more_than_tested() -> None:
    tested = audited(audit(verdict="private as far as tested"))
    with pytest.raises(NotShownPrivateError, match="and private by construction is asked for"):
        tested.assert_private(verdict="construction")
    with pytest.raises(NotShownPrivateError):
        tested.held_to(min_ratio=8, required="construction").assert_private()
    tested.held_to(min_ratio=8, required="construction").assert_private(verdict="tested")


def test_a_ratio_that_was_not_measured_is_not_passed() -> None:
    with pytest.raises(NotShownPrivateError, match="its privacy ratio is not measured"):
        audited(audit(privacy_ratio=None, privacy_ratio_lower95=None)).assert_private()


def test_a_verdict_that_there_is_not_is_a_mistake_and_no_failure() -> None:
    with pytest.raises(ValueError, match="one of tested, construction; found 'private'"):
        audited(audit()).assert_private(verdict="private")  # type: ignore[arg-type]


def test_the_command_is_read_as_the_request_by_the_command_line() -> None:
    request = AuditRequest(
        artefact=Path("a b"),
        records=Path("r.jsonl"),
        model="./mine",
        corpus="notes.txt",
        attacks=False,
        relearn=True,
        seed=3,
        device="cpu",
        cache_dir=Path("/cache"),
    )
    words = shlex.split(request.command("--min-privacy-ratio", "8"))
    assert words[:3] == ["python", "-m", "libortho"]
    options = cli._parser().parse_args(words[3:])
    for field in fields(request):
        assert getattr(options, field.name) == getattr(request, field.name), field.name
    assert options.min_privacy_ratio == 8
    plain = cli._parser().parse_args(shlex.split(REQUEST.command())[3:])
    assert AuditRequest(**{f.name: getattr(plain, f.name) for f in fields(REQUEST)}) == REQUEST


def test_no_secret_is_in_a_request_of_records_in_memory() -> None:
    records = RecordSet((Record("p", "a prompt", "hush-4917", "codes"),), (), 0, "tests")
    request = AuditRequest(artefact=Path("full"), records=records)
    assert "hush" not in repr(request) + request.command()
    assert "--records FILE" in request.command()


def test_the_users_files_are_looked_at_before_anything_is_fetched(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = lambda *_, **__: pytest.fail("fetched")  # noqa: E731
    monkeypatch.setattr("libortho.audit_request.resolve_model", fetched)
    monkeypatch.setattr("libortho.audit_request.load_corpus", fetched)
    records = shelf / "records.jsonl"
    with pytest.raises(ArtifactError, match="holds no private stream"):
        AuditRequest(artefact=shelf / "base", records=records).perform()
    with pytest.raises(ArtifactError, match="holds no artefact"):
        AuditRequest(artefact=shelf / "plain", records=records).perform()
    (tmp_path / "few.jsonl").write_text("\n".join(records.read_text().splitlines()[:5]))
    with pytest.raises(RecordError, match="at least"):
        AuditRequest(artefact=shelf / "full", records=tmp_path / "few.jsonl").perform()


def test_as_many_records_as_the_tests_use_can_prove_the_default() -> None:
    assert privacy_ratio(N, N, 0, N).lower > 8
