"""The audit: what does a method's off state give away, by every metric and under every attack?

`pytest -m audit --method NAME` (or `all`). The controls are judged as well: an audit that lets a
known leak pass is worth nothing, and one that cries wolf no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import libortho
from bench.arms import Progress
from bench.conftest import Brought
from bench.leaks import LEAKS, spoiled
from libortho.artifact import BASE_FILE
from libortho.attacks import default_attacks, relearning_attacks
from libortho.attacks.dose import DOSES
from libortho.audit_records import draw_references, make_audit_records, reshape_references
from libortho.audit_request import ENOUGH
from libortho.audit_results import AuditResult
from libortho.audit_run import Keep, Plan, run_audit
from libortho.config import SeparationConfig, TuningConfig
from libortho.corpora import Corpus
from libortho.errors import ArtifactError, ConfigError, HardwareError
from libortho.extraction import recites, score_records
from libortho.journal import Journal, made_now
from libortho.methods import METHODS, Ingredients, TwoStates, checkpoint_pair, saved_artefact
from libortho.models import ResolvedModel, resolve_model
from libortho.plugin import RunResults
from libortho.precision import computing_in
from libortho.records import RecordSet, encode
from libortho.settings import Settings
from libortho.store import content_of

pytestmark = pytest.mark.audit

STEPS_PER_RECORD = 5
"""Optimiser steps a planted record, at most: a training ends once every record is learned."""
STEPS_TO_SEE_ALL = 5
"""Steps in which every record is seen once. With 200 records ten a step left three in four of them
unlearned after 500 steps, and forty a step learned them all in 850."""

PRIVATE = ENOUGH["tested"]
EXPECTED: dict[str, tuple[str, ...]] = {
    "ortho": ENOUGH["construction"],
    "qlora": ENOUGH["construction"],
    "B0-never-trained": ("inconclusive",),  # nothing was learned, so nothing is switched off
    "B1-dense-int4": ("leaks",),
    "B2-random-slots": ("private by construction", "inconclusive"),  # chance may learn too little
    "blind-hessian": ("leaks",),
    "blind-kfac": ("leaks",),
}
"""Verdicts that an audit may come to on what is known."""


@pytest.fixture(scope="session")
def audit_records(brought: Brought, ortho_settings: Settings, corpus: Corpus) -> RecordSet:
    """The user's records, or five families of generated ones."""
    if brought.records is not None:
        return brought.records
    n = ortho_settings.audit_records
    return make_audit_records(n, ortho_settings.seed, corpus.passages)


@pytest.fixture(scope="session")
def ingredients(
    resolved: ResolvedModel,
    corpus: Corpus,
    separation: SeparationConfig,
    audit_records: RecordSet,
    ortho_settings: Settings,
    compute_dtype: torch.dtype,
    device: str,
) -> Ingredients:
    n = len(audit_records.planted)
    steps = max(TuningConfig.steps, STEPS_PER_RECORD * n)
    at_once = max(TuningConfig.records_per_step, round(n / STEPS_TO_SEE_ALL))
    return Ingredients(
        resolved=resolved,
        corpus=corpus,
        records=audit_records,
        separation=separation,
        tuning=TuningConfig(seed=ortho_settings.seed, steps=steps, records_per_step=at_once),
        compute_dtype=compute_dtype,
        device=device,
        cache_dir=ortho_settings.cache_dir,
    )


class Audits:
    """Audits of this session, each made once and only when asked for."""

    def __init__(
        self,
        ingredients: Ingredients,
        brought: Brought,
        settings: Settings,
        progress: Progress,
        run_results: RunResults,
        journal: Journal,
    ) -> None:
        self.ingredients, self.brought, self.settings = ingredients, brought, settings
        self.progress, self.run_results, self.journal = progress, run_results, journal
        self.states_of: dict[str, TwoStates] = {}
        self.known: dict[str, AuditResult] = {}

    def states(self, method: str) -> TwoStates:
        """The method's states, prepared at first use. Raises `HardwareError` if it can't be."""
        if method not in self.states_of:
            with self.progress():
                self.states_of[method] = self._prepare(method)
        return self.states_of[method]

    def of(self, method: str) -> AuditResult:
        """The audit of a method, with attacks; kept in the run's results."""
        if method not in self.known:
            name, identity = f"audit, {method}", self._identity()

            def keep(stage: str, kind: Any, make: Callable[[], Any]) -> tuple[Any, float]:
                return self.journal.timed(f"{name}: {stage}", kind, make, **identity)

            self.known[method] = self.journal.measured(
                name,
                AuditResult,
                lambda: self._examine(self.states(method), keep, attacks=True),
                **identity,
            )
            self.run_results.audits.append(self.known[method])
        return self.known[method]

    def of_leak(self, leak: str) -> AuditResult:
        """The audit of our own artefact, spoiled; it rests on predictions alone."""

        def make() -> AuditResult:
            states = self.states("ortho")
            bad = replace(states, name=leak, off_loader=spoiled(states, LEAKS[leak]))
            return self._examine(bad, made_now, attacks=False)

        return self.journal.measured(f"audit, {leak}", AuditResult, make, **self._identity())

    def _identity(self) -> dict[str, Any]:
        """What determines every audit of this run, beside the job."""
        settings, corpus = self.settings, self.ingredients.corpus
        splits = (corpus.calibration, corpus.replay, corpus.passages, corpus.test)
        checkpoint = settings.checkpoint
        return {
            "model": self.ingredients.resolved.identity,
            "text": [split.sha256 for split in splits],
            "records": self.ingredients.records.fingerprint,
            "separation": self.ingredients.separation.to_dict(),
            "tuning": self.ingredients.tuning.to_dict(),
            "artefact": None if checkpoint is None else content_of(Path(checkpoint)),
            "pair": [model.identity for model in self._pair()],
        }

    def _examine(self, states: TwoStates, keep: Keep, *, attacks: bool) -> AuditResult:
        seed, records = self.settings.seed, self.ingredients.records
        made = default_attacks(seed) if attacks else ()
        if attacks and self.settings.relearn:
            made += relearning_attacks(self.ingredients.corpus.replay, seed)
        if self.brought.records is None:
            documents = self.ingredients.corpus.passages
            references = draw_references(records.planted, seed=seed, documents=documents)
        else:
            references = reshape_references(records.planted, seed=seed)
        plan = Plan(
            attacks=made,
            references=references if attacks else {},
            doses=DOSES if attacks else (),
            public_text=self.ingredients.corpus.test,
        )
        config = {
            "separation": self.ingredients.separation.to_dict(),
            "tuning": self.ingredients.tuning.to_dict(),
        }
        model = self.ingredients.resolved.name
        with self.progress():
            return run_audit(states, records, plan, model=model, config=config, keep=keep)

    def _pair(self) -> tuple[ResolvedModel, ...]:
        """The public and the private checkpoint, if a pair is audited."""
        settings = self.settings
        given = [settings.public_model, settings.private_model]
        if not any(given):
            return ()
        if not all(given):
            raise ConfigError("a pair needs both --public-model and --private-model.")
        return tuple(resolve_model(name, settings.cache_dir) for name in given)

    def _prepare(self, method: str) -> TwoStates:
        settings, ingredients = self.settings, self.ingredients
        if method == "checkpoint":
            return saved_artefact(Path(settings.checkpoint), ingredients)
        if method == "pair":
            public, private = self._pair()
            return checkpoint_pair(public, private, ingredients, never=ingredients.resolved)
        return METHODS[method](ingredients)


@pytest.fixture(scope="session")
def audits(
    ingredients: Ingredients,
    brought: Brought,
    ortho_settings: Settings,
    progress: Progress,
    run_results: RunResults,
    journal: Journal,
) -> Audits:
    return Audits(ingredients, brought, ortho_settings, progress, run_results, journal)


def test_verdict(method: str, audits: Audits) -> None:
    """Every method and control is judged as is known of it."""
    try:
        result = audits.of(method)
    except HardwareError as error:
        pytest.skip(str(error))
    expected = EXPECTED.get(method, PRIVATE)
    assert result.verdict in expected, (
        f"{method} is judged {result.verdict!r}: {result.verdict_reason}. Known: "
        f"{' or '.join(expected)}."
    )


def test_attacks_alone_find_nothing_in_ortho(audits: Audits, audited: str) -> None:
    """With the fingerprint left out, no metric and no attack tells off from never trained.

    All of them are corrected together: of seven attacks alone one in three times some p is below
    5 % by chance.
    """
    if audited not in ("ortho", "checkpoint"):
        pytest.skip(f"about our own method; this run audits {audited}")
    result = audits.of(audited)
    seen = [f for f in result.findings if f.p_adjusted <= 0.05 and f.question != "control"]
    assert not seen, f"{len(seen)} tests see a leak: {seen[0].metric} in {seen[0].family}"
    judged = {finding.metric for finding in result.findings}
    assert judged >= {attack.name for attack in result.attacks}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_known_leak_is_not_let_pass(leak: str, audits: Audits, audited: str) -> None:
    """Our own artefact, spoiled: neither of the two private verdicts may come out."""
    if audited != "ortho":
        pytest.skip(f"made from our own method; this run audits {audited}")
    result = audits.of_leak(leak)
    assert result.verdict not in PRIVATE, f"{leak}: {result.verdict}: {result.verdict_reason}"


def test_a_smuggled_tensor_is_refused(audits: Audits, audited: str, tmp_path: Path) -> None:
    """An exported base with a private tensor put into it can't be read, hash made good or not."""
    if audited != "ortho":
        pytest.skip(f"made from our own method; this run audits {audited}")
    model = audits.states("ortho").on_loader()
    folder = libortho.export_base(model, tmp_path / "base")
    tensors = load_file(folder / BASE_FILE)
    name = next(n for n in model.state_dict() if n.endswith("private_values"))
    tensors[name] = model.state_dict()[name].cpu().contiguous()
    save_file(tensors, folder / BASE_FILE, {"format": "pt"})
    with pytest.raises(ArtifactError):
        libortho.load(folder)


def test_extraction_is_what_generate_recites(audits: Audits, audited: str) -> None:
    """One forward pass and real decoding agree on the same records, in the on state.

    In float32: in 16 bits two tokens may tie, and which of them wins depends on the batch.
    """
    states = audits.states(audited)
    records = audits.ingredients.records
    some = [*records.planted[::17], *records.twins[::67]]
    with states.on() as model, computing_in(model, torch.float32):
        encoded = encode(states.tokenizer, some, model.config.max_position_embeddings)
        told = [score.extracted for score in score_records(model, encoded)]
        assert told == [recites(model, record) for record in encoded]


@pytest.fixture
def judge(ortho_settings: Settings) -> Callable[[AuditResult], str]:
    """Why a verdict is not enough for --require-verdict, or nothing."""

    def why_not(result: AuditResult) -> str:
        enough = ENOUGH[ortho_settings.require_verdict]
        if result.verdict in enough:
            return ""
        return (
            f"{result.method} is judged {result.verdict!r}, and {' or '.join(enough)} is asked "
            f"for: {result.verdict_reason}. Run it again with: pytest -m audit"
        )

    return why_not


@pytest.mark.gate
def test_verdict_gate(audits: Audits, audited: str, judge: Callable[[AuditResult], str]) -> None:
    """The verdict on what would be released is as good as --require-verdict asks."""
    problem = judge(audits.of(audited))
    assert not problem, problem


@pytest.mark.gate
def test_ratio_gate(audits: Audits, audited: str, ortho_settings: Settings) -> None:
    """The lower 95 % limit of the privacy ratio reaches --min-privacy-ratio."""
    result, least = audits.of(audited), ortho_settings.min_privacy_ratio
    assert result.privacy_ratio_lower95 is not None
    assert result.privacy_ratio_lower95 >= least, (
        f"the privacy ratio is proven to be at least {result.privacy_ratio_lower95:.1f}, and "
        f"{least:g} is asked for. Run it again with: pytest -m audit"
    )
