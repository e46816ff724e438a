"""Gates: cases that a release depends on, and whether they really ran.

Knows pytest's items and reports, and no measurement. To pytest a session whose cases were all
skipped is a success; a gate that was asked for and did not run is none.

Reports are told by a mark of their own, because under xdist the process that decides about the exit
status has seen no items.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

REQUIRE_GATE = "--require-gate"
_MARK = "libortho_gate"


class Gates:
    """A plugin that keeps the session's gates; `gates_of` finds it.

    strict: a selected gate that does not run turns the session red
    required: and so does a session in which none ran
    """

    def __init__(self, *, required: bool) -> None:
        self.required = self.strict = required
        self.ran: set[str] = set()
        self.missing: dict[str, str] = {}
        self.deselected: list[str] = []

    @property
    def are_missing(self) -> bool:
        """Whether this session can't be green."""
        return bool(self.strict and self.missing) or (self.required and not self.ran)

    # --- which there are ------------------------------------------------------------------------

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items if item.get_closest_marker("gate")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if item.get_closest_marker("gate"):
                self.missing[item.nodeid] = "was not reached"

    # --- what becomes of them -------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        if item.get_closest_marker("gate"):
            setattr(report, _MARK, True)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not getattr(report, _MARK, False) or report.nodeid in self.ran:
            return
        if report.when == "call" and not report.skipped:
            self.ran.add(report.nodeid)  # its own outcome counts
            self.missing.pop(report.nodeid, None)
        elif report.skipped:
            self.missing[report.nodeid] = _why_skipped(report)
        elif report.failed:
            self.missing[report.nodeid] = f"failed in {report.when}"

    # --- what follows ---------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if session.config.option.collectonly or hasattr(session.config, "workerinput"):
            self.required = self.strict = False
        quiet = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.are_missing and exitstatus in quiet:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.are_missing:
            terminalreporter.section("gates that did not run", red=True)
            for nodeid, reason in self.missing.items():
                terminalreporter.line(f"{nodeid}: {reason}", red=True)
            self._say_deselected(terminalreporter)
            if not self.missing and not self.deselected:
                terminalreporter.line(
                    f"{REQUIRE_GATE}: no case is marked as a gate or uses ortho_audit.", red=True
                )
            terminalreporter.line("A gate that was asked for and did not run is not a passed gate.")
        elif self.required and self.deselected:
            terminalreporter.section("gates that were deselected")
            self._say_deselected(terminalreporter)

    def _say_deselected(self, terminalreporter: Any) -> None:
        for nodeid in self.deselected:
            terminalreporter.line(f"{nodeid}: was deselected", yellow=True)


_KEY = pytest.StashKey[Gates]()


def gates_of(config: pytest.Config) -> Gates:
    """The session's gates; the first to ask makes pytest call them, whichever plugin that is."""
    if _KEY not in config.stash:
        config.stash[_KEY] = Gates(required=config.getoption(REQUIRE_GATE))
        config.pluginmanager.register(config.stash[_KEY], "libortho gates")
    return config.stash[_KEY]


def _why_skipped(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"is expected to fail: {report.wasxfail}"
    reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else report.longrepr
    return str(reason).removeprefix("Skipped: ")
