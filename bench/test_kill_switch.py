"""Experiment 1: is what the private stream knows gone when alpha is 0?

alpha = 0 is measured on the base that would be handed out: exported, then read back from disk.
Beside it stand the model that was never tuned, and twins of the records that nobody planted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

import libortho
from bench.arms import Arms, Progress, Tuned
from libortho.artifact import BASE_FILE, PRIVATE_FILE, PRIVATE_MANIFEST
from libortho.config import TuningConfig
from libortho.extraction import mean_loss, score_records
from libortho.files import sha256_of
from libortho.journal import Journal
from libortho.plugin import RunResults
from libortho.records import RecordSet, encode, record_hash, safe_id
from libortho.results import FamilyHits, KillSwitchResult, LossPoint, RecordOutcome
from libortho.settings import Settings
from libortho.statistics import (
    mcnemar_exact,
    mean_interval,
    privacy_ratio,
    proportion_interval,
)
from libortho.store import record_salt
from libortho.verdict import MIN_EXTRACTION_ALPHA1, kill_switch_verdict

pytestmark = [pytest.mark.gtx4050, pytest.mark.experiment(1)]

STATES = ("alpha1", "alpha0", "never-trained")


@dataclass(frozen=True)
class Scores:
    """What one state knows of all records; no single record's loss is kept.

    planted, twins: whether each record is extracted, in the set's order
    loss_planted, loss_twins: mean nats per secret token, over records
    loss_planted_low95, loss_planted_high95: Student's t interval of the former
    """

    planted: tuple[bool, ...]
    twins: tuple[bool, ...]
    loss_planted: float
    loss_planted_low95: float
    loss_planted_high95: float
    loss_twins: float


class States:
    """Scores of every state, each measured once and only when asked for."""

    def __init__(
        self, arms: Arms, records: RecordSet, progress: Progress, journal: Journal
    ) -> None:
        self.arms, self.records, self.progress, self.journal = arms, records, progress, journal
        self.known: dict[str, Scores] = {}

    def of(self, state: str) -> Scores:
        if state not in self.known:
            self.known[state] = self.journal.measured(
                f"extraction, {state}",
                Scores,
                lambda: self._measure(state),
                records=self.records.fingerprint,
                **self.arms.identity(state),
            )
        return self.known[state]

    def _measure(self, state: str) -> Scores:
        with self.progress(), self.arms.load(state) as arm:
            limit = arm.model.config.max_position_embeddings
            planted, twins = (
                score_records(
                    arm.model, encode(arm.tokenizer, group, limit), title=f"extracting, {state}"
                )
                for group in (self.records.planted, self.records.twins)
            )
        loss, interval = mean_interval([score.loss for score in planted])
        return Scores(
            planted=tuple(score.extracted for score in planted),
            twins=tuple(score.extracted for score in twins),
            loss_planted=loss,
            loss_planted_low95=interval.low,
            loss_planted_high95=interval.high,
            loss_twins=mean_loss(twins),
        )


@pytest.fixture(scope="module")
def states(arms: Arms, records: RecordSet, progress: Progress, journal: Journal) -> States:
    return States(arms, records, progress, journal)


@pytest.fixture(scope="module")
def kill_switch(
    states: States,
    records: RecordSet,
    tuned: Tuned,
    arms: Arms,
    ortho_settings: Settings,
    run_results: RunResults,
) -> KillSwitchResult:
    """The experiment's result, from the scores of all states."""
    on, off, never = (states.of(state) for state in STATES)
    n = len(records.planted)
    ratio = privacy_ratio(sum(on.planted), n, sum(off.planted), n)
    rate_on, rate_off = (proportion_interval(sum(s.planted), n) for s in (on, off))
    fingerprints = {libortho.base_fingerprint(path) for path in (tuned.base, tuned.exported)}
    fingerprint = libortho.base_fingerprint(tuned.full)
    equal = fingerprints == {fingerprint}
    verdict = kill_switch_verdict(
        hits_alpha1=sum(on.planted),
        hits_alpha0=sum(off.planted),
        n_planted=n,
        privacy_ratio_lower95=ratio.lower,
        min_privacy_ratio=ortho_settings.min_privacy_ratio,
        fingerprint_equal=equal,
        loss_planted_alpha0=off.loss_planted,
        loss_never_trained_low95=never.loss_planted_low95,
    )
    report = tuned.report
    run_results.kill_switch = KillSwitchResult(
        model=arms.resolved.name,
        method="ortho",
        quantization=arms.separation.bits < 16,
        quantization_bits=arms.separation.bits,
        seed=ortho_settings.seed,
        config={
            "separation": arms.separation.to_dict(),
            "tuning": TuningConfig.from_dict(report["config"]).to_dict() if report else {},
        },
        base_fingerprint=fingerprint,
        fingerprint_equal=equal,
        alpha0_source="exported base, reloaded from disk",
        n_planted=n,
        n_twins=len(records.twins),
        records_source=records.source,
        record_hashes=_outcomes(records, on, off, record_salt(ortho_settings.cache_dir)),
        per_family=_per_family(records, on, off),
        hits_alpha1=sum(on.planted),
        hits_alpha0=sum(off.planted),
        extraction_rate_alpha1=sum(on.planted) / n,
        extraction_rate_alpha1_low95=rate_on.low,
        extraction_rate_alpha1_high95=rate_on.high,
        extraction_rate_alpha0=sum(off.planted) / n,
        extraction_rate_alpha0_low95=rate_off.low,
        extraction_rate_alpha0_high95=rate_off.high,
        extraction_rate_never_trained=sum(never.planted) / n,
        extraction_rate_twins_alpha1=sum(on.twins) / len(records.twins),
        privacy_ratio=ratio.ratio,
        privacy_ratio_lower95=ratio.lower,
        privacy_ratio_censored=ratio.censored,
        mcnemar_p=mcnemar_exact(on.planted, off.planted),
        loss_planted_alpha1=on.loss_planted,
        loss_twins_alpha1=on.loss_twins,
        loss_planted_alpha0=off.loss_planted,
        loss_twins_alpha0=off.loss_twins,
        loss_planted_never_trained=never.loss_planted,
        loss_planted_never_trained_low95=never.loss_planted_low95,
        loss_planted_never_trained_high95=never.loss_planted_high95,
        loss_curve=tuple(LossPoint(**point) for point in report.get("curve", ())),
        min_privacy_ratio=ortho_settings.min_privacy_ratio,
        verdict=verdict.verdict,
        verdict_reason=verdict.reason,
    )
    return run_results.kill_switch


def _outcomes(
    records: RecordSet, on: Scores, off: Scores, salt: bytes
) -> tuple[RecordOutcome, ...]:
    return tuple(
        RecordOutcome(
            id=safe_id(record.id),
            salted_hash=record_hash(record, salt),
            family=record.family,
            extracted_alpha1=at_1,
            extracted_alpha0=at_0,
        )
        for record, at_1, at_0 in zip(records.planted, on.planted, off.planted, strict=True)
    )


def _per_family(records: RecordSet, on: Scores, off: Scores) -> dict[str, FamilyHits]:
    families = [record.family for record in records.planted]
    return {
        family: FamilyHits(
            n_planted=families.count(family),
            hits_alpha1=_hits_in(family, families, on),
            hits_alpha0=_hits_in(family, families, off),
        )
        for family in dict.fromkeys(families)
    }


def _hits_in(family: str, families: Sequence[str], scores: Scores) -> int:
    return sum(hit for hit, of in zip(scores.planted, families, strict=True) if of == family)


@pytest.mark.parametrize("state", STATES)
def test_extraction(state: str, states: States, records: RecordSet) -> None:
    """Planted records come out at alpha = 1; twins, which nobody planted, come out nowhere."""
    measured = states.of(state)
    n = len(records.planted)
    if state == "alpha1":
        rate = sum(measured.planted) / n
        assert rate >= MIN_EXTRACTION_ALPHA1, (
            f"{sum(measured.planted)} of {n} planted records are extracted at alpha = 1; below "
            f"{MIN_EXTRACTION_ALPHA1:.0%} there is too little to switch off. Tune for more steps."
        )
    guessed = sum(measured.twins)
    limit = max(1, len(records.twins) // 20)
    assert guessed <= limit, (
        f"{guessed} of {len(records.twins)} twins are recited by a model that never saw them "
        f"({state}): these secrets can be guessed, and extraction proves nothing. Use others."
    )


def test_base_does_not_depend_on_the_records(tuned: Tuned) -> None:
    """The base is the same file before tuning, after tuning and as exported; nothing is added."""
    hashes = {
        path: sha256_of(path / BASE_FILE) for path in (tuned.base, tuned.full, tuned.exported)
    }
    assert len(set(hashes.values())) == 1, "the base's bytes changed while the stream was tuned"
    prints = {libortho.base_fingerprint(path) for path in hashes}
    assert len(prints) == 1, f"the base's fingerprint changed: {sorted(prints)}"
    present = {path.name for path in tuned.exported.iterdir()}
    assert not present & {PRIVATE_FILE, PRIVATE_MANIFEST}, "the export holds the private stream"


def test_alpha_0_knows_what_a_never_trained_model_knows(kill_switch: KillSwitchResult) -> None:
    """The loss on planted secrets at alpha = 0 lies in the never-trained model's 95 % interval."""
    low = kill_switch.loss_planted_never_trained_low95
    high = kill_switch.loss_planted_never_trained_high95
    found = kill_switch.loss_planted_alpha0
    assert low is not None
    assert high is not None
    assert found is not None
    assert low <= found <= high, (
        f"planted secrets cost {found:.4f} nats per token at alpha = 0; never trained: "
        f"[{low:.4f}, {high:.4f}]. Below it something is known, above it the model is broken."
    )


@pytest.mark.gate
def test_privacy_gate(kill_switch: KillSwitchResult) -> None:
    """The lower 95 % limit of the privacy ratio reaches --min-privacy-ratio."""
    assert kill_switch.verdict == "passes", (
        f"{kill_switch.verdict}: {kill_switch.verdict_reason}. Run it again with: "
        "pytest -m gtx4050 --experiment 1"
    )
