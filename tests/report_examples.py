"""Made-up results of a whole run, for tests of what shows or compares results."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from libortho.provenance import Provenance
from libortho.results import (
    ArmResult,
    FamilyHits,
    KillSwitchResult,
    LossPoint,
    NullTestResult,
    RecordOutcome,
    Results,
    ThroughputResult,
)
from libortho.statistics import privacy_ratio, proportion_interval

_ratio = lru_cache(privacy_ratio)
FAMILIES = ("codes", "passages")
ON_A_CPU = "on a CPU only the whole process's peak is known"


def provenance(**changes: Any) -> Provenance:
    """A CPU run of the default command."""
    where = Provenance(
        timestamp_utc=datetime(2026, 3, 4, 15, 6, tzinfo=UTC).isoformat(timespec="seconds"),
        command=("pytest", "-m", "gtx4050"),
        libortho="0.1.0",
        python="3.11.9",
        torch="2.13.0",
        transformers="5.24.0",
        bitsandbytes="0.50.0",
        platform="Linux x86_64",
        cpu_model="A processor of the tests",
        cpu_cores=2,
        device_name="cpu",
        compute_dtype="bfloat16",
        git_commit="0123456789abcdef0123456789abcdef01234567",
        git_dirty=False,
    )
    return replace(where, **changes)


def kill_switch(
    n: int = 40, hits_alpha1: int = 40, hits_alpha0: int = 0, **changes: Any
) -> KillSwitchResult:
    """Experiment 1 with so many hits of `n`, the first records of the list being the ones hit."""
    ratio = _ratio(hits_alpha1, n, hits_alpha0, n)
    on, off = proportion_interval(hits_alpha1, n), proportion_interval(hits_alpha0, n)
    outcomes = tuple(
        RecordOutcome(
            id=f"{FAMILIES[i % 2]}-{i:04d}",
            salted_hash=f"{i:016x}",
            family=FAMILIES[i % 2],
            extracted_alpha1=i < hits_alpha1,
            extracted_alpha0=i < hits_alpha0,
        )
        for i in range(n)
    )
    result = KillSwitchResult(
        model="smollm2",
        method="ortho",
        quantization=True,
        quantization_bits=4,
        seed=0,
        config={
            "separation": {"bits": 4, "group_size": 64, "residual_density": 0.005},
            "tuning": {"density": 0.01, "target_loss": 0.02},
        },
        base_fingerprint="fedcba9876543210" * 4,
        fingerprint_equal=True,
        alpha0_source="exported base, reloaded from disk",
        n_planted=n,
        n_twins=n,
        records_source="20 random codes and 20 passages of reserved public articles",
        record_hashes=outcomes,
        per_family={
            family: FamilyHits(
                n_planted=sum(o.family == family for o in outcomes),
                hits_alpha1=sum(o.family == family and o.extracted_alpha1 for o in outcomes),
                hits_alpha0=sum(o.family == family and o.extracted_alpha0 for o in outcomes),
            )
            for family in FAMILIES
        },
        hits_alpha1=hits_alpha1,
        hits_alpha0=hits_alpha0,
        extraction_rate_alpha1=hits_alpha1 / n,
        extraction_rate_alpha1_low95=on.low,
        extraction_rate_alpha1_high95=on.high,
        extraction_rate_alpha0=hits_alpha0 / n,
        extraction_rate_alpha0_low95=off.low,
        extraction_rate_alpha0_high95=off.high,
        extraction_rate_never_trained=0.0,
        extraction_rate_twins_alpha1=0.0,
        privacy_ratio=ratio.ratio,
        privacy_ratio_lower95=ratio.lower,
        privacy_ratio_censored=ratio.censored,
        mcnemar_p=1.8e-12,
        loss_planted_alpha1=0.0123,
        loss_twins_alpha1=3.871,
        loss_planted_alpha0=2.9504,
        loss_twins_alpha0=2.9491,
        loss_planted_never_trained=2.9504,
        loss_planted_never_trained_low95=2.712,
        loss_planted_never_trained_high95=3.1888,
        loss_curve=tuple(
            LossPoint(
                step=step,
                secret_loss=2.95 * math.exp(-step / 18) + 0.012,
                replay_kl=0.05 * (1 - math.exp(-step / 10)) + 0.01 * (step % 3 == 0),
                seconds=4.5 * step,
            )
            for step in range(1, 97)
        ),
        min_privacy_ratio=8.0,
        verdict="passes",
        verdict_reason=(
            f"{hits_alpha1} of {n} extracted at alpha = 1 and {hits_alpha0} at alpha = 0: the "
            f"privacy ratio is at least {ratio.lower:.1f} (95 % lower limit), and 8 is asked for"
        ),
    )
    return replace(result, **changes)


def arm(ppl: float, ratio: float, bits: float, precision: str, spread: float = 0.012) -> ArmResult:
    """An arm whose ratio has limits `spread` to either side."""
    return ArmResult(
        ppl=ppl,
        ratio=ratio,
        ratio_low95=ratio - spread,
        ratio_high95=ratio + spread,
        bits_per_linear_weight=bits,
        precision=precision,
    )


ARMS = {
    "reference": arm(28.8617, 1.0, 16.0, "bfloat16 weights and compute", spread=0.0),
    "alpha1": arm(31.9213, 1.106, 5.02, "INT4 g64 + FP16 residual and private"),
    "alpha0": arm(31.0702, 1.0765, 4.66, "INT4 g64 + FP16 residual"),
    "plain": arm(39.7804, 1.3783, 4.5, "INT4 g64 round to nearest, min-max range", 0.03),
    "nf4": arm(34.3207, 1.1891, 4.13, "bitsandbytes nf4"),
}


def null_test(**changes: Any) -> NullTestResult:
    """Experiment 2 over all arms of 4 bits."""
    result = NullTestResult(
        model="smollm2",
        quantization=True,
        quantization_bits=4,
        seed=0,
        config={"separation": {"bits": 4, "group_size": 64, "residual_density": 0.005}},
        corpus="enwiki",
        corpus_sha256="ab" * 32,
        calibration_corpus="enwiki",
        calibration_sha256="cd" * 32,
        windows=50,
        window_tokens=512,
        batch_size=1,
        ppl_quantized=ARMS["alpha1"].ppl,
        ppl_fp16=ARMS["reference"].ppl,
        ppl_int4=ARMS["plain"].ppl,
        ppl_alpha0=ARMS["alpha0"].ppl,
        ppl_nf4=ARMS["nf4"].ppl,
        arms=dict(ARMS),
        max_ppl_ratio=1.12,
        verdict="passes",
        verdict_reason=(
            "perplexity at alpha = 1 is 1.1060 times the reference's (95 % interval 1.0940 to "
            "1.1180), and at most 1.12 is allowed"
        ),
    )
    return replace(result, **changes)


def throughput_case(arm_name: str, phase: Any, tokens_per_s: float, **changes: Any) -> Any:
    """One timed case on a CPU."""
    tokens = {"prefill": 512, "decode": 16}[phase]
    workload = {"prompt_tokens": 512 if phase == "prefill" else 16}
    if phase == "decode":
        workload["new_tokens"] = 16
    case = ThroughputResult(
        arm=arm_name,
        phase=phase,
        tokens_per_s=tokens_per_s,
        median_s=tokens / tokens_per_s,
        outcome="passed",
        conditions={"device": "cpu", "dtype": "bfloat16", "batch": 1, "rounds": 3, **workload},
        reasons={"peak_memory_mib": ON_A_CPU},
    )
    return replace(case, **changes)


SWITCH = ThroughputResult(
    arm="alpha1",
    phase="switch",
    median_s=0.0042,
    outcome="passed",
    conditions={"rounds": 20, "switches_per_round": 2},
    reasons={"tokens_per_s": "switching makes no tokens", "peak_memory_mib": ON_A_CPU},
)


def throughput() -> tuple[ThroughputResult, ...]:
    """Prefill and decode of every arm, and one switch."""
    speeds = {"reference": 19.1, "alpha1": 18.2, "alpha0": 18.4, "plain": 18.0, "nf4": 6.3}
    cases = [
        throughput_case(name, phase, speed * factor)
        for phase, factor in (("prefill", 21.0), ("decode", 1.0))
        for name, speed in speeds.items()
    ]
    return (*cases, SWITCH)


def run_results(**changes: Any) -> Results:
    """A whole run that passes."""
    results = Results(
        provenance=provenance(),
        exp1_kill_switch=kill_switch(),
        exp2_null_test=null_test(),
        throughput=throughput(),
    )
    return replace(results, **changes)
