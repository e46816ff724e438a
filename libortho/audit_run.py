"""An audit of a method from end to end: evidence, attacks, dose curve, fingerprints, verdict.

Knows the order in which things are measured and that no more than two models are in memory. What
each is, and what it amounts to, is the business of `evidence`, `attacks`, `methods` and `audit`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from libortho import evidence
from libortho.attacks import (
    Attack,
    AttackResult,
    DosePoint,
    Target,
    attack_targets,
    dose_curve,
    layers_read,
    targets_of,
)
from libortho.audit import AuditVerdict, audit
from libortho.audit_metrics import measure_state
from libortho.audit_results import AuditResult
from libortho.contrast import ALL_FAMILIES, Finding
from libortho.errors import CorpusError, RecordError
from libortho.evidence import Evidence
from libortho.journal import made_now
from libortho.membership import is_extracted
from libortho.methods.states import StateName, TwoStates
from libortho.precision import dtype_name
from libortho.records import Record, RecordSet, encode
from libortho.statistics import privacy_ratio
from libortho.windows import token_windows

STATES: tuple[StateName, ...] = ("never", "off", "on")
"""In the order of the results' rows."""

DOSE_WINDOWS, DOSE_WINDOW_TOKENS = 2, 512
"""Public text at each alpha of the dose curve: the same windows for all, so few tell them apart."""

Keep = Callable[[str, Any, Callable[[], Any]], tuple[Any, float]]
"""Makes a stage, or finds what an interrupted run made of it: (name, type, maker) to (it, seconds).

Evidence is not among these stages, because it must not leave memory.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an audit does.

    attacks: on the off state and on the never-trained model; none = evidence alone
    references: for ids of planted records other secrets after the same prompt, for exposure
    doses: values of alpha for the dose curve, where the method has a dial
    public_text: for perplexity along the dose curve; none, or too little for a window = left out
    trust_construction: whether equal fingerprints may carry the verdict. Without, the predictions
        and attacks must
    """

    attacks: Sequence[Attack] = ()
    references: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    doses: Sequence[float] = ()
    public_text: Sequence[str] = ()
    trust_construction: bool = True


def run_audit(
    states: TwoStates,
    records: RecordSet,
    plan: Plan,
    *,
    model: str,
    config: dict[str, Any],
    keep: Keep = made_now,
) -> AuditResult:
    """Measure and judge one method.

    Args:
        states: the method's on, off and never-trained state.
        records: planted records and twins.
        plan: what to do.
        model: the model's name, for the result.
        config: settings that made the states, for the result.
        keep: makes the attacks and the dose curve, or finds them; `Journal.timed`, say.

    Raises:
        ConfigError: there is no never-trained state to compare with.
        RecordError: a record can't be encoded, or a family lacks twins.
    """
    clock = _Clock()
    found: dict[StateName, list[Evidence]] = {}
    losses: dict[StateName, dict[str, tuple[float, ...]]] = {}

    def gather(name: StateName, target: Target, layers: int = 0) -> None:
        with clock.stage(f"evidence, {name}"):
            target.read(layers)
            found[name] = target.evidence()
        with clock.stage(f"references, {name}"):
            losses[name] = _references(target.model, states.tokenizer, plan.references)

    with states.on() as on:
        gather("on", Target(on, states.tokenizer, records))
    attacks: tuple[AttackResult, ...] = ()
    # Attacks go on from the passes that the evidence was taken from.
    with states.never() as never, states.off() as off:
        off_target, never_target = targets_of(off, never, states.tokenizer, records)
        gather("never", never_target, layers_read(plan.attacks))
        gather("off", off_target, layers_read(plan.attacks))
        if plan.attacks:
            attacks, clock.seconds["attacks"] = keep(
                "attacks",
                tuple[AttackResult, ...],
                lambda: attack_targets(off_target, never_target, plan.attacks),
            )
    metrics = [
        row
        for name in STATES
        for row in measure_state(found[name], found["never"], name=name, references=losses[name])
    ]
    doses: tuple[DosePoint, ...] = ()
    if plan.doses and states.dial is not None:
        doses, clock.seconds["dose curve"] = keep(
            "dose curve", tuple[DosePoint, ...], lambda: _dosed(states, records, plan)
        )
    with clock.stage("fingerprints"):
        prints = states.fingerprints()
    promised = prints is not None and states.promises_equality
    verdict = audit(
        found["off"],
        found["never"],
        found["on"],
        fingerprint_equal=prints.equal if prints and promised and plan.trust_construction else None,
        attacks=[as_finding(result) for result in attacks],
    )
    ratio = _ratio(found)
    reasons = _reasons(verdict, attacks, doses, plan, states)
    if prints is None:
        why = "there is nothing that it could be made from anew"
        reasons |= dict.fromkeys(("fingerprint_off", "fingerprint_without_records"), why)
    return AuditResult(
        method=states.name,
        promise=states.promise,
        model=model,
        compute_dtype=dtype_name(states.compute_dtype),
        seed=records.seed,
        config=config,
        records_source=records.source,
        n_planted=len(records.planted),
        n_twins=len(records.twins),
        verdict=verdict.verdict,
        verdict_reason=verdict.reason,
        construction_checked=bool(promised and plan.trust_construction),
        fingerprint_off=None if prints is None else prints.off,
        fingerprint_without_records=None if prints is None else prints.without_records,
        extraction_on=verdict.extraction_on,
        privacy_ratio=ratio.ratio,
        privacy_ratio_lower95=ratio.lower,
        smallest_leak_nats=verdict.sensitivity.uniform_nats if verdict.sensitivity else None,
        smallest_leak_share=verdict.smallest_leak,
        tests=len(verdict.findings),
        bits_off=states.bits_per_linear_weight("off"),
        bits_on=states.bits_per_linear_weight("on"),
        metrics=tuple(metrics),
        findings=verdict.findings,
        attacks=attacks,
        dose_curve=doses,
        seconds=clock.seconds,
        reasons=reasons,
    )


def as_finding(result: AttackResult) -> Finding:
    """An attack as one more test of the audit, to be corrected with all others."""
    return Finding(
        question="attack",
        metric=result.name,
        family=result.strongest_family or ALL_FAMILIES,
        effect=result.effect,
        unit=result.score_unit,
        auc=result.auc,
        p_value=result.p_value,
        p_adjusted=result.p_value,
        n_planted=result.off_planted.n,
        n_twins=result.off_twins.n,
    )


def _dosed(states: TwoStates, records: RecordSet, plan: Plan) -> tuple[DosePoint, ...]:
    with states.on() as on:
        length = min(DOSE_WINDOW_TOKENS, on.config.max_position_embeddings)
        windows = None
        with suppress(CorpusError):
            windows = token_windows(
                states.tokenizer, plan.public_text, count=DOSE_WINDOWS, length=length, fewer=True
            )
        assert states.dial is not None  # asked before
        return dose_curve(
            on,
            states.tokenizer,
            records,
            alphas=plan.doses,
            dial=states.dial,
            windows=windows,
        )


def _references(
    model: Any, tokenizer: Any, references: Mapping[str, Sequence[Record]]
) -> dict[str, tuple[float, ...]]:
    if not references:
        return {}
    limit = model.config.max_position_embeddings
    encoded = {key: encode(tokenizer, group, limit) for key, group in references.items()}
    return evidence.reference_losses(model, encoded)


def _ratio(found: Mapping[StateName, Sequence[Evidence]]) -> Any:
    planted = {name: [e for e in found[name] if e.planted] for name in ("on", "off")}
    hits = {name: sum(map(is_extracted, group)) for name, group in planted.items()}
    n = len(planted["on"])
    if not n:
        raise RecordError("an audit needs planted records; found none.")
    return privacy_ratio(hits["on"], n, hits["off"], n)


def _reasons(
    verdict: AuditVerdict,
    attacks: Sequence[AttackResult],
    doses: Sequence[DosePoint],
    plan: Plan,
    states: TwoStates,
) -> dict[str, str]:
    reasons = {}
    if verdict.extraction_on is None:
        reasons["extraction_on"] = verdict.reason
    if verdict.sensitivity is None:
        reasons["smallest_leak_nats"] = verdict.reason
    if verdict.smallest_leak is None:
        reasons["smallest_leak_share"] = "the on state takes nothing off planted records"
    if not attacks:
        reasons["attacks"] = "none were asked for"
    if not doses:
        missing = "the method has no dial" if plan.doses else "none was asked for"
        reasons["dose_curve"] = missing if states.dial is None or not plan.doses else "not measured"
    return reasons


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)
