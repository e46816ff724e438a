"""The store: nothing is made twice, and nothing is reused that could differ."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import artifact, store
from libortho.config import SeparationConfig, TuningConfig
from libortho.corpora import Split
from libortho.errors import OrthoError
from libortho.files import alone
from libortho.models import resolve_model
from libortho.records import Record, RecordSet
from libortho.store import Stored

TUNING = TuningConfig(
    density=0.1, slots="magnitude", steps=2, lr=2e-2, replay_window=32, records_per_step=2
)


def records(secret: str = " 4917", seed: int = 0) -> RecordSet:
    return RecordSet(
        (Record("a", "The door opens to", secret, "codes"),),
        (Record("b", "The gate opens to", " 5522", "codes"),),
        seed,
        "test",
    )


@dataclass
class Bench:
    """A tiny model on disk, and a store whose work is counted."""

    folder: Path
    cache: Path
    text: list[str]
    recipe: SeparationConfig
    calls: dict[str, int] = field(
        default_factory=lambda: {"separate_checkpoint": 0, "tune_private": 0}
    )

    def separated(
        self,
        folder: Path | None = None,
        text: list[str] | None = None,
        recipe: SeparationConfig | None = None,
    ) -> Stored:
        return store.separated(
            resolve_model(folder or self.folder, self.cache),
            Split.of("calibration", "test", text or self.text),
            recipe or self.recipe,
            device="cpu",
            cache_dir=self.cache,
        )

    def tuned(
        self,
        base: Path,
        planted: RecordSet | None = None,
        text: list[str] | None = None,
        config: TuningConfig = TUNING,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Stored, dict[str, Any]]:
        return store.tuned(
            base,
            planted or records(),
            Split.of("replay", "test", text or self.text),
            config,
            compute_dtype=dtype,
            device="cpu",
            cache_dir=self.cache,
        )

    def artefacts(self) -> list[str]:
        return sorted(p.name for p in (self.cache / "artefacts").iterdir() if p.is_dir())


@pytest.fixture
def bench(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    folder = tmp_path / "tiny"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = Bench(folder, tmp_path / "cache", public_text, small_separation)

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.calls[name] += 1
            return real(*args, **kwargs)

        return call

    for name in made.calls:
        monkeypatch.setattr(store, name, counted(name))
    return made


def test_the_second_call_makes_nothing(bench: Bench) -> None:
    first = bench.separated()
    made, report = bench.tuned(first.folder)
    assert (first.reused, made.reused) == (False, False)
    assert bench.calls == {"separate_checkpoint": 1, "tune_private": 1}

    again = bench.separated()
    remade, remembered = bench.tuned(again.folder)
    assert (again, remade) == (Stored(first.folder, True), Stored(made.folder, True))
    assert bench.calls == {"separate_checkpoint": 1, "tune_private": 1}
    assert remembered["curve"] == [dict(point) for point in report["curve"]]
    assert TuningConfig.from_dict(remembered["config"]) == TUNING
    assert artifact.base_fingerprint(made.folder) == artifact.base_fingerprint(first.folder)


def test_of_two_that_want_the_same_one_waits(bench: Bench, tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> str:
        with alone(tmp_path / "made"):
            if not (tmp_path / "made").exists():
                made.append(name)
                time.sleep(0.2)
                (tmp_path / "made").mkdir()
            return name

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(make, "abcd")) == list("abcd")
        assert len(made) == 1
        stored = list(pool.map(lambda _: bench.separated(), range(3)))
    assert len({s.folder for s in stored}) == 1
    assert sorted(s.reused for s in stored) == [False, True, True]
    assert bench.calls["separate_checkpoint"] == 1


def test_whatever_changes_the_base_changes_its_key(
    bench: Bench,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    other = tmp_path / "elsewhere" / "tiny"  # another model of the same name
    tiny_model(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    first = bench.separated()
    changed = [
        bench.separated(recipe=replace(bench.recipe, bits=8)),
        bench.separated(recipe=replace(bench.recipe, residual_density=0.05)),
        bench.separated(text=bench.text[1:]),
        bench.separated(folder=other),
    ]
    assert not any(stored.reused for stored in changed)
    assert len({first.folder, *(stored.folder for stored in changed)}) == 5
    assert bench.separated().folder == first.folder


def test_a_model_that_was_moved_is_the_same_model(bench: Bench, tmp_path: Path) -> None:
    first = bench.separated()
    (tmp_path / "elsewhere").mkdir()
    bench.folder.rename(tmp_path / "elsewhere" / "tiny")
    assert bench.separated(folder=tmp_path / "elsewhere" / "tiny") == Stored(first.folder, True)


def test_whatever_changes_the_stream_changes_its_key(bench: Bench) -> None:
    base = bench.separated().folder
    other_base = bench.separated(recipe=replace(bench.recipe, bits=8)).folder
    first, _ = bench.tuned(base)
    changed = [
        bench.tuned(base, records(" 4918")),
        bench.tuned(base, records(seed=1)),
        bench.tuned(base, text=bench.text[1:]),
        bench.tuned(base, config=replace(TUNING, seed=1)),
        bench.tuned(base, config=replace(TUNING, steps=3)),
        bench.tuned(base, dtype=torch.bfloat16),
        bench.tuned(other_base),
    ]
    assert not any(stored.reused for stored, _ in changed)
    assert len({first.folder, *(stored.folder for stored, _ in changed)}) == 8


def test_no_name_in_the_cache_tells_a_secret(bench: Bench) -> None:
    bench.tuned(bench.separated().folder)
    for path in bench.cache.rglob("*"):
        assert "4917" not in path.name
        if path.suffix == ".json" and "tuned" in path.name:
            assert "4917" not in path.read_text()
            assert "The door" not in path.read_text()


@pytest.mark.parametrize("stage", ["tune_private", "save_file"])
def test_an_interrupted_tuning_leaves_nothing_that_is_taken_for_an_artefact(
    stage: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bench.separated().folder
    before = bench.artefacts()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store if stage == "tune_private" else artifact, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.tuned(base)
    assert bench.artefacts() == before
    made, report = bench.tuned(base)
    assert not made.reused
    assert report["records"] == 1
    artifact.load(made.folder)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_killed_save_leaves_nothing_that_is_taken_for_an_artefact(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"the first blocks")
        os.kill(os.getpid(), signal.SIGKILL)

    first = bench.separated().folder
    expected = artifact.base_fingerprint(first)
    model, _ = artifact.load(first)
    shutil.rmtree(first)
    child = os.fork()
    if not child:
        monkeypatch.setattr(artifact, "save_file", killed)
        try:
            artifact.save(model, first)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = (bench.cache / "artefacts").glob(".*.tmp")
    assert left.name.endswith(".tmp")

    again = bench.separated()
    assert again == Stored(first, reused=False)
    assert artifact.base_fingerprint(first) == expected
    artifact.load(first)

    # A writer may still be busy with what is young; what is old takes room for nothing.
    assert left.exists()
    os.utime(left, (0, 0))
    bench.tuned(first)
    assert not left.exists()


def test_what_is_handed_out_is_written_once_and_without_the_stream(bench: Bench) -> None:
    full, _ = bench.tuned(bench.separated().folder)
    first = store.exported(full.folder, cache_dir=bench.cache)
    again = store.exported(full.folder, cache_dir=bench.cache)
    assert (first.reused, again) == (False, Stored(first.folder, True))
    assert not (first.folder / artifact.PRIVATE_FILE).exists()
    assert artifact.base_fingerprint(first.folder) == artifact.base_fingerprint(full.folder)
    # Another stream on the same base is exported from its own model, and not taken for this one.
    other, _ = bench.tuned(bench.separated().folder, records(" 4918"))
    assert store.exported(other.folder, cache_dir=bench.cache).folder != first.folder


def test_a_place_is_for_one_thing(tmp_path: Path) -> None:
    def place(code: str = "stream", library: str = "numpy", **determined_by: Any) -> Path:
        return store.place(
            "a/b", code=(code,), libraries=(library,), cache_dir=tmp_path, **determined_by
        )

    places = [
        place(model="m"),
        place(model="n"),
        place(model="m", seed=1),
        place("methods/kfac", model="m"),
        place(library="scipy", model="m"),
    ]
    assert len(set(places)) == 5
    assert place(model="m") == places[0]
    assert {p.parent for p in places} == {tmp_path / "artefacts"}
    assert store.recall(places[0]) is None
    store.remember(places[0], {"loss": 0.5})
    assert store.recall(places[0]) == {"loss": 0.5}
    assert store.recall(places[1]) is None
    assert not places[0].exists()


def test_an_altered_artefact_is_refused_and_not_used(bench: Bench) -> None:
    base = bench.separated().folder
    content = bytearray((base / artifact.BASE_FILE).read_bytes())
    content[-5] ^= 1
    (base / artifact.BASE_FILE).write_bytes(content)
    with pytest.raises(OrthoError, match="altered"):
        bench.tuned(base)


def test_losses_are_remembered_for_equal_conditions_only(tmp_path: Path) -> None:
    made = []

    def remember(losses: list[float], **conditions: Any) -> tuple[list[float], bool]:
        def make() -> list[float]:
            made.append(losses)
            return losses

        return store.remembered_losses(make, cache_dir=tmp_path, **conditions)

    assert remember([1.5, 1 / 3], model="a", windows=[50, 512]) == ([1.5, 1 / 3], False)
    assert remember([9.0], model="a", windows=[50, 512]) == ([1.5, 1 / 3], True)
    assert remember([2.0], model="a", windows=[50, 256]) == ([2.0], False)
    assert remember([3.0], model="b", windows=[50, 512]) == ([3.0], False)
    assert made == [[1.5, 1 / 3], [2.0], [3.0]]


def test_the_salt_is_random_lasting_and_private(tmp_path: Path) -> None:
    salt = store.record_salt(tmp_path / "one")
    assert len(salt) == 16
    assert store.record_salt(tmp_path / "one") == salt
    assert store.record_salt(tmp_path / "two") != salt
    mode = (tmp_path / "one" / "record_salt").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
