"""The example repository with libortho from a built wheel: its workflow's steps, run as they are.

An environment of its own holds everything that this one does, but for libortho, which the
workflow's own step installs from the wheel. What GitHub would do is done here: secrets and
`GITHUB_STEP_SUMMARY` are set, steps run in bash in their order, and after a failure those alone
whose condition says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ET
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from libortho.results import read_results
from libortho.settings import AUDIT_SETTINGS

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "privacy-gate"
WORKFLOW = Path(".github/workflows/privacy.yml")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)
MINUTES = 3

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="the workflow runs in bash"
)


def check_call(*command: str | Path, cwd: Path, **more: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the whole tree and some things that it must not take."""
    source = tmp_path_factory.mktemp("source") / "libortho"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    for stray in (".gpu/kernels.json", "data/records.jsonl", "results/run.json"):
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).write_text("{}")
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out)
    check_call(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with all that this one has, but for libortho; its folder."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (there,) = (folder / "lib").glob("python*/site-packages")
    for place in places:
        for path in Path(place).iterdir():
            ours = re.match(r"(__editable__\W+)?_*libortho", path.name)
            if not ours and not (there / path.name).exists():
                (there / path.name).symlink_to(path)
    return folder


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    (facts,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"libortho", "libortho_pytest", facts}
    inside = [name for name in names if not name.startswith(facts)]
    odd = [n for n in inside if not n.endswith(".py") and "/report/templates/" not in n]
    assert odd == ["libortho/py.typed"]
    for package in ("libortho", "libortho_pytest"):
        sources = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert sources == {name for name in inside if name.startswith(f"{package}/")}


Done = dict[str, "subprocess.CompletedProcess[str]"]
"""Steps that ran, by name."""


class Repository(NamedTuple):
    """A scratch copy of the example, and what its workflow's steps are given."""

    folder: Path
    environment: dict[str, str]
    secrets: dict[str, str]

    def step(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Run a step's command in GitHub's default shell, its secrets filled in."""
        given = {}
        for name, value in step.get("env", {}).items():
            found = re.fullmatch(r"\$\{\{ secrets\.(\w+) \}\}", value)
            assert found, f"{name}: {value}"
            given[name] = self.secrets[found[1]]
        return subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=self.folder,
            env=self.environment | given,
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )

    def job(self, steps: list[dict[str, Any]]) -> Done:
        """Run steps in their order; after a failure those that run unless cancelled."""
        done: Done = {}
        for step in steps:
            failed = any(finished.returncode for finished in done.values())
            if not failed or step.get("if") == "${{ !cancelled() }}":
                done[step["name"]] = self.step(step)
        return done


def workflow() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLE / WORKFLOW).read_text(encoding="utf-8"))


def steps() -> list[dict[str, Any]]:
    """The steps that are commands."""
    return [step for step in workflow()["jobs"]["audit"]["steps"] if "run" in step]


@pytest.fixture(scope="module")
def repositories(
    tmp_path_factory: pytest.TempPathFactory, shelf: Path, wheel: Path, environment: Path
) -> dict[str, Repository]:
    """For each artefact the example, with the tiny model's names in place of the ini file's."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for setting in AUDIT_SETTINGS:
        known.pop(setting.variable, None)
    made = {}
    for artefact in ("full", "leaky"):
        place = tmp_path_factory.mktemp(artefact)
        folder = shutil.copytree(EXAMPLE, place / "repository")
        for name in ("plain", "public.txt"):
            (folder / name).symlink_to(shelf / name)
        # `hf download REPOSITORY --local-dir FOLDER`, from a folder instead of the network.
        (place / "bin").mkdir()
        hub = f'test "$HF_TOKEN" = a-token && cp -r "{shelf / artefact}" "$4"'
        (place / "bin" / "hf").write_text(f"#!/bin/sh\n{hub}\n")
        (place / "bin" / "hf").chmod(0o755)
        given = {
            "PATH": os.pathsep.join(
                [*map(str, (place / "bin", environment / "bin")), known["PATH"]]
            ),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheel.parent),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "GITHUB_STEP_SUMMARY": str(place / "summary.md"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # two jobs at once, on little
            "LIBORTHO_MODEL": "plain",
            "LIBORTHO_CORPUS": "public.txt",
            "LIBORTHO_DEVICE": "cpu",
            "LIBORTHO_CACHE_DIR": "cache",
        }
        secrets = {"HF_TOKEN": "a-token", "LIBORTHO_RECORDS": (shelf / "records.jsonl").read_text()}
        made[artefact] = Repository(folder, known | given, secrets)
    return made


@pytest.fixture(scope="module")
def jobs(repositories: dict[str, Repository]) -> dict[str, Done]:
    """The workflow's steps of both repositories; the first installs for both."""
    install, *others = steps()
    finished = repositories["full"].step(install)
    assert finished.returncode == 0, finished.stderr
    with ThreadPoolExecutor() as pool:  # each waits for its processes
        ran = pool.map(lambda repository: repository.job(others), repositories.values())
        return dict(zip(repositories, ran, strict=True))


def test_the_workflow_is_one_that_github_takes() -> None:
    described = workflow()
    assert set(described) == {"name", True, "permissions", "concurrency", "jobs"}  # True: "on"
    assert "pull_request" not in described[True]  # which would have no secrets
    assert described["permissions"] == {"contents": "read"}
    for step in described["jobs"]["audit"]["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
    names = ["Install", "Fetch the artefact", "Write the records", "Gate", "Summary"]
    assert [step["name"] for step in steps()] == names


def test_the_examples_settings_are_known_ones() -> None:
    written = set(re.findall(r"^(libortho_\w+)", (EXAMPLE / "pytest.ini").read_text(), re.M))
    assert written
    assert written <= {setting.ini for setting in AUDIT_SETTINGS}


@pytest.mark.parametrize(
    ("artefact", "verdict", "sign"),
    [("full", "private by construction", "✅ **Passes"), ("leaky", "leaks", "❌ **Fails")],
)
def test_the_workflow_gates_and_shows_its_summary(
    artefact: str,
    verdict: str,
    sign: str,
    jobs: dict[str, Done],
    repositories: dict[str, Repository],
) -> None:
    done, repository = jobs[artefact], repositories[artefact]
    told = {name: finished.stdout + finished.stderr for name, finished in done.items()}
    leaks = verdict == "leaks"
    codes = {name: finished.returncode for name, finished in done.items()}
    assert codes == dict.fromkeys(codes, 0) | {"Gate": int(leaks)}, told
    assert list(done) == [step["name"] for step in steps()[1:]]

    assert f"1 {'failed' if leaks else 'passed'}" in told["Gate"]
    assert "PytestAssertRewriteWarning" not in told["Gate"]
    (junit,) = ET.parse(repository.folder / "results" / "junit.xml").iter("testcase")
    properties = {p.get("name"): p.get("value") for p in junit.iter("property")}
    assert properties["libortho.verdict"] == verdict
    (path,) = (repository.folder / "results").glob("*.json")
    assert [audit.verdict for audit in read_results(path).audits] == [verdict]

    summary = Path(repository.environment["GITHUB_STEP_SUMMARY"]).read_text(encoding="utf-8")
    assert sign in summary
    for shown in (summary, *told.values(), path.read_text()):
        assert "Door" not in shown


def test_the_environment_satisfies_the_wheels_requirements(
    jobs: dict[str, Done], repositories: dict[str, Repository], environment: Path
) -> None:
    repository = repositories["full"]
    assert jobs
    where = repository.step({"run": "python -c 'import libortho_pytest as p; print(p.__file__)'"})
    assert Path(where.stdout.strip()).is_relative_to(environment)
    checked = repository.step({"run": "python -m pip check || true"})
    assert checked.stdout
    # Other packages of this environment may disagree among themselves.
    assert not [line for line in checked.stdout.splitlines() if line.startswith("libortho ")]
