"""The results file: what goes in comes out, and what may not go in is refused by name."""

import dataclasses
import json
import math
import subprocess
import types
import typing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libortho import provenance
from libortho.errors import ArtifactError
from libortho.provenance import Provenance, collect_provenance, public_command
from libortho.results import (
    SCHEMA_VERSION,
    ArmResult,
    FamilyHits,
    KillSwitchResult,
    LossPoint,
    NullTestResult,
    RecordOutcome,
    Results,
    ThroughputResult,
    read_results,
    results_filename,
    to_json,
    write_results,
)

NOW = datetime(2026, 3, 4, 15, 6, 7, tzinfo=UTC)


def some(kind: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911
    """Any value of an annotated type that a results file can hold."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{n: some(h) for n, h in hints.items()}).map(explained)
    if origin is types.UnionType:
        return st.none() | some(arguments[0])
    if origin is tuple:
        return st.lists(some(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), some(arguments[1]), max_size=2)
    if origin is Literal:
        return st.sampled_from(arguments)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if kind is Any:
        return st.none() | st.integers() | st.text(max_size=5) | st.lists(st.booleans(), max_size=2)
    return {
        int: st.integers(),
        str: st.text(st.characters(codec="utf-8"), max_size=9),
        bool: st.booleans(),
    }[kind]


def explained(value: Any) -> Any:
    """The same dataclass with a reason for every field that is null."""
    if not hasattr(value, "reasons"):
        return value
    nulls = [f.name for f in dataclasses.fields(value) if getattr(value, f.name) is None]
    return dataclasses.replace(value, reasons=dict.fromkeys(nulls, "not measured here"))


def example() -> Results:
    where = collect_provenance(
        command=["pytest", "-m", "gtx4050"],
        cpu_model="test",
        cpu_cores=2,
        device_name="cpu",
        compute_dtype="float32",
        now=NOW,
    )
    kill_switch = KillSwitchResult(
        model="smollm2",
        method="ortho",
        quantization=True,
        quantization_bits=4,
        seed=0,
        config={"group_size": 64, "private_density": 0.01},
        base_fingerprint="0" * 64,
        fingerprint_equal=True,
        alpha0_source="exported base, reloaded from disk",
        n_planted=1,
        n_twins=1,
        records_source="test",
        record_hashes=(
            RecordOutcome(
                id="codes-0000",
                salted_hash="0" * 16,
                family="codes",
                extracted_alpha1=True,
                extracted_alpha0=False,
            ),
        ),
        per_family={"codes": FamilyHits(n_planted=1, hits_alpha1=1, hits_alpha0=0)},
        hits_alpha1=1,
        hits_alpha0=0,
        extraction_rate_alpha1=1.0,
        loss_curve=(LossPoint(step=1, secret_loss=2.5, replay_kl=0.01, seconds=3.0),),
        min_privacy_ratio=8.0,
        verdict="fails",
        verdict_reason="one record proves nothing",
    )
    null_test = NullTestResult(
        model="smollm2",
        quantization=True,
        quantization_bits=4,
        seed=0,
        config={},
        corpus="enwiki",
        corpus_sha256="0" * 64,
        calibration_corpus="enwiki",
        calibration_sha256="1" * 64,
        windows=50,
        window_tokens=512,
        batch_size=1,
        ppl_fp16=20.0,
        arms={"reference": explained(ArmResult(ppl=20.0, ratio=1.0, precision="float32"))},
        max_ppl_ratio=1.12,
        verdict="inconclusive",
        verdict_reason="not measured",
    )
    case = ThroughputResult(arm="alpha1", phase="decode", outcome="passed", conditions={"batch": 1})
    return explained(
        Results(
            provenance=where,
            exp1_kill_switch=explained(kill_switch),
            exp2_null_test=explained(null_test),
            throughput=(explained(case),),
        )
    )


@given(results=some(Results))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_results_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, results: Results
) -> None:
    results = dataclasses.replace(results, schema_version=SCHEMA_VERSION)
    assert read_results(write_results(results, tmp_path_factory.mktemp("results"))) == results


def test_published_field_names_stay(tmp_path: Path) -> None:
    content = json.loads(write_results(example(), tmp_path).read_text(encoding="utf-8"))
    assert content["exp1_kill_switch"].keys() >= {
        "extraction_rate_alpha1",
        "extraction_rate_alpha0",
        "privacy_ratio",
        "privacy_ratio_lower95",
        "privacy_ratio_censored",
        "model",
        "quantization",
    }
    assert content["exp2_null_test"].keys() >= {
        "ppl_quantized",
        "ppl_fp16",
        "ppl_int4",
        "ppl_alpha0",
        "ppl_nf4",
        "model",
        "quantization",
    }
    assert content["exp1_kill_switch"]["extraction_rate_alpha1"] == 1.0
    assert content["exp1_kill_switch"]["privacy_ratio"] is None
    assert content["exp1_kill_switch"]["reasons"]["privacy_ratio"]


def test_names_carry_the_time_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = write_results(example(), tmp_path / "new", NOW)
    assert first.name == results_filename(NOW) == "gtx4050_results_20260304_150607.json"
    before = first.read_bytes()
    changed = dataclasses.replace(example(), throughput=())
    second = write_results(changed, tmp_path / "new", NOW)
    third = write_results(changed, tmp_path / "new", NOW)
    assert [p.name for p in (second, third)] == [f"{first.stem}_2.json", f"{first.stem}_3.json"]
    assert first.read_bytes() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    results = example()
    assert results.exp2_null_test is not None
    section = dataclasses.replace(results.exp2_null_test, ppl_alpha0=bad)
    with pytest.raises(ValueError, match=r"exp2_null_test\.ppl_alpha0 is -?(nan|inf)"):
        write_results(dataclasses.replace(results, exp2_null_test=section), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_that_json_does_not_know_are_refused_by_name() -> None:
    results = example()
    assert results.exp1_kill_switch is not None
    for bad in (np.float32(1), Path("x"), {1: 2}):
        section = dataclasses.replace(results.exp1_kill_switch, config={"deep": [0, bad]})
        with pytest.raises(ValueError, match=r"exp1_kill_switch\.config\.deep\[1\]"):
            to_json(dataclasses.replace(results, exp1_kill_switch=section))


def test_a_null_needs_its_reason() -> None:
    with pytest.raises(ValueError, match="exp1_kill_switch is null"):
        to_json(Results(provenance=example().provenance, reasons={"exp2_null_test": "not asked"}))
    results = example()
    assert results.exp2_null_test is not None
    arms = {"nf4": ArmResult(ppl=21.0, ratio=1.05, precision="NF4")}
    section = dataclasses.replace(results.exp2_null_test, arms=arms)
    with pytest.raises(ValueError, match=r"exp2_null_test\.arms\[nf4\]\.ratio_low95 is null"):
        to_json(dataclasses.replace(results, exp2_null_test=section))


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("libortho.results.atomic_write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(example(), tmp_path, NOW)
    assert list(tmp_path.iterdir()) == []


def changed_file(tmp_path: Path, change: typing.Callable[[dict[str, Any]], object]) -> Path:
    path = write_results(example(), tmp_path, NOW)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(schema_version=SCHEMA_VERSION + 1), "schema version is 2"),
        (lambda c: c.pop("schema_version"), "schema version is None"),
        (lambda c: c.pop("throughput"), "the file lacks: throughput"),
        (lambda c: c.update(resumed=["one"]), "resumed is a list"),
        (lambda c: c.update(surprise=1), "unknown fields: surprise"),
        (lambda c: c["provenance"].pop("torch"), "provenance lacks: torch"),
        (lambda c: c["provenance"].update(cpu_cores=True), r"provenance\.cpu_cores is a bool"),
        (lambda c: c["exp1_kill_switch"].update(verdict="fine"), "verdict is a str"),
        (lambda c: c["exp1_kill_switch"].update(hits_alpha1=1.5), "hits_alpha1 is a float"),
        (lambda c: c["exp2_null_test"].update(arms=[]), "arms is a list"),
        (lambda c: c["exp2_null_test"]["arms"].update(x=1), r"arms\.x is a int, not an object"),
        (lambda c: c["exp2_null_test"].update(ppl_int4=math.nan), "contains NaN"),
    ],
    ids=range(12),
)
def test_a_file_that_does_not_fit_is_refused_with_the_field(
    tmp_path: Path, change: Any, problem: str
) -> None:
    path = changed_file(tmp_path, change)
    with pytest.raises(ArtifactError, match=problem) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_a_file_from_before_runs_could_resume_is_read(tmp_path: Path) -> None:
    path = changed_file(tmp_path, lambda c: c.pop("resumed"))
    assert read_results(path) == example()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b"[" * 100_000])
def test_what_is_no_results_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="no results file"):
        read_results(path)
    with pytest.raises(ArtifactError, match="can't be read"):
        read_results(tmp_path)


# ---------------------------------------------------------------- provenance


def collected() -> Provenance:
    return collect_provenance(
        command=["pytest", "--records", "my/file.jsonl", "--records=my/file.jsonl", "-q"],
        cpu_model="test",
        cpu_cores=2,
        device_name="cpu",
        compute_dtype="float32",
        now=datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2))),
    )


def test_provenance_has_versions_and_universal_time_and_no_record_path() -> None:
    where = collected()
    assert where.timestamp_utc == "2025-12-31T23:00:00+00:00"
    assert where.torch is not None
    assert where.torch.startswith("2.")
    assert "my/file" not in json.dumps(dataclasses.asdict(where))
    assert public_command(["a", "--records"]) == ("a", "--records")
    paths = ["--results-dir", "/home/me", "--cache-dir=/data", "--corpus", "notes.txt", "--seed=1"]
    shown = public_command(paths)
    assert shown == (
        *("--results-dir", "<folder>", "--cache-dir=<folder>", "--corpus", "<corpus>", "--seed=1"),
    )

    own = ("~/m", "/models/me", "--model=/home/me/m", "--out=..\\x", "C:\\m", "./full")
    assert public_command(own) == ("<path>", "<path>", "--model=<path>", "--out=<path>") + 2 * (
        "<path>",
    )
    public = (
        "pytest",
        "bench/test_audit.py::test_verdict",
        "--model",
        "owner/model",
        "-m",
        "audit",
    )
    assert public_command(public) == public


def test_commit_is_that_of_the_checkout_that_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package.py"
    package.write_text("first", encoding="utf-8")
    monkeypatch.setattr(provenance, "__file__", str(package))
    git("init", "--quiet")
    assert (collected().git_commit, collected().git_dirty) == (None, None)  # not tracked
    git("add", "package.py")
    git("commit", "--quiet", "-m", "first")
    assert (collected().git_commit, collected().git_dirty) == (git("rev-parse", "HEAD"), False)
    package.write_text("second", encoding="utf-8")
    assert collected().git_dirty is True
