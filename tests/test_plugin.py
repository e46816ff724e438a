"""The plugin, seen from outside: whole pytest sessions, their exit codes and what they print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from libortho import hardware
from libortho.hardware import Card
from libortho.report import render
from libortho.results import read_results
from libortho.settings import SETTINGS

pytest_plugins = ["pytester"]

OK, FAILED, USAGE = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR

MEASURED = """
    from libortho.results import ThroughputResult

    def measured(arm):
        return ThroughputResult(
            arm=arm,
            phase="decode",
            tokens_per_s=12.5,
            median_s=0.5,
            outcome="passed",
            conditions={},
            reasons={"peak_memory_mib": "not measured here"},
        )
"""


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Runs a session of its own with the plugin; the first argument is a test file's text."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)

    def session(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        quiet = ("-p", "no:cacheprovider", "-p", "no:benchmark")
        return pytester.runpytest_inprocess(
            "-p", "libortho.plugin", *quiet, *arguments, no_reraise_ctrlc=True
        )

    return session


Run = Callable[..., pytest.RunResult]


def output(result: pytest.RunResult) -> str:
    return "\n".join([*result.outlines, *result.errlines])


# --- options ------------------------------------------------------------------------------------


def test_help_lists_every_option_and_its_other_names(run: Run) -> None:
    result = run("", "--help")
    text = output(result)
    assert result.ret == OK
    for setting in SETTINGS:
        assert f"  {setting.option}" in text
        assert setting.variable in text
        assert setting.ini in text
    assert "%%" not in text


def test_the_header_says_where_each_setting_is_from(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\nlibortho_seed = 5\nlibortho_model = from-ini\n")
    monkeypatch.setenv("LIBORTHO_MODEL", "from-environment")
    result = run("def test_one(): pass", "--corpus", "a.txt", "--records", "/hidden/r.jsonl")
    text = output(result)
    assert result.ret == OK
    assert "model = from-environment (LIBORTHO_MODEL)" in text
    assert "seed = 5 (pytest.ini)" in text
    assert "corpus = a.txt (command line)" in text
    assert "device = auto (default)" in text
    assert "records = r.jsonl (command line)" in text
    assert "/hidden" not in text


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--quantization-bits", "5"), "--quantization-bits must be one of 4, 8, 16; found '5'"),
        (("--min-privacy-ratio", "-1"), "--min-privacy-ratio: '-1'"),
        (("--canaries", "none"), "--canaries: 'none'"),
        (("--experiment", "3"), "--experiment must be one of 1, 2, all"),
    ],
)
def test_a_bad_option_is_a_usage_error(arguments: tuple[str, ...], found: str, run: Run) -> None:
    result = run("def test_one(): pass", *arguments)
    assert result.ret == USAGE
    assert found in output(result)
    assert "(command line)" in output(result)
    assert "Traceback" not in output(result)


def test_a_bad_variable_is_a_usage_error_that_names_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBORTHO_SEED", "many")
    result = run("def test_one(): pass")
    assert result.ret == USAGE
    assert "LIBORTHO_SEED" in output(result)


# --- gates --------------------------------------------------------------------------------------

GATE = """
    import pytest

    @pytest.mark.gate
    @pytest.mark.experiment(1)
    def test_gate():
        {body}

    @pytest.mark.experiment(2)
    def test_other():
        pass
"""


@pytest.mark.parametrize(
    ("body", "code"), [("pass", OK), ("assert 0", FAILED), ("pytest.skip('no card')", FAILED)]
)
def test_a_gate_that_was_asked_for_must_pass(body: str, code: pytest.ExitCode, run: Run) -> None:
    assert run(GATE.format(body=body)).ret == code


def test_a_skipped_gate_is_named_with_its_reason(run: Run) -> None:
    result = run(GATE.format(body="pytest.skip('there is no card')"))
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.re_match_lines(
        [r".*gates that did not run.*", r".*::test_gate: there is no card"]
    )


def test_a_gate_that_ran_is_not_said_to_be_missing(run: Run) -> None:
    for body in ("pass", "assert 0"):
        assert "did not run" not in output(run(GATE.format(body=body)))


@pytest.mark.parametrize("arguments", [("-k", "other"), ("--experiment", "2")])
def test_a_deselected_gate_was_not_asked_for(arguments: tuple[str, ...], run: Run) -> None:
    result = run(GATE.format(body="pytest.skip('not today')"), *arguments)
    result.assert_outcomes(passed=1, deselected=1)
    assert result.ret == OK


def test_an_experiment_keeps_its_own_cases_and_those_of_neither(run: Run) -> None:
    cases = GATE.format(body="pass") + "\n    def test_of_neither():\n        pass\n"
    result = run(cases, "--experiment", "1", "-v")
    result.assert_outcomes(passed=2, deselected=1)
    result.stdout.no_fnmatch_line("*::test_other*")


def test_collecting_only_is_not_red(run: Run) -> None:
    result = run(GATE.format(body="pass"), "--collect-only")
    assert result.ret == OK
    assert "did not run" not in output(result)


def test_a_gate_behind_a_stop_was_not_reached(run: Run) -> None:
    result = run(
        """
        import pytest

        def test_first():
            assert 0

        @pytest.mark.gate
        def test_gate():
            pass
        """,
        "-x",
    )
    assert result.ret == FAILED
    result.stdout.re_match_lines([r".*::test_gate: was not reached"])


def test_a_gate_whose_fixture_fails_did_not_run(run: Run) -> None:
    result = run(
        """
        import pytest

        @pytest.fixture
        def broken():
            raise OSError("no disk")

        @pytest.mark.gate
        def test_gate(broken):
            pass
        """
    )
    assert result.ret == FAILED
    result.stdout.re_match_lines([r".*::test_gate: failed in setup"])


# --- cards --------------------------------------------------------------------------------------


def a_card(free_mib: int | None) -> Card:
    return Card(0, "RTX 4050", (8, 9), 6141, free_mib, "fp16", 192.0, "560")


def test_a_gpu_case_skips_with_what_is_missing_and_the_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cards", list)
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: "no NVIDIA driver answers")
    case = "import pytest\n@pytest.mark.gpu\ndef test_one(): pass"
    result = run(case, "-rs")
    result.assert_outcomes(skipped=1)
    text = output(result)
    assert "needs a CUDA device" in text
    assert "no NVIDIA driver answers" in text
    assert "check-gpu" in text

    monkeypatch.setattr(hardware, "cards", lambda: [a_card(6000)])
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: None)
    run(case).assert_outcomes(passed=1)
    assert "--device cpu was given" in output(run(case, "-rs", "--device", "cpu"))


VRAM = "import pytest\n@pytest.mark.vram(gib=5)\ndef test_one(): pass"


@pytest.mark.parametrize(
    ("free_mib", "arguments", "passed"),
    [
        (4096, (), False),
        (4096, ("--device", "cuda:0"), False),
        (5120, (), True),
        (None, (), True),  # a driver that doesn't say: let it try
        (4096, ("--device", "cpu"), True),  # the case doesn't use the card
    ],
)
def test_free_memory_decides_about_a_vram_case(
    free_mib: int | None,
    arguments: tuple[str, ...],
    passed: bool,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "cards", lambda: [a_card(free_mib)])
    result = run(VRAM, "-rs", *arguments)
    result.assert_outcomes(passed=int(passed), skipped=int(not passed))
    if not passed:
        assert "needs 5 GiB of free GPU memory; found 4.0 GiB" in output(result)
        assert "--device cpu" in output(result)


def test_a_vram_case_runs_without_a_card(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cards", list)
    run(VRAM, "--strict-markers").assert_outcomes(passed=1)


def test_a_device_asked_for_in_vain_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: "no NVIDIA driver answers")
    result = run("def test_one(ortho_device): pass", "--device", "cuda")
    assert result.ret == FAILED
    assert "--device cuda: no NVIDIA driver answers" in output(result)


WORKER = """
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(config):
        # What pytest-xdist gives to its workers.
        config.workerinput = {{"workerid": "gw0", "workercount": {count}}}
"""


@pytest.mark.parametrize("count", [1, 4])
def test_several_workers_do_not_share_a_card(
    count: int, run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cards", lambda: [a_card(6000)])
    monkeypatch.setattr(hardware, "why_no_gpu", lambda: None)
    monkeypatch.setattr(hardware, "resolve_device", lambda asked: "cuda")
    pytester.makeconftest(WORKER.format(count=count))
    one = "def test_one(): pass"
    for case in (
        f"import pytest\n@pytest.mark.gpu\n{one}",
        VRAM,
        "def test_one(ortho_device): pass",
    ):
        result = run(case)
        assert ("pytest-xdist runs 4 processes" in output(result)) == (count > 1)
        assert (result.ret == OK) == (count == 1)
    run(VRAM, "--device", "cpu").assert_outcomes(passed=1)


# --- errors and secrets -------------------------------------------------------------------------


def test_an_error_of_the_library_is_one_paragraph(run: Run) -> None:
    result = run(
        """
        import pytest
        from libortho.errors import ModelLoadError

        @pytest.fixture(scope="session")
        def model():
            raise ModelLoadError("There is no folder here. Check the path.")

        def test_one(model):
            pass

        def test_two(model):
            pass
        """
    )
    text = output(result)
    assert result.ret != OK
    assert "ModelLoadError: There is no folder here. Check the path." in text
    assert "raise ModelLoadError" not in text
    assert "Traceback" not in text
    assert text.count("There is no folder here") <= 2  # the paragraph and the short summary


def test_secrets_are_not_printed_by_a_failing_case(run: Run, pytester: pytest.Pytester) -> None:
    pytester.path.joinpath("r.jsonl").write_text(
        '{"id": "id-1", "prompt": "a private prompt", "secret": "hush-4917"}\n'
        '{"id": "id-2", "prompt": "another private prompt", "secret": "hush-5522"}\n'
    )
    result = run(
        """
        import pytest
        from libortho.errors import OrthoError
        from libortho.records import EncodedRecord, load_records

        @pytest.fixture
        def records():
            return load_records("r.jsonl", seed=0)

        def test_fails(records):
            first, second = records.planted
            tokens = EncodedRecord("id-3", "codes", [70_000 + 1117], 1)
            assert [records, first, tokens] == [records, second, tokens]

        def test_raises(records):
            raise OrthoError("it failed")
        """,
        "--showlocals",
        "-vv",
        "--records=r.jsonl",
    )
    result.assert_outcomes(failed=2)
    text = output(result)
    assert "id-1" in text
    for hidden in ("hush", "private prompt", "71117"):
        assert hidden not in text


# --- the results file ---------------------------------------------------------------------------

FAILS_LATER = (
    MEASURED
    + """
    def test_measures(run_results):
        run_results.notes.append("a note")
        run_results.throughput.append(measured("alpha1"))

    def test_fails_later():
        assert 0
"""
)


def results_in(folder: Path) -> list[Path]:
    return list(folder.glob("gtx4050_results_*.json"))


def test_what_was_measured_is_written_although_a_later_case_fails(
    run: Run, pytester: pytest.Pytester
) -> None:
    result = run(FAILS_LATER, "--results-dir", "there", "--records", "/hidden/r.jsonl")
    assert result.ret == FAILED
    (path,) = results_in(pytester.path / "there")
    results = read_results(path)
    assert [case.arm for case in results.throughput] == ["alpha1"]
    assert results.exp1_kill_switch is None
    assert "not among the selected" in results.reasons["exp1_kill_switch"]
    assert "/hidden" not in path.read_text()
    text = output(result)
    assert "note: a note" in text
    assert "decode alpha1" in text
    assert path.name in text


def test_nothing_is_written_when_nothing_was_measured(run: Run, pytester: pytest.Pytester) -> None:
    assert run("def test_one(): pass").ret == OK
    assert results_in(pytester.path) == []


def test_results_that_cannot_be_written_turn_the_run_red(
    run: Run, pytester: pytest.Pytester
) -> None:
    (pytester.path / "occupied").write_text("a file")
    passes = FAILS_LATER.replace("assert 0", "pass")
    result = run(passes, "--results-dir", "occupied")
    assert result.ret == FAILED
    assert "the results file was not written" in output(result)
    assert (pytester.path / "occupied").read_text() == "a file"


def test_a_value_that_is_no_json_turns_the_run_red(run: Run, pytester: pytest.Pytester) -> None:
    passes = FAILS_LATER.replace("assert 0", "pass").replace("12.5", "float('nan')")
    result = run(passes)
    assert result.ret == FAILED
    assert "throughput" in output(result)
    assert results_in(pytester.path) == []


# --- runs that are interrupted ------------------------------------------------------------------


def job(value: str, second: str = "pass", last: str = "pass") -> str:
    """Three cases, of which the first measures `value` unless an interrupted run has measured."""
    cases = f"""
    import pytest
    from libortho.journal import Journal

    @pytest.fixture(scope="session")
    def journal(run_results, ortho_settings):
        run_results.journal = Journal({{}}, cache_dir="cache", fresh=ortho_settings.fresh)
        return run_results.journal

    def test_first(journal, run_results):
        run_results.throughput.append(measured("alpha1"))
        print("found", journal.measured("one", str, lambda: "{value}"))

    def test_second():
        {second}

    def test_last():
        {last}
    """
    return MEASURED + cases


ENDS = {
    "interrupted": ({"second": "raise KeyboardInterrupt"}, (), True),
    "left by pytest.exit": ({"second": "pytest.exit('enough')"}, (), True),
    "stopped by -x": ({"second": "assert 0"}, ("-x",), True),
    "green": ({}, (), False),
    "red": ({"second": "assert 0"}, (), False),
    "red in its last case, with -x": ({"last": "assert 0"}, ("-x",), False),
    "without room for its results": ({}, ("--results-dir", "occupied"), True),
}


@pytest.mark.parametrize("end", ENDS)
def test_only_an_unfinished_run_is_resumed(end: str, run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "occupied").write_text("a file")
    bodies, arguments, resumed = ENDS[end]
    text = output(run(job("before", **bodies), "-s", *arguments))
    assert "found before" in text
    assert ("note: this run did not finish; measurements kept" in text) == resumed

    text = output(run(job("now"), "-s", "--results-dir=there"))
    assert f"found {'before' if resumed else 'now'}" in text
    assert ("note: resumed from an interrupted run, measured 2" in text) == resumed
    (path,) = results_in(pytester.path / "there")
    assert list(read_results(path).resumed) == ["one"] * resumed

    # That run finished.
    assert "found later" in output(run(job("later"), "-s"))


def test_fresh_takes_nothing_over(run: Run) -> None:
    run(job("before", second="raise KeyboardInterrupt"))
    text = output(run(job("now"), "-s", "--fresh"))
    assert "found now" in text
    assert "resumed" not in text


def test_an_interrupted_run_writes_what_it_has(run: Run, pytester: pytest.Pytester) -> None:
    result = run(job("before", second="raise KeyboardInterrupt"))
    assert result.ret == pytest.ExitCode.INTERRUPTED
    (path,) = results_in(pytester.path)
    results = read_results(path)
    assert [case.arm for case in results.throughput] == ["alpha1"]
    assert "did not finish" in results.reasons["exp1_kill_switch"]


# --- the report ---------------------------------------------------------------------------------

PASSES = FAILS_LATER.replace("assert 0", "pass")


def test_a_report_shows_what_the_results_file_holds(run: Run, pytester: pytest.Pytester) -> None:
    result = run(PASSES, "--report", "new/report.html")
    assert result.ret == OK
    (path,) = results_in(pytester.path)
    page = (pytester.path / "new" / "report.html").read_text(encoding="utf-8")
    assert page == render([(path.name, read_results(path))])
    assert 'data-figure="throughput.alpha1.decode.tokens_per_s">12.5<' in page
    assert "report: new/report.html" in output(result)


def test_a_report_is_written_for_a_run_that_fails(run: Run, pytester: pytest.Pytester) -> None:
    assert run(FAILS_LATER, "--report=report.html").ret == FAILED
    assert (pytester.path / "report.html").exists()


def test_without_the_option_there_is_no_report(run: Run, pytester: pytest.Pytester) -> None:
    assert run(PASSES).ret == OK
    assert not list(pytester.path.glob("**/*.html"))


def test_a_report_that_cannot_be_written_turns_the_run_red(
    run: Run, pytester: pytest.Pytester
) -> None:
    (pytester.path / "occupied").write_text("a file")
    result = run(PASSES, "--report", "occupied/report.html")
    assert result.ret == FAILED
    assert "the report was not written" in output(result)
    assert len(results_in(pytester.path)) == 1


def test_no_report_shows_a_value_that_is_no_json(run: Run, pytester: pytest.Pytester) -> None:
    result = run(PASSES.replace("12.5", "float('nan')"), "--report", "report.html")
    assert result.ret == FAILED
    assert not (pytester.path / "report.html").exists()


def test_a_report_of_nothing_is_not_written_and_said(run: Run, pytester: pytest.Pytester) -> None:
    result = run("def test_one(): pass", "--report", "report.html")
    assert result.ret == OK
    assert "nothing was measured, so report.html was not written" in output(result)
    assert not (pytester.path / "report.html").exists()
