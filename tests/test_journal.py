"""The journal: nothing measured is lost, nothing damaged is used, no run disturbs another."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_results import some

from libortho import journal as module
from libortho.attacks import DosePoint
from libortho.journal import EXPIRY_DAYS, Journal, made_now
from libortho.results import ArmResult, LossPoint

JOB = {"cases": ["test_one"], "settings": {"seed": "0"}}
KINDS = (ArmResult, tuple[LossPoint, ...], tuple[DosePoint, ...])


@dataclass(frozen=True)
class Figure:
    value: float
    parts: tuple[float, ...] = ()


def never() -> Any:
    raise AssertionError("it is measured although it was kept")


def opened(folder: Path, **changes: Any) -> Journal:
    return Journal(changes.pop("job", JOB), cache_dir=folder, **changes)


def interrupted(folder: Path, value: Any = Figure(2.5), kind: Any = Figure) -> None:
    """A run that measured one thing and was interrupted."""
    journal = opened(folder)
    assert journal.measured("one", kind, lambda: value, model="m") == value
    journal.close(finished=False)


def entry_in(folder: Path) -> Path:
    (path,) = (folder / "unfinished").rglob("*.json")
    return path


# --- what is taken over -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_what_was_measured_comes_back_as_it_was(kind: Any, data: st.DataObject) -> None:
    value = data.draw(some(kind))
    with tempfile.TemporaryDirectory() as folder:
        interrupted(Path(folder), value, kind)
        journal = opened(Path(folder))
        assert journal.measured("one", kind, never, model="m") == value
        assert list(journal.resumed) == ["one"]
        journal.close(finished=True)


def test_a_run_says_what_it_took_over_and_from_when(tmp_path: Path) -> None:
    interrupted(tmp_path)
    journal = opened(tmp_path)
    journal.measured("one", Figure, never, model="m")
    journal.measured("two", Figure, lambda: Figure(1.0))
    journal.close(finished=True)
    (note,) = journal.notes
    made = journal.resumed["one"]
    assert made.endswith("+00:00")
    assert note.startswith(f"resumed from an interrupted run, measured {made}: one. ")
    assert "--fresh" in note


def test_a_finished_run_leaves_nothing_behind(tmp_path: Path) -> None:
    interrupted(tmp_path)
    opened(tmp_path).close(finished=True)
    assert list((tmp_path / "unfinished").iterdir()) == []
    journal = opened(tmp_path)
    assert journal.measured("one", Figure, lambda: Figure(3.0), model="m") == Figure(3.0)
    assert journal.resumed == {}
    journal.close(finished=True)
    assert journal.notes == []


def test_an_unfinished_run_says_that_it_can_be_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path)
    journal = opened(tmp_path)
    journal.measured("one", Figure, never, model="m")
    journal.measured("two", Figure, lambda: Figure(1.0))
    journal.close(finished=False)
    assert journal.notes[-1].startswith("this run did not finish; measurements kept")
    assert journal.notes[-1].endswith(": 2")
    last = opened(tmp_path)
    assert last.measured("one", Figure, never, model="m") == Figure(2.5)
    assert last.measured("two", Figure, never) == Figure(1.0)
    last.close(finished=True)


def test_fresh_begins_anew_and_is_kept_itself(tmp_path: Path) -> None:
    interrupted(tmp_path)
    journal = opened(tmp_path, fresh=True)
    assert journal.measured("one", Figure, lambda: Figure(3.0), model="m") == Figure(3.0)
    journal.close(finished=False)
    last = opened(tmp_path)
    assert last.measured("one", Figure, never, model="m") == Figure(3.0)
    last.close(finished=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_measurement_that_fails_is_not_kept(tmp_path: Path, error: type[BaseException]) -> None:
    def fails() -> Figure:
        raise error

    journal = opened(tmp_path)
    with pytest.raises(error):
        journal.measured("one", Figure, fails)
    journal.close(finished=False)
    last = opened(tmp_path)
    assert last.measured("one", Figure, lambda: Figure(1.0)) == Figure(1.0)
    last.close(finished=True)


def test_the_seconds_are_those_of_the_measurement(tmp_path: Path) -> None:
    def slow() -> Figure:
        time.sleep(0.05)
        return Figure(1.0)

    first = opened(tmp_path)
    _, seconds = first.timed("one", Figure, slow)
    first.close(finished=False)
    last = opened(tmp_path)
    assert last.timed("one", Figure, never) == (Figure(1.0), seconds)
    last.close(finished=True)
    assert seconds >= 0.05
    assert made_now("one", Figure, slow)[1] >= 0.05


# --- what is not taken over ---------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]] = {
    "a setting": lambda *_: {"job": JOB | {"settings": {"seed": "1"}}},
    "the cases": lambda *_: {"job": JOB | {"cases": ["test_one", "test_two"]}},
    "a name": lambda *_: {"name": "two"},
    "what it is about": lambda *_: {"model": "n"},
    "the code that measures": lambda folder, _: {"code": [_code(folder, "def measure(): 2")]},
    "a package": lambda _, patch: patch.setattr(module, "_environment", lambda: ["torch 9"]) or {},
}


def _code(folder: Path, text: str) -> Path:
    (folder / "code" / "inner").mkdir(parents=True, exist_ok=True)
    (folder / "code" / "inner" / "measure.py").write_text(text)
    return folder / "code"


@pytest.mark.parametrize("change", [*CHANGES, "nothing"])
def test_whatever_could_change_a_measurement_has_it_made_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [_code(tmp_path, "def measure(): 1")]
    first = opened(tmp_path, code=code)
    first.measured("one", Figure, lambda: Figure(1.0), model="m")
    first.close(finished=False)
    changes = {"code": code} | CHANGES.get(change, lambda *_: {})(tmp_path, monkeypatch)
    name, model = changes.pop("name", "one"), changes.pop("model", "m")
    last = opened(tmp_path, **changes)
    found = last.measured(name, Figure, lambda: Figure(2.0), model=model)
    last.close(finished=True)
    assert found == Figure(1.0 if change == "nothing" else 2.0)


@settings(max_examples=20)
@given(data=st.data())
def test_a_truncated_entry_is_named_and_not_used(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        interrupted(Path(folder))
        path = entry_in(Path(folder))
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        journal = opened(Path(folder))
        found = journal.measured("one", Figure, lambda: Figure(3.0), model="m")
        journal.close(finished=True)
    assert found == Figure(3.0)
    assert journal.notes[0].startswith("kept and damaged, so measured anew: one")
    assert journal.resumed == {}


@settings(max_examples=30)
@given(data=st.data())
def test_no_damaged_byte_becomes_a_figure(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        interrupted(Path(folder), Figure(1 / 3, (0.25, 1e-7)))
        path = entry_in(Path(folder))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        journal = opened(Path(folder))
        found = journal.measured("one", Figure, lambda: Figure(9.0), model="m")
        journal.close(finished=True)
    # A flip in the space between values changes nothing.
    assert found == (Figure(1 / 3, (0.25, 1e-7)) if journal.resumed else Figure(9.0))


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"value": 1}', "[" * 100_000])
def test_what_is_no_entry_is_not_used(text: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    entry_in(tmp_path).write_text(text)
    journal = opened(tmp_path)
    assert journal.measured("one", Figure, lambda: Figure(3.0), model="m") == Figure(3.0)
    journal.close(finished=False)
    assert "measured anew: one" in journal.notes[0]
    # It was replaced.
    last = opened(tmp_path)
    assert last.measured("one", Figure, never, model="m") == Figure(3.0)
    last.close(finished=True)


def test_an_entry_in_the_place_of_another_is_not_used(tmp_path: Path) -> None:
    interrupted(tmp_path)
    first = entry_in(tmp_path)
    journal = opened(tmp_path)
    journal.measured("one", Figure, lambda: Figure(4.0), model="n")
    (other,) = (p for p in first.parent.iterdir() if p != first)
    other.write_bytes(first.read_bytes())
    journal.close(finished=False)
    last = opened(tmp_path)
    assert last.measured("one", Figure, lambda: Figure(4.0), model="n") == Figure(4.0)
    assert last.resumed == {}
    last.close(finished=True)


def test_what_cannot_be_kept_is_measured_all_the_same(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    assert journal.measured("one", Figure, lambda: Figure(math.inf)) == Figure(math.inf)
    (tmp_path / "unfinished" / "occupied").write_text("")
    journal._folder = tmp_path / "unfinished" / "occupied"  # no folder: nothing can be written
    assert journal.measured("two", Figure, lambda: Figure(1.0)) == Figure(1.0)
    notes = list(journal.notes)
    journal.close(finished=True)
    assert [note.partition(" (")[0] for note in notes] == [
        "not kept for a later run: one",
        "not kept for a later run: two",
    ]


# --- whose it is --------------------------------------------------------------------------------


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    interrupted(tmp_path)
    first, second = opened(tmp_path), opened(tmp_path)
    assert (first.held, second.held) == (True, False)
    assert second.notes == [
        "another run of the same job is in progress: this one measures everything itself, and "
        "could not be resumed"
    ]
    assert second.measured("one", Figure, lambda: Figure(5.0), model="m") == Figure(5.0)
    second.close(finished=True)
    assert first.measured("one", Figure, never, model="m") == Figure(2.5)
    assert first.measured("two", Figure, lambda: Figure(1.0)) == Figure(1.0)
    first.close(finished=False)
    last = opened(tmp_path)
    assert last.held
    assert last.measured("two", Figure, never) == Figure(1.0)
    last.close(finished=True)


def test_another_job_has_a_journal_of_its_own(tmp_path: Path) -> None:
    interrupted(tmp_path)
    other = opened(tmp_path, job={"cases": ["another"]})
    assert other.held
    other.close(finished=True)
    journal = opened(tmp_path)
    assert journal.measured("one", Figure, never, model="m") == Figure(2.5)
    journal.close(finished=True)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_killed_run_lets_go_of_its_journal(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        try:
            opened(tmp_path).measured("one", Figure, lambda: Figure(7.0))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    journal = opened(tmp_path)
    assert journal.measured("one", Figure, never) == Figure(7.0)
    journal.close(finished=True)


def test_a_journal_that_nobody_resumes_expires(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (lock,) = (tmp_path / "unfinished").glob("*.lock")
    now = lock.stat().st_mtime
    for days, left in ((EXPIRY_DAYS - 1, True), (EXPIRY_DAYS + 1, False)):
        os.utime(lock, (now, now - days * 24 * 60 * 60))
        opened(tmp_path, job={"cases": ["another"]}).close(finished=True)
        assert bool(list((tmp_path / "unfinished").rglob("*.json"))) == left
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_journal_that_is_held_does_not_expire(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.measured("one", Figure, lambda: Figure(1.0))
    (lock,) = (tmp_path / "unfinished").glob("*.lock")
    os.utime(lock, (0, 0))
    opened(tmp_path, job={"cases": ["another"]}).close(finished=True)
    assert entry_in(tmp_path).exists()
    journal.close(finished=True)


def test_a_journal_tells_no_setting(tmp_path: Path) -> None:
    job = {"settings": {"records": "/home/of/someone/secrets.jsonl"}}
    journal = opened(tmp_path, job=job)
    journal.measured("one", Figure, lambda: Figure(1.0), records="a-fingerprint")
    assert journal.held
    files = [p for p in (tmp_path / "unfinished").rglob("*") if p.is_file()]
    told = "".join(str(p) + p.read_text() for p in files).replace(str(tmp_path), "")
    assert "someone" not in told
    assert "a-fingerprint" not in told
    assert set(json.loads(entry_in(tmp_path).read_text())) == {
        "name",
        "made",
        "seconds",
        "value",
        "sha256",
    }
    journal.close(finished=True)
