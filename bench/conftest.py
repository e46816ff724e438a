"""What the experiments share: model, text, records, and the artefacts made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import libortho
from bench.arms import Arms, Progress, Tuned, arms_of
from bench.plan import Plan, plan_of
from libortho import hardware, profiles, store
from libortho.artifact import separation_of
from libortho.config import SeparationConfig, TuningConfig
from libortho.corpora import Corpus
from libortho.errors import OrthoError, RecordError
from libortho.journal import Journal
from libortho.methods import METHODS
from libortho.models import ResolvedModel, native_grid, resolve_model
from libortho.plugin import SETTINGS_KEY, RunResults
from libortho.precision import dtype_name
from libortho.profiles import Profile
from libortho.records import RecordSet
from libortho.settings import Settings
from libortho.verdict import check_informative


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases over arms: the ones that exist at the run's number of bits."""
    if "arm" in metafunc.fixturenames:
        settings = metafunc.config.stash[SETTINGS_KEY]
        try:
            bits = plan_of(settings).bits
        except OrthoError:  # the fixture will say so
            bits = settings.quantization_bits
        metafunc.parametrize("arm", arms_of(bits), scope="module")  # one load serves all cases
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", _methods(metafunc.config.stash[SETTINGS_KEY]))


ASKED_FOR = {"audit": "test_audit", "gpu": "test_runtime"}
"""Marks, and files of this folder, whose cases take long: they run when one of the two is named."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop an audit, and timings that need a card, unless they are asked for."""
    named = " ".join(config.args)
    unasked = {
        Path(__file__).with_name(f"{file}.py")
        for mark, file in ASKED_FOR.items()
        if mark not in config.option.markexpr and file not in named
    }
    dropped = [item for item in items if item.path in unasked]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.path not in unasked]


def _methods(settings: Settings) -> list[str]:
    """What is audited; the first is what the gates judge."""
    if settings.checkpoint is not None:
        return ["checkpoint"]
    if settings.public_model or settings.private_model:
        return ["pair"]
    return list(METHODS) if settings.method == "all" else [settings.method]


@pytest.fixture(scope="session")
def audited(ortho_settings: Settings) -> str:
    """The method that the gates of an audit judge: the only one, or our own."""
    return _methods(ortho_settings)[0]


class Brought(NamedTuple):
    """What the user's own files hold: None where none were given."""

    records: RecordSet | None
    separation: SeparationConfig | None


@pytest.fixture(scope="session")
def brought(ortho_settings: Settings) -> Brought:
    """The user's files, read before anything is fetched or computed: a mistake shows at once."""
    records = None
    if ortho_settings.records is not None:
        records = libortho.load_records(ortho_settings.records, seed=ortho_settings.seed)
        if len(records.planted) < 2 or not records.twins:
            raise RecordError(
                f"{Path(ortho_settings.records).name} has {len(records.planted)} planted records "
                f"and {len(records.twins)} twins. Intervals need at least 2 records and a twin; a "
                "ratio of 8 needs 28."
            )
    separation = None
    if ortho_settings.checkpoint is not None:
        separation = separation_of(ortho_settings.checkpoint)
    return Brought(records, separation)


@pytest.fixture(scope="session")
def profile(ortho_settings: Settings) -> Profile:
    return profiles.get_profile(ortho_settings.profile)


@pytest.fixture(scope="session")
def device(ortho_device: str, profile: Profile, run_results: RunResults) -> str:
    """The run's device, its memory capped at the profile's."""
    run_results.notes.append(profiles.enforce(profile, ortho_device))
    return ortho_device


@pytest.fixture(scope="session")
def plan(brought: Brought, device: str, ortho_settings: Settings, run_results: RunResults) -> Plan:
    """Model and bits; what differs from the request is among the run's notes."""
    settled = plan_of(ortho_settings)
    run_results.notes += settled.notes
    return settled


@pytest.fixture(scope="session")
def resolved(plan: Plan, ortho_settings: Settings) -> ResolvedModel:
    return resolve_model(plan.model, ortho_settings.cache_dir)


@pytest.fixture(scope="session")
def corpus(brought: Brought, ortho_settings: Settings) -> Corpus:
    return libortho.load_corpus(ortho_settings.corpus, cache_dir=ortho_settings.cache_dir)


@pytest.fixture(scope="session")
def records(
    brought: Brought, ortho_settings: Settings, profile: Profile, corpus: Corpus
) -> RecordSet:
    """Planted records and their twins: the user's, or codes and passages."""
    if brought.records is not None:
        return brought.records
    n = ortho_settings.canaries or profile.canaries_per_family
    return libortho.make_default_records(n, ortho_settings.seed, corpus.passages)


NOT_THE_JOB = ("cache_dir", "results_dir", "report", "fresh")
"""Settings that change nothing of what is measured."""


@pytest.fixture(scope="session")
def journal(
    request: pytest.FixtureRequest,
    ortho_settings: Settings,
    device: str,
    compute_dtype: torch.dtype,
    run_results: RunResults,
) -> Journal:
    """Holds what an interrupted run of this job has measured, and keeps what this one does."""
    settings = {k: str(v) for k, v in ortho_settings.values.items() if k not in NOT_THE_JOB}
    run_results.journal = Journal(
        {
            "cases": sorted(item.nodeid for item in request.session.items),
            "settings": settings,
            "device": [device, hardware.device_name(device), hardware.cpu_facts().model],
            "threads": torch.get_num_threads(),
            "compute": dtype_name(compute_dtype),
        },
        code=[Path(__file__).parent],
        cache_dir=ortho_settings.cache_dir,
        fresh=ortho_settings.fresh,
    )
    return run_results.journal


@pytest.fixture(scope="session")
def separation(brought: Brought, plan: Plan, resolved: ResolvedModel) -> SeparationConfig:
    """The recipe for the base; that of the checkpoint if one is audited."""
    config = brought.separation or SeparationConfig(
        bits=plan.recipe.bits,
        group_size=plan.recipe.group_size,
        residual_density=plan.recipe.residual_density,
        head_bits=plan.recipe.head_bits,
    )
    check_informative(config, native_grid(resolved))
    return config


@pytest.fixture(scope="session")
def tuned(
    ortho_settings: Settings,
    resolved: ResolvedModel,
    corpus: Corpus,
    records: RecordSet,
    separation: SeparationConfig,
    plan: Plan,
    device: str,
    compute_dtype: torch.dtype,
    run_results: RunResults,
    progress: Progress,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tuned:
    """The artefacts: from the cache, or made now; the base is exported anew and is what counts."""
    cache_dir = ortho_settings.cache_dir
    with progress():
        base = store.separated(
            resolved, corpus.calibration, separation, device=device, cache_dir=cache_dir
        )
    report: dict[str, Any] = {}
    if ortho_settings.checkpoint is not None:
        full = Path(ortho_settings.checkpoint)
    else:
        with progress():
            made, report = store.tuned(
                base.folder,
                records,
                corpus.replay,
                TuningConfig(seed=ortho_settings.seed, density=plan.recipe.private_density),
                compute_dtype=compute_dtype,
                device=device,
                cache_dir=cache_dir,
            )
        full = made.folder
        reused = [
            text for text, flag in (("separation", base.reused), ("tuning", made.reused)) if flag
        ]
        if reused:
            run_results.notes.append(f"reused from the cache: {', '.join(reused)}")
    hardware.release_memory()
    exported = tmp_path_factory.mktemp("exported") / "base"
    model, _ = libortho.load(full)
    libortho.export_base(model, exported)
    return Tuned(base.folder, full, exported, report)


@pytest.fixture(scope="session")
def arms(
    ortho_settings: Settings,
    resolved: ResolvedModel,
    corpus: Corpus,
    separation: SeparationConfig,
    tuned: Tuned,
    compute_dtype: torch.dtype,
    device: str,
) -> Arms:
    folders = {"alpha1": tuned.full, "alpha0": tuned.exported, "never-trained": tuned.base}
    cache_dir = ortho_settings.cache_dir
    return Arms(resolved, corpus, separation, folders, compute_dtype, device, cache_dir)
