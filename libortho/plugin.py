"""The suite's pytest plugin: options, markers, cards, the results file, the closing table.

Knows pytest. Measures nothing: cases hand their results to `RunResults`, and this writes them down.
It belongs to a checkout, whose conftest names it; what is there wherever libortho is installed, and
the gates that must run, is `libortho_pytest`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from libortho_pytest.gates import gates_of
from libortho_pytest.plugin import visible_progress, why_no_shared_gpu

from . import hardware
from .audit_results import AuditResult
from .errors import ConfigError, HardwareError, OrthoError
from .journal import Journal
from .precision import dtype_name
from .profiles import prepare_environment
from .provenance import collect_provenance
from .report import write_report
from .results import KillSwitchResult, NullTestResult, Results, ThroughputResult, write_results
from .settings import SETTINGS, Settings, join_options, resolve
from .summary import summary_lines


@dataclass
class RunResults:
    """What the cases of this session have measured so far."""

    kill_switch: KillSwitchResult | None = None
    null_test: NullTestResult | None = None
    audits: list[AuditResult] = field(default_factory=list)
    throughput: list[ThroughputResult] = field(default_factory=list)
    compute_dtype: str = "none"
    device_name: str = "none"
    notes: list[str] = field(default_factory=list)
    written: Path | None = None
    report: Path | None = None
    failures: list[str] = field(default_factory=list)
    journal: Journal | None = None  # what can be taken over by the next run if this one is killed
    complete: bool = False  # whether the last case was reached

    @property
    def any(self) -> bool:
        return bool(self.kill_switch or self.null_test or self.audits or self.throughput)


pytest_plugins = ["libortho_pytest.plugin"]

SETTINGS_KEY = pytest.StashKey[Settings]()
RESULTS_KEY = pytest.StashKey[RunResults]()

_MARKERS = (
    "gtx4050: an experiment or throughput case of the 6 GB profile; the main job is -m gtx4050",
    "audit: examines a method's off state: pytest -m audit --method NAME",
    "experiment(number): belongs to experiment 1 or 2, for --experiment",
    "vram(gib): needs this much free GPU memory when it runs on a GPU, in GiB",
    "gpu: needs a CUDA device",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("libortho", "libortho: separation, privacy and perplexity")
    for setting in SETTINGS:
        default = "the profile's" if setting.default is None else setting.default
        text = f"{setting.help} [{default}] ({setting.variable}, ini {setting.ini})"
        text = text.replace("%", "%%")  # argparse formats it
        if setting.default is False:
            group.addoption(setting.option, action="store_const", const="true", help=text)
        else:
            group.addoption(setting.option, default=None, metavar="VALUE", help=text)
        parser.addini(setting.ini, f"{setting.help}; see {setting.option}", default="")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    """Run again with `--model=PATH` in place of `--model PATH`, if that is how it was written.

    Before any plugin is loaded, pytest takes an option's value that is an existing path for the
    place of the tests, and would look there for its root folder and its ini file.
    """
    args = list(config.invocation_params.args)
    joined = join_options(args)
    if joined == args:
        return None
    return pytest.main(joined, plugins=list(config.invocation_params.plugins or ()))


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    prepare_environment()
    try:
        settings = resolve(
            {s.key: config.getoption(s.option) for s in SETTINGS},
            os.environ,
            {s.ini: str(config.getini(s.ini)) for s in SETTINGS},
        )
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SETTINGS_KEY] = settings
    config.stash[RESULTS_KEY] = RunResults()
    gates_of(config).strict = True


def pytest_report_header(config: pytest.Config) -> list[str]:
    described = config.stash[SETTINGS_KEY].described()
    return ["libortho: " + ", ".join(described[i : i + 4]) for i in range(0, len(described), 4)]


# --- which cases run ----------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.stash[SETTINGS_KEY].experiment
    if wanted != "all":
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            marker = item.get_closest_marker("experiment")
            other = marker is not None and str(marker.args[0]) != wanted
            (dropped if other else kept).append(item)
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    device = item.config.stash[SETTINGS_KEY].device
    if item.get_closest_marker("gpu") and (device == "cpu" or hardware.why_no_gpu()):
        found = "--device cpu was given." if device == "cpu" else hardware.why_no_gpu()
        pytest.skip(f"needs a CUDA device; found none: {found} See python -m libortho check-gpu.")
    marker = item.get_closest_marker("vram")
    cards = hardware.cards() if marker and device != "cpu" else []
    shared = why_no_shared_gpu(item.config)
    if shared and (item.get_closest_marker("gpu") or cards):
        pytest.fail(f"refused: {shared}", pytrace=False)
    if marker and cards:
        needed = float(marker.kwargs.get("gib", *marker.args))
        index = int(device.partition(":")[2] or 0) if device != "auto" else 0
        free_mib = cards[min(index, len(cards) - 1)].free_mib
        free = needed if free_mib is None else free_mib / 1024  # unknown: let it try
        if free < needed:
            pytest.skip(
                f"needs {needed:g} GiB of free GPU memory; found {free:.1f} GiB. Close what else "
                "uses the card, choose a smaller --model or fewer bits, or use --device cpu."
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, OrthoError):
        # The library's errors explain themselves; a traceback would only hide the explanation.
        report.longrepr = f"{call.excinfo.typename}: {call.excinfo.value}"
        if report.when == "setup":
            item.session.shouldfail = "what the cases share could not be set up"
    if report.when == "teardown" and item is item.session.items[-1]:
        item.config.stash[RESULTS_KEY].complete = True
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if config.option.collectonly:
        return
    run = config.stash[RESULTS_KEY]
    _write_results(run, config)
    if run.failures and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if run.journal is not None:
        # Stopped by -x or by a key, a run has not measured what was asked for. To a worker of xdist
        # others' cases are not missing.
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        complete = run.complete or hasattr(config, "workerinput")
        run.journal.close(finished=ended and complete and not run.failures)
        run.notes += run.journal.notes


def _write_results(run: RunResults, config: pytest.Config) -> None:
    settings = config.stash[SETTINGS_KEY]
    if not run.any:
        if settings.report is not None:
            run.notes.append(f"nothing was measured, so {settings.report} was not written")
        return
    results = _results(run, config)
    try:
        run.written = write_results(results, settings.results_dir)
    except (OSError, ValueError, OrthoError) as error:
        run.failures.append(f"the results file was not written: {error}")
    if settings.report is not None:
        name = run.written.name if run.written else "this run"
        try:
            run.report = write_report([(name, results)], settings.report)
        except (OSError, ValueError, OrthoError) as error:
            run.failures.append(f"the report was not written: {error}")


def _results(run: RunResults, config: pytest.Config) -> Results:
    facts = hardware.cpu_facts()
    reasons = {}
    for name, value in (
        ("exp1_kill_switch", run.kill_switch),
        ("exp2_null_test", run.null_test),
    ):
        if value is None:
            reasons[name] = "not among the selected cases, or it did not finish"
    return Results(
        provenance=collect_provenance(
            command=("pytest", *config.invocation_params.args),
            cpu_model=facts.model,
            cpu_cores=facts.logical_cores,
            device_name=run.device_name,
            compute_dtype=run.compute_dtype,
        ),
        exp1_kill_switch=run.kill_switch,
        exp2_null_test=run.null_test,
        audits=tuple(run.audits),
        throughput=tuple(run.throughput),
        resumed={} if run.journal is None else dict(run.journal.resumed),
        reasons=reasons,
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[RESULTS_KEY]
    asked = config.stash[SETTINGS_KEY].report is not None or run.journal is not None
    if run.any or (run.notes and asked):
        terminalreporter.section("libortho")
        for note in run.notes:
            terminalreporter.line(f"note: {note}")
    if run.any:
        for line in summary_lines(_results(run, config)):
            terminalreporter.line(line)
        terminalreporter.line("")
        if run.written:
            terminalreporter.line(f"results: {run.written}")
        if run.report:
            terminalreporter.line(f"report: {run.report}")
        for failure in run.failures:
            terminalreporter.line(failure, red=True)


# --- fixtures -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ortho_settings(pytestconfig: pytest.Config) -> Settings:
    """The settings of this run and their origins."""
    return pytestconfig.stash[SETTINGS_KEY]


@pytest.fixture(scope="session")
def run_results(pytestconfig: pytest.Config) -> RunResults:
    """Where cases leave what they measured."""
    return pytestconfig.stash[RESULTS_KEY]


@pytest.fixture(scope="session")
def ortho_device(ortho_settings: Settings, pytestconfig: pytest.Config) -> str:
    """The device of this run: `cpu`, `cuda` or `cuda:N`. Fails if it was asked for in vain."""
    device = hardware.resolve_device(ortho_settings.device)
    shared = why_no_shared_gpu(pytestconfig)
    if shared and device != "cpu":
        raise HardwareError(shared)
    return device


@pytest.fixture(scope="session")
def progress(pytestconfig: pytest.Config) -> Callable[[], AbstractContextManager[None]]:
    """`with progress():` shows progress bars on a terminal, which pytest would capture."""
    return lambda: visible_progress(pytestconfig)


@pytest.fixture(scope="session")
def compute_dtype(ortho_device: str, run_results: RunResults) -> Any:
    """Type of activations and composed weights, chosen for the device; the reason is noted."""
    dtype, reason = hardware.default_compute_dtype(ortho_device)
    run_results.compute_dtype = dtype_name(dtype)
    run_results.device_name = hardware.device_name(ortho_device)
    run_results.notes.append(f"computing in {dtype_name(dtype)}: {reason}")
    return dtype
