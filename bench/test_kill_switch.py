"""Experiment 1: is what the private stream knows gone when alpha is 0?

alpha = 0 is measured on the base that would be handed out: exported, then read back from disk.
Beside it stand the model that was never tuned, and twins of the records that nobody planted.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest

import libortho
from bench.arms import Arms, Progress, Tuned
from libortho.artifact import BASE_FILE, PRIVATE_FILE, PRIVATE_MANIFEST
from libortho.config import TuningConfig
from libortho.extraction import RecordScore, hits, mean_loss, score_records
from libortho.files import sha256_of
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
Group = Literal["planted", "twins"]


class Scores:
    """Scores of every state, each measured once and only when asked for."""

    def __init__(self, arms: Arms, records: RecordSet, progress: Progress) -> None:
        self.arms, self.records, self.progress = arms, records, progress
        self.known: dict[str, dict[Group, list[RecordScore]]] = {}

    def of(self, state: str) -> dict[Group, list[RecordScore]]:
        if state not in self.known:
            with self.progress(), self.arms.load(state) as arm:
                limit = arm.model.config.max_position_embeddings
                self.known[state] = {
                    group: score_records(
                        arm.model,
                        encode(arm.tokenizer, getattr(self.records, group), limit),
                        title=f"extracting, {state}",
                    )
                    for group in ("planted", "twins")
                }
        return self.known[state]


@pytest.fixture(scope="module")
def scores(arms: Arms, records: RecordSet, progress: Progress) -> Scores:
    return Scores(arms, records, progress)


@pytest.fixture(scope="module")
def kill_switch(
    scores: Scores,
    records: RecordSet,
    tuned: Tuned,
    arms: Arms,
    ortho_settings: Settings,
    run_results: RunResults,
) -> KillSwitchResult:
    """The experiment's result, from the scores of all states."""
    on, off, never = (scores.of(state) for state in STATES)
    n = len(records.planted)
    ratio = privacy_ratio(hits(on["planted"]), n, hits(off["planted"]), n)
    rate_on, rate_off = (proportion_interval(hits(s["planted"]), n) for s in (on, off))
    never_loss, never_interval = mean_interval([s.loss for s in never["planted"]])
    fingerprints = {libortho.base_fingerprint(path) for path in (tuned.base, tuned.exported)}
    fingerprint = libortho.base_fingerprint(tuned.full)
    equal = fingerprints == {fingerprint}
    verdict = kill_switch_verdict(
        hits_alpha1=hits(on["planted"]),
        hits_alpha0=hits(off["planted"]),
        n_planted=n,
        privacy_ratio_lower95=ratio.lower,
        min_privacy_ratio=ortho_settings.min_privacy_ratio,
        fingerprint_equal=equal,
        loss_planted_alpha0=mean_loss(off["planted"]),
        loss_never_trained_low95=never_interval.low,
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
        per_family=_per_family(on, off),
        hits_alpha1=hits(on["planted"]),
        hits_alpha0=hits(off["planted"]),
        extraction_rate_alpha1=hits(on["planted"]) / n,
        extraction_rate_alpha1_low95=rate_on.low,
        extraction_rate_alpha1_high95=rate_on.high,
        extraction_rate_alpha0=hits(off["planted"]) / n,
        extraction_rate_alpha0_low95=rate_off.low,
        extraction_rate_alpha0_high95=rate_off.high,
        extraction_rate_never_trained=hits(never["planted"]) / n,
        extraction_rate_twins_alpha1=hits(on["twins"]) / len(records.twins),
        privacy_ratio=ratio.ratio,
        privacy_ratio_lower95=ratio.lower,
        privacy_ratio_censored=ratio.censored,
        mcnemar_p=mcnemar_exact(
            [s.extracted for s in on["planted"]], [s.extracted for s in off["planted"]]
        ),
        loss_planted_alpha1=mean_loss(on["planted"]),
        loss_twins_alpha1=mean_loss(on["twins"]),
        loss_planted_alpha0=mean_loss(off["planted"]),
        loss_twins_alpha0=mean_loss(off["twins"]),
        loss_planted_never_trained=never_loss,
        loss_planted_never_trained_low95=never_interval.low,
        loss_planted_never_trained_high95=never_interval.high,
        loss_curve=tuple(LossPoint(**point) for point in report.get("curve", ())),
        min_privacy_ratio=ortho_settings.min_privacy_ratio,
        verdict=verdict.verdict,
        verdict_reason=verdict.reason,
    )
    return run_results.kill_switch


def _outcomes(records: RecordSet, on: Any, off: Any, salt: bytes) -> tuple[RecordOutcome, ...]:
    rows = zip(records.planted, on["planted"], off["planted"], strict=True)
    return tuple(
        RecordOutcome(
            id=safe_id(record.id),
            salted_hash=record_hash(record, salt),
            family=record.family,
            extracted_alpha1=at_1.extracted,
            extracted_alpha0=at_0.extracted,
        )
        for record, at_1, at_0 in rows
    )


def _per_family(on: Any, off: Any) -> dict[str, FamilyHits]:
    families = dict.fromkeys(score.family for score in on["planted"])
    return {
        family: FamilyHits(
            n_planted=sum(s.family == family for s in on["planted"]),
            hits_alpha1=hits([s for s in on["planted"] if s.family == family]),
            hits_alpha0=hits([s for s in off["planted"] if s.family == family]),
        )
        for family in families
    }


@pytest.mark.parametrize("state", STATES)
def test_extraction(state: str, scores: Scores, records: RecordSet) -> None:
    """Planted records come out at alpha = 1; twins, which nobody planted, come out nowhere."""
    measured = scores.of(state)
    n = len(records.planted)
    if state == "alpha1":
        rate = hits(measured["planted"]) / n
        assert rate >= MIN_EXTRACTION_ALPHA1, (
            f"{hits(measured['planted'])} of {n} planted records are extracted at alpha = 1; below "
            f"{MIN_EXTRACTION_ALPHA1:.0%} there is too little to switch off. Tune for more steps."
        )
    guessed = hits(measured["twins"])
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
