"""Made-up results of a whole run, for tests of what shows or compares results."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from libortho.attacks.attack import Cost
from libortho.attacks.comparison import AttackResult, Rate, VariantResult
from libortho.attacks.dose import DosePoint
from libortho.audit_metrics import AuditMetrics, MetricValue
from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES, Finding
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


# --- audits -------------------------------------------------------------------------------------

AUDITED = ("codes", "uuids", "people", "passages", "traps")


def metric(value: float, unit: str = "of 1", spread: float = 0.05) -> MetricValue:
    """A metric with limits `spread` to either side."""
    return MetricValue(
        value=value,
        low95=value - spread,
        high95=value + spread,
        unit=unit,
        interval="Student",
        n=400,
    )


def state_metrics(state: str, family: str, planted: float, twins: float) -> AuditMetrics:
    """One state's metrics of one family, from its two mean losses."""
    no_references = "0 planted records have reference secrets, and two or more are needed"
    return AuditMetrics(
        state=state,
        family=family,
        n_planted=40,
        n_twins=40,
        metrics={
            "extraction, planted": metric(1.0 if planted < 1 else 0.0, "of the records"),
            "mean loss, planted": metric(planted, "nats per token", 0.2),
            "mean loss, twins": metric(twins, "nats per token", 0.2),
            "mean loss, planted - twins": metric(planted - twins, "nats per token"),
            "exposure": MetricValue(
                value=None,
                low95=None,
                high95=None,
                unit="bits",
                interval="none",
                n=0,
                reasons=dict.fromkeys(("value", "low95", "high95"), no_references),
            ),
            "loss: AUC": metric(0.5 if planted == twins else 0.97),
            "ratio to B0: AUC": metric(0.5 if planted == twins else 0.99),
        },
        mcnemar_p=1.0,
    )


def attack(name: str, hits: int, p_value: float) -> AttackResult:
    """An attack that got so many of 200 planted records from the off state."""
    return AttackResult(
        name=name,
        needs="the format of the records",
        settings={},
        score_unit="nats",
        off_planted=Rate.of(hits, 200),
        never_planted=Rate.of(0, 200),
        off_twins=Rate.of(0, 200),
        never_twins=Rate.of(0, 200),
        planted_in_set=200,
        twins_in_set=200,
        extracted=(),
        variants=(
            VariantResult(
                name="all", off_hits=hits, never_hits=0, effect=0.0, auc=0.5, p_value=p_value
            ),
        ),
        strongest="all",
        strongest_family="codes",
        effect=0.0,
        auc=0.503,
        p_membership=p_value,
        p_outlier=1.0,
        p_value=p_value,
        level=0.05,
        beats_never=p_value <= 0.05,
        cost_off=Cost(forward_tokens=1000, seconds=2.5),
        cost_never=Cost(forward_tokens=1000, seconds=2.5),
        notes_off={},
        notes_never={},
    )


def dose(alpha: float) -> DosePoint:
    """A point whose extraction rises and whose loss falls with alpha."""
    hits = max(0, min(50, round(50 * (alpha - 0.3) / 0.45)))
    return DosePoint(
        alpha=alpha,
        planted=Rate.of(hits, 50),
        twins=Rate.of(0, 50),
        loss_planted=max(0.02, 2.95 * (1 - alpha)),
        loss_twins=2.95 + 1.2 * max(alpha, 0.0),
        cost=Cost(forward_tokens=1000, seconds=1.0),
        reasons={"ppl": "no windows of text were given"},
    )


def audit(method: str = "ortho", *, leaks: bool = False, **changes: Any) -> AuditResult:
    """An audit of five families that finds a method private by construction, or that it leaks."""
    base = dict(zip(AUDITED, (4.4, 3.9, 2.7, 3.4, 6.1), strict=True))
    base[ALL_FAMILIES] = sum(base.values()) / len(base)
    rows = [
        state_metrics(state, family, loss * factor, loss)
        for state, factor in (("never", 1.0), ("off", 0.6 if leaks else 1.0), ("on", 0.01))
        for family, loss in base.items()
    ]
    finding = Finding(
        question="membership",
        metric="loss",
        family="codes",
        effect=1.76 if leaks else 0.001,
        unit="nats per token",
        auc=0.97 if leaks else 0.51,
        p_value=1e-9 if leaks else 0.4,
        p_adjusted=1e-8 if leaks else 1.0,
        n_planted=40,
        n_twins=40,
    )
    result = AuditResult(
        method=method,
        promise="alpha = 0 has the same bytes whatever the records are",
        model="smollm2",
        compute_dtype="bfloat16",
        seed=0,
        config={"separation": {"bits": 4, "group_size": 64}},
        records_source="40 records of each of five families",
        n_planted=200,
        n_twins=200,
        verdict="leaks" if leaks else "private by construction",
        verdict_reason=(
            "by loss, planted records of codes are known better than twins"
            if leaks
            else "the off state's fingerprint is that of an artefact made without the records"
        ),
        construction_checked=True,
        fingerprint_off="ab" * 32,
        fingerprint_without_records=("cd" if leaks else "ab") * 32,
        extraction_on=1.0,
        privacy_ratio=400.0,
        privacy_ratio_lower95=52.9,
        smallest_leak_nats=0.021,
        smallest_leak_share=0.005,
        tests=61,
        bits_off=4.66,
        bits_on=5.02,
        metrics=tuple(rows),
        findings=(finding,),
        attacks=(
            attack("logit lens", 0, 0.61),
            attack("constrained search", 31 if leaks else 0, 1e-4 if leaks else 0.83),
        ),
        dose_curve=tuple(map(dose, (-1.0, -0.5, 0.1, 0.25, 0.5, 0.75))),
        seconds={"evidence, off": 41.2, "attacks": 200.5},
    )
    return replace(result, **changes)
