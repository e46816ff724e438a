"""The pytest plugin for other people's repositories: `ortho_audit`, its options, and gates.

Knows pytest, and of libortho only when to import it: at the first audit. The suite that measures
libortho itself has a plugin of its own, `libortho.plugin`, which its conftest names.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .gates import REQUIRE_GATE, gates_of
from .options import OPTIONS, Given, described, given

if TYPE_CHECKING:
    from libortho.audit_request import AuditedArtefact

    from .audits import Audits

FIXTURE = "ortho_audit"
SUITE = "libortho.plugin"
AUDITS_KEY: pytest.StashKey[Audits] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("libortho", "libortho: audits of separated models")
    group.addoption(
        REQUIRE_GATE,
        action="store_true",
        help="fail unless a gate ran: a session whose gates were all skipped, deselected or "
        "renamed is no success. A selected gate that is skipped, or never reached, fails it too. "
        f"Gates are the cases that use {FIXTURE} and those marked `gate`",
    )
    for option in OPTIONS:
        text = f"{option.help} [{option.default}] ({option.variable}, ini {option.ini})"
        text = text.replace("%", "%%")  # argparse formats it
        if option.takes_value:
            group.addoption(option.flag, default=None, metavar="VALUE", help=text)
        else:
            group.addoption(option.flag, action="store_const", const="true", help=text)
        parser.addini(option.ini, f"{option.help}; see {option.flag}", default="")
    if _in_the_suite():
        # Now and not by its conftest, because of options whose values are paths: its docstring.
        pluginmanager.import_plugin(SUITE)


def _in_the_suite() -> bool:
    """Whether pytest was started in a checkout of libortho, and takes the package from there."""
    spec = importlib.util.find_spec("libortho")
    if spec is None or spec.origin is None:
        return False
    root = Path(spec.origin).parents[1]
    return (root / "bench" / "conftest.py").exists() and Path.cwd().is_relative_to(root)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"gate: a case that a release depends on; {REQUIRE_GATE} fails a session in which none ran",
    )
    gates_of(config)


# --- what is said, and when ---------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What departs from the defaults; nothing in a repository that has said nothing."""
    if config.pluginmanager.hasplugin(SUITE):
        return []
    found = given_options(config)
    return _lines([text for text in described(found) if not text.endswith("(default)")])


def pytest_report_collectionfinish(
    config: pytest.Config, items: Sequence[pytest.Item]
) -> list[str]:
    """Every setting, once there is a case that uses them."""
    if config.option.verbose < 0 or not any(map(audits, items)):
        return []
    return _lines(described(given_options(config)))


def given_options(config: pytest.Config) -> dict[str, Given]:
    """The options that were given anywhere."""
    name = config.inipath.name if config.inipath else "ini file"
    return given(*option_sources(config), name)


def option_sources(config: pytest.Config) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """What stands on the command line by key, in the environment, and in the ini file by name."""
    line = {option.key: config.getoption(option.flag) for option in OPTIONS}
    ini = {option.ini: str(config.getini(option.ini)) for option in OPTIONS}
    return line, dict(os.environ), ini


def _lines(texts: Sequence[str]) -> list[str]:
    return ["libortho: " + ", ".join(texts[i : i + 4]) for i in range(0, len(texts), 4)]


# --- cases --------------------------------------------------------------------------------------


def audits(item: pytest.Item) -> bool:
    """Whether a case uses `ortho_audit`."""
    return FIXTURE in getattr(item, "fixturenames", ())


def pytest_itemcollected(item: pytest.Item) -> None:
    """A case that audits is a gate, so that `-m gate` finds it."""
    if audits(item) and item.get_closest_marker("gate") is None:
        item.add_marker(pytest.mark.gate)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """The library's errors as the paragraphs that they are, and none with values in its frames."""
    report = yield
    if audits(item) and call.excinfo is not None and "libortho" in sys.modules:
        from .audits import explain

        explain(report, call.excinfo)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    made = session.config.stash.get(AUDITS_KEY, None)
    if made is not None and not made.finish() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    made = config.stash.get(AUDITS_KEY, None)
    if made is not None and made.done:
        terminalreporter.section("libortho audits")
        for line in made.closing_lines():
            terminalreporter.line(line)
        for failure in made.failures:
            terminalreporter.line(failure, red=True)


# --- machines and terminals ---------------------------------------------------------------------


def why_no_shared_gpu(config: pytest.Config) -> str | None:
    """Why this process may not use a GPU, or None: it is one of several workers of pytest-xdist."""
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1))
    if workers < 2:
        return None
    return (
        f"pytest-xdist runs {workers} processes, and several on one card spoil each other's memory "
        "and times. Run GPU cases without -n (or with -n 1), or choose the CPU as the device."
    )


def visible_progress(config: pytest.Config) -> AbstractContextManager[Any]:
    """Inside the block progress bars reach a terminal, which pytest would capture."""
    manager: Any = config.pluginmanager.getplugin("capturemanager")
    terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
    return manager.global_and_fixture_disabled() if manager and terminal else nullcontext()


# --- the fixture --------------------------------------------------------------------------------


@pytest.fixture
def ortho_audit(
    pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> Callable[..., AuditedArtefact]:
    """`ortho_audit(folder, records=file).assert_private(min_ratio=8)`: an audit of an artefact.

    folder: what `libortho.save` wrote after tuning, with the private stream: without it there is
        nothing that alpha = 0 could be compared with
    records: file of the records that it was tuned on, with or without twins, or a `RecordSet`

    Further keywords go before the options: `model`, `corpus`, `attacks`, `relearn`, `seed`,
    `device`, `cache_dir`. Paths are relative to pytest's root folder. The answer is an
    `AuditedArtefact`; what is asked for twice in a session is measured once.
    """
    from .audits import Audits

    if AUDITS_KEY not in pytestconfig.stash:
        pytestconfig.stash[AUDITS_KEY] = Audits(pytestconfig)
    # What `record_property` appends to; of the default JUnit family that fixture warns.
    properties = request.node.user_properties
    return pytestconfig.stash[AUDITS_KEY].recorded_in(properties)
