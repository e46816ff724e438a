"""The plugin in somebody else's repository: silent until asked, and gates that must run.

The audits themselves are in `test_ortho_audit`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from libortho import hardware
from libortho.settings import AUDIT_SETTINGS, resolve
from libortho_pytest.options import OPTIONS, described, given

pytest_plugins = ["pytester"]

OK, FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED
ROOT = Path(__file__).parents[1]
HEAVY = ("libortho", "torch", "transformers", "numpy", "scipy", "sklearn", "tqdm")

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a session of its own; the first argument is a test file's text."""
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)

    def session(text: str, *arguments: str, plugin: bool = True) -> pytest.RunResult:
        pytester.makepyfile(text)
        chosen = ("-p", "libortho_pytest.plugin" if plugin else "no:libortho_pytest.plugin")
        others = [
            ("-p", f"no:{name}") for name in ("libortho.plugin", "cacheprovider", "benchmark")
        ]
        quiet = [word for pair in others for word in pair]
        return pytester.runpytest_inprocess(*chosen, *quiet, *arguments)

    return session


def output(result: pytest.RunResult) -> str:
    return "\n".join([*result.outlines, *result.errlines])


# --- silent until asked -------------------------------------------------------------------------

PLAIN = """
    import pytest

    def test_one():
        pass

    @pytest.mark.skipif(True, reason="not today")
    def test_two():
        pass
"""


def test_nothing_heavy_is_imported_until_an_audit_is_made(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "def pytest_unconfigure():\n"
        f"    print('imported:', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    (tmp_path / "test_cases.py").write_text(
        "def test_one(): pass\n"
        "def test_audits(ortho_audit): pass\n"  # collected and listed, not run
    )
    command = [sys.executable, "-m", "pytest", "-p", "libortho_pytest.plugin"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
    for more in (["--collect-only"], ["-k", "test_one", "--libortho-seed=2"]):
        done = subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "imported: []" in done.stdout


def test_a_session_that_asks_for_nothing_looks_as_if_it_were_not_there(run: Run) -> None:
    def lines(plugin: bool) -> list[str]:
        # It was imported by other tests of this process, and pytest says so.
        known = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
        shown = run(PLAIN, "-rs", "-v", *known, plugin=plugin).outlines
        # pytest lists what is installed, whatever it does.
        return [line for line in shown if " in 0." not in line and not line.startswith("plugins:")]

    assert lines(plugin=True) == lines(plugin=False)


def test_it_adds_one_fixture_and_one_marker(run: Run) -> None:
    markers = output(run(PLAIN, "--markers"))
    assert "@pytest.mark.gate: a case that a release depends on" in markers
    assert not {"gtx4050", "vram", "gpu", "experiment"} & {
        line.removeprefix("@pytest.mark.").split(":")[0].split("(")[0]
        for line in markers.splitlines()
    }
    fixtures = output(run(PLAIN, "--fixtures"))
    assert "ortho_audit" in fixtures
    assert not {"progress", "compute_dtype", "run_results"} & {
        line.split(" ")[0] for line in fixtures.splitlines()
    }


def test_other_plugins_may_have_options_and_marks_of_common_names(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [s.option for s in AUDIT_SETTINGS] + ["--records", "--profile", "--checkpoint"]
    pytester.makeconftest(
        f"""
        def pytest_addoption(parser):
            for name in {names}:
                parser.addoption(name, default="theirs")

        def pytest_configure(config):
            config.addinivalue_line("markers", "gpu: theirs")
        """
    )
    monkeypatch.setattr(hardware, "cards", list)
    result = run(
        """
        import pytest

        @pytest.mark.gpu
        def test_one(pytestconfig):
            assert pytestconfig.getoption("--device") == "mps"
        """,
        "--device=mps",
        "--seed=many",
    )
    assert result.ret == OK
    result.assert_outcomes(passed=1)


# --- options ------------------------------------------------------------------------------------


def test_the_light_table_says_what_the_settings_are() -> None:
    settings = {setting.name: setting for setting in AUDIT_SETTINGS}
    assert {option.name for option in OPTIONS} == set(settings)
    for option in OPTIONS:
        setting = settings[option.name]
        assert (option.key, option.variable, option.ini) == (
            setting.key,
            setting.variable,
            setting.ini,
        )
        assert option.takes_value == (setting.default is not False)
        if option.takes_value and option.name not in ("results-dir", "report", "cache-dir"):
            assert setting.parse(option.default) == setting.default


TEXTS = st.dictionaries(st.sampled_from([o.key for o in OPTIONS]), st.sampled_from(["", "cpu"]))


@drawn(TEXTS, TEXTS, TEXTS)
def test_what_is_shown_is_what_is_taken(
    line: dict[str, str], environment: dict[str, str], ini: dict[str, str]
) -> None:
    named = [setting for setting in AUDIT_SETTINGS if setting.parse is str and not setting.choices]
    variables = {o.variable: environment[o.key] for o in OPTIONS if o.key in environment}
    lines = {o.ini: ini[o.key] for o in OPTIONS if o.key in ini}
    shown = given(line, variables, lines, "pytest.ini")
    taken = resolve(line, variables, lines, named)
    for setting in named:
        origin = shown[setting.key].origin if setting.key in shown else "default"
        assert origin == taken.origins[setting.key]
    assert len(described(shown)) == len(OPTIONS)


def test_help_lists_every_option_with_its_other_names(run: Run) -> None:
    text = output(run(PLAIN, "--help"))
    assert "--require-gate" in text
    assert "%%" not in text
    for option in OPTIONS:
        assert f"  {option.flag}" in text
        assert option.variable in text
        assert option.ini in text


def test_the_page_about_the_plugin_lists_every_option() -> None:
    page = (ROOT / "docs" / "pytest-plugin.md").read_text(encoding="utf-8")
    for option in OPTIONS:
        (row,) = re.findall(rf"^\| `{option.flag}` \| (.*) \|$", page, re.M)
        variable, ini, default = row.split(" | ")
        assert (variable, ini) == (f"`{option.variable}`", f"`{option.ini}`")
        assert option.default in (default.strip("`"), "none is written", "the user's")
    assert set(re.findall(r"--libortho-[a-z-]+[a-z]", page)) == {o.flag for o in OPTIONS}


def test_the_header_shows_what_was_set_and_where(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nlibortho_seed = "5"\nlibortho_model = "from-ini"\n'
    )
    monkeypatch.setenv("LIBORTHO_MODEL", "from-environment")
    text = output(run(PLAIN, "--libortho-corpus=notes.txt"))
    assert "model = from-environment (LIBORTHO_MODEL)" in text
    assert "seed = 5 (pyproject.toml)" in text
    assert "corpus = notes.txt (command line)" in text
    assert "device" not in text


def test_a_case_that_audits_brings_every_setting(run: Run) -> None:
    case = "def test_audits(ortho_audit): pass"
    text = output(run(case, "--collect-only"))
    assert "model = smollm2 (default)" in text
    assert "min_privacy_ratio = 8 (default)" in text
    assert "libortho:" not in output(run(case, "--collect-only", "-q"))


# --- gates --------------------------------------------------------------------------------------

GATES = """
    import pytest

    @pytest.mark.gate
    def test_gate():
        {body}

    def test_other():
        pass
"""
SKIP = GATES.format(body="pytest.skip('there is no card')")


def test_without_the_option_a_skipped_gate_is_pytests_business(run: Run) -> None:
    result = run(SKIP)
    assert result.ret == OK  # which is what the option is for
    assert "did not run" not in output(result)


@pytest.mark.parametrize(
    ("body", "code", "shown"),
    [
        ("pass", OK, ""),
        ("assert 0", FAILED, ""),
        ("pytest.skip('there is no card')", FAILED, "::test_gate: there is no card"),
        ("pytest.xfail('a known leak')", FAILED, "::test_gate: is expected to fail: "),
    ],
)
def test_a_required_gate_must_run(body: str, code: pytest.ExitCode, shown: str, run: Run) -> None:
    result = run(GATES.format(body=body), "--require-gate")
    assert result.ret == code
    assert ("gates that did not run" in output(result)) == bool(shown)
    assert shown in output(result)


@pytest.mark.parametrize(
    ("text", "arguments", "shown"),
    [
        (PLAIN, (), "no case is marked as a gate or uses ortho_audit"),  # renamed, say
        (SKIP, ("-k", "other"), "::test_gate: was deselected"),
        ("", (), "no case is marked as a gate"),  # nothing collected
        (GATES.format(body="pass"), ("-k", "neither"), "::test_gate: was deselected"),
    ],
)
def test_a_session_without_a_gate_is_red(
    text: str, arguments: tuple[str, ...], shown: str, run: Run
) -> None:
    result = run(text, "--require-gate", *arguments)
    assert result.ret == FAILED
    assert shown in output(result)
    assert "is not a passed gate" in output(result)


def test_one_of_two_gates_may_be_deselected_and_is_named(run: Run) -> None:
    text = GATES.format(body="pass") + "\n    @pytest.mark.gate\n    def test_second(): pass\n"
    result = run(text, "--require-gate", "-k", "second")
    assert result.ret == OK
    assert "::test_gate: was deselected" in output(result)


def test_collecting_only_requires_nothing(run: Run) -> None:
    assert run(PLAIN, "--require-gate", "--collect-only").ret == OK


def test_a_case_that_audits_is_a_gate(run: Run) -> None:
    text = "def test_audits(ortho_audit): pass\ndef test_other(): pass"
    result = run(text, "-m", "gate", "--collect-only", "-q", "--strict-markers")
    assert "::test_audits" in output(result)
    assert "::test_other" not in output(result)


# --- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "code"), [(GATES.format(body="pass"), 0), (SKIP, 1), (PLAIN, 1)])
def test_gates_are_known_to_the_process_that_decides_under_xdist(
    text: str, code: int, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(text)
    plugins = ("-p", "xdist", "-p", "libortho_pytest.plugin")
    result = pytester.runpytest_subprocess(*plugins, "-n", "1", "--require-gate")
    assert result.ret == code, output(result)
    assert ("gates that did not run" in output(result)) == bool(code)


WORKER = """
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(config):
        # What pytest-xdist gives to its workers.
        config.workerinput = {{"workerid": "gw0", "workercount": {count}}}
"""


@pytest.mark.parametrize(("count", "refused"), [(4, True), (1, False)])
def test_several_workers_do_not_share_a_card(
    count: int,
    refused: bool,
    run: Run,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "resolve_device", lambda asked: asked)
    pytester.makeconftest(WORKER.format(count=count))
    case = "def test_one(ortho_audit): ortho_audit('nowhere', records='r.jsonl', device='cuda')"
    result = run(case)
    result.assert_outcomes(failed=1)
    assert ("pytest-xdist runs 4 processes" in output(result)) == refused
    assert ("RecordError" in output(result)) != refused
    assert "Traceback" not in output(result)
    assert "pytest-xdist" not in output(run(case.replace("cuda", "cpu")))
