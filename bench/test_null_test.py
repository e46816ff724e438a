"""Experiment 2: what do separation and the private stream cost on public text?

Every arm sees the same windows; each ratio to the reference has a paired bootstrap interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from numpy import asarray

from bench.arms import PLAIN, REFERENCE, Arms, Progress, arms_of
from libortho.config import NO_LATTICE
from libortho.corpora import Corpus
from libortho.errors import HardwareError
from libortho.journal import Journal
from libortho.perplexity import WindowLosses, measure_perplexity
from libortho.plugin import RunResults
from libortho.precision import dtype_name
from libortho.profiles import Profile
from libortho.results import ArmResult, NullTestResult
from libortho.settings import Settings
from libortho.statistics import paired_bootstrap_ratio
from libortho.store import remembered_losses
from libortho.verdict import null_test_verdict
from libortho.windows import token_windows

pytestmark = [pytest.mark.gtx4050, pytest.mark.experiment(2)]

ESSENTIAL = (REFERENCE, "alpha1", "alpha0")


@dataclass(frozen=True)
class ArmLosses:
    """An arm's losses, its stored bits per linear weight, its precision and a note."""

    windows: WindowLosses
    bits: float
    precision: str
    note: str


class Perplexities:
    """Losses of every arm on the same windows, each measured once and only when asked for."""

    def __init__(self, arms: Arms, profile: Profile, progress: Progress, journal: Journal) -> None:
        self.arms, self.profile, self.progress, self.journal = arms, profile, progress, journal
        self.known: dict[str, ArmLosses] = {}
        self.missing: dict[str, str] = {}  # arm -> why it was not measured

    def of(self, name: str) -> WindowLosses:
        """The arm's losses. Raises `HardwareError` for a peer that can't run here."""
        if name not in self.known:
            try:
                self.known[name] = self.journal.measured(
                    f"perplexity, {name}",
                    ArmLosses,
                    lambda: self._measure(name),
                    text=self.arms.corpus.test.sha256,
                    **self.arms.identity(name),
                )
            except HardwareError as error:
                self.missing[name] = str(error)
                raise
        return self.known[name].windows

    def _measure(self, name: str) -> ArmLosses:
        arms, profile = self.arms, self.profile
        with self.progress(), arms.load(name) as arm:
            windows = token_windows(
                arm.tokenizer,
                arms.corpus.test,
                count=profile.windows,
                length=profile.sequence_length,
            )

            def run() -> WindowLosses:
                size = profile.batch_size
                return measure_perplexity(
                    arm.model, windows, batch_size=size, title=f"perplexity, {name}"
                )

            note = arm.execution
            if name == REFERENCE:
                # It depends on nothing that this project does: no need to measure it twice.
                losses, remembered = remembered_losses(
                    lambda: run().losses,
                    cache_dir=arms.cache_dir,
                    model=arms.resolved.identity,
                    text=arms.corpus.test.sha256,
                    windows=[profile.windows, profile.sequence_length],
                    compute=dtype_name(arms.dtype),
                    device=torch.device(arms.device).type,
                )
                measured = WindowLosses(tuple(losses), profile.batch_size)
                note += ", losses remembered from an earlier run" if remembered else ""
            else:
                measured = run()
            return ArmLosses(measured, arm.bits, arm.precision, note)

    def result(self, name: str) -> ArmResult:
        """The arm's figures, or nulls with the reason."""
        if name not in self.known:
            reason = self.missing.get(name, "not among the selected cases")
            fields = ("ppl", "ratio", "ratio_low95", "ratio_high95", "bits_per_linear_weight")
            return ArmResult(precision="not measured", reasons=dict.fromkeys(fields, reason))
        arm, reference = self.known[name], self.known[REFERENCE]
        ratio = paired_bootstrap_ratio(
            asarray(arm.windows.losses), asarray(reference.windows.losses)
        )
        return ArmResult(
            ppl=arm.windows.ppl,
            ratio=ratio.ratio,
            ratio_low95=ratio.lower,
            ratio_high95=ratio.upper,
            bits_per_linear_weight=arm.bits,
            precision=arm.precision,
            note=arm.note,
        )


@pytest.fixture(scope="module")
def perplexities(
    arms: Arms, profile: Profile, progress: Progress, journal: Journal
) -> Perplexities:
    return Perplexities(arms, profile, progress, journal)


@pytest.fixture
def null_test(
    perplexities: Perplexities,
    arms: Arms,
    corpus: Corpus,
    profile: Profile,
    ortho_settings: Settings,
    run_results: RunResults,
) -> NullTestResult:
    """The experiment's result: the essential arms, and what others this session has measured."""
    for name in ESSENTIAL:
        perplexities.of(name)
    bits = arms.separation.bits
    results = {name: perplexities.result(name) for name in arms_of(bits)}
    at_1 = results["alpha1"]
    verdict = null_test_verdict(
        ppl_ratio=at_1.ratio,
        ratio_low95=at_1.ratio_low95,
        ratio_high95=at_1.ratio_high95,
        max_ppl_ratio=ortho_settings.max_ppl_ratio,
    )
    wanted = {"ppl_int4": (PLAIN, 4), "ppl_nf4": ("nf4", 4)}
    reasons = {}
    for field, (name, of_bits) in wanted.items():
        if name not in results or bits != of_bits:
            reasons[field] = f"the run's lattice has {bits} bits, not {of_bits}"
        elif results[name].ppl is None:
            reasons[field] = results[name].reasons["ppl"]
    run_results.null_test = NullTestResult(
        model=arms.resolved.name,
        quantization=bits != NO_LATTICE,
        quantization_bits=bits,
        seed=ortho_settings.seed,
        config={"separation": arms.separation.to_dict()},
        corpus=corpus.test.corpus,
        corpus_sha256=corpus.test.sha256,
        calibration_corpus=corpus.calibration.corpus,
        calibration_sha256=corpus.calibration.sha256,
        windows=profile.windows,
        window_tokens=profile.sequence_length,
        batch_size=min(arm.windows.batch_size for arm in perplexities.known.values()),
        ppl_quantized=at_1.ppl,
        ppl_fp16=results[REFERENCE].ppl,
        ppl_int4=None if "ppl_int4" in reasons else results[PLAIN].ppl,
        ppl_alpha0=results["alpha0"].ppl,
        ppl_nf4=None if "ppl_nf4" in reasons else results["nf4"].ppl,
        arms=results,
        max_ppl_ratio=ortho_settings.max_ppl_ratio,
        verdict=verdict.verdict,
        verdict_reason=verdict.reason,
        reasons=reasons,
    )
    return run_results.null_test


def test_perplexity(arm: str, perplexities: Perplexities) -> None:
    """Every arm gives a finite perplexity below that of guessing uniformly."""
    try:
        measured = perplexities.of(arm)
    except HardwareError as error:
        pytest.skip(str(error))
    vocabulary = 1 << 18  # more than any registered model's
    assert 1.0 < measured.ppl < vocabulary


@pytest.mark.parametrize("rival", [PLAIN, "nf4"])
def test_alpha_0_is_closer_to_the_reference(
    rival: str, perplexities: Perplexities, arms: Arms
) -> None:
    """At 4 bits, base + residual loses less than what people use now."""
    if arms.separation.bits != 4:
        pytest.skip(f"a comparison at 4 bits; this run has {arms.separation.bits}")
    try:
        theirs = perplexities.of(rival).ppl
    except HardwareError as error:
        pytest.skip(str(error))
    ours = perplexities.of("alpha0").ppl
    assert ours < theirs, f"alpha = 0 has perplexity {ours:.3f}, {rival} {theirs:.3f}"


@pytest.mark.gate
def test_perplexity_gate(null_test: NullTestResult) -> None:
    """Perplexity at alpha = 1 is at most --max-ppl-ratio times the reference's."""
    assert null_test.verdict == "passes", (
        f"{null_test.verdict}: {null_test.verdict_reason}. Run it again with: "
        "pytest -m gtx4050 --experiment 2"
    )
