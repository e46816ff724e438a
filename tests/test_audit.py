"""The verdict: known leaks are caught, clean models pass, and what can't be judged isn't."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho.audit import (
    AUDIT_SIGNIFICANCE,
    MIN_AUDIT_RECORDS,
    MIN_FAMILY_RECORDS,
    AuditVerdict,
    audit,
)
from libortho.config import SeparationConfig, TuningConfig
from libortho.contrast import POWER, Finding
from libortho.evidence import Evidence, collect_set
from libortho.records import Record, make_codes, plant
from libortho.separation import separate
from libortho.simulation import FAMILIES, OffState, SimulatedFamily, SimulatedStates, simulate
from libortho.switch import alpha, ortho_layers
from libortho.tuning import tune_private
from libortho.typed_json import check_json_values, from_json

Factory = Callable[..., LlamaForCausalLM]

# Quick to draw and as unlike each other as the real ones.
SHORT = (
    SimulatedFamily("codes", 5, 0.5),
    SimulatedFamily("people", 7, 2.5),
    SimulatedFamily("traps", 10, 1.5),
)


def drawn(
    off: OffState | None = None,
    *,
    seed: int | np.random.Generator = 0,
    per_family: int = 12,
    families: Sequence[SimulatedFamily] = SHORT,
) -> SimulatedStates:
    rng = np.random.default_rng(seed)
    return simulate(rng, off, per_family=per_family, families=families, vocabulary=12)


def judged(states: SimulatedStates, **options: Any) -> AuditVerdict:
    return audit(states.off, states.never, states.on, **options)


# ---------------------------------------------------------------- known leaks


@pytest.mark.parametrize(
    "off",
    [
        pytest.param(OffState(leak=0.01), id="1 % left"),
        pytest.param(OffState(leak=0.05, wander=0.05), id="5 % left in low precision"),
        pytest.param(OffState(leak=0.25, wander=0.1), id="25 % left in other weights"),
        pytest.param(OffState(leak=-0.01), id="known worse than twins"),
        pytest.param(OffState(leak=0.5, format_share=0.3, wander=0.3), id="rounded fine-tune"),
        pytest.param(OffState(leak=0.1, families=("people",)), id="one family of five"),
        pytest.param(OffState(leak=0.95, records=5), id="5 records of 100"),
        pytest.param(OffState(leak=0.95, records=5, wander=0.05), id="5 records in low precision"),
        pytest.param(OffState(leak=1.0, records=1, families=("traps",)), id="1 record of 100"),
    ],
)
def test_a_known_leak_is_caught(off: OffState) -> None:
    for seed in range(2):
        states = drawn(off, seed=seed, per_family=20, families=FAMILIES)
        verdict = judged(states, fingerprint_equal=seed == 0 or None)
        assert verdict.verdict == "leaks", verdict.reason
        assert not verdict.is_private


def test_the_reason_names_the_metric_the_amount_and_the_family() -> None:
    reason = judged(drawn(OffState(leak=0.5, families=("people",)))).reason
    assert "people" in reason
    assert "codes" not in reason
    assert "nats more than any twin" in reason
    reason = judged(drawn(OffState(leak=0.05))).reason
    assert reason.startswith("by loss, planted records of all families are known better than twins")
    assert "nats per token" in reason
    assert "in: codes, people, traps" in reason
    assert "known worse" in judged(drawn(OffState(leak=-0.05))).reason


def test_a_leak_outranks_what_else_is_wrong() -> None:
    states = drawn(OffState(leak=0.5, format_share=0.3))
    assert audit(states.off, states.never, None).verdict == "leaks"
    assert judged(states, fingerprint_equal=False).verdict == "leaks"


def test_an_attack_that_beats_the_never_trained_model_is_a_leak() -> None:
    states = drawn()

    def attack(p: float) -> Finding:
        return Finding("attack", "sampling", "codes", 0.25, "of the records", None, p, 1.0, 12, 12)

    assert judged(states, attacks=[attack(0.01)]).is_private  # of 45 tests one has such a p-value
    verdict = judged(states, attacks=[attack(1e-4)])
    assert verdict.verdict == "leaks"
    assert "the attack sampling gets 0.25 of the records more out of codes" in verdict.reason


def test_twins_that_were_drawn_unlike_are_pointed_at() -> None:
    states = drawn(OffState(leak=0.2))
    known = [
        replace(e, token_logprobs=tuple(p / 4 for p in e.token_logprobs)) if e.planted else e
        for e in states.never
    ]
    reason = audit(states.off, known, states.on).reason
    assert "they were not drawn alike" in reason
    assert "not drawn alike" not in judged(states).reason


# ---------------------------------------------------------------- clean


def test_the_same_bytes_and_the_same_evidence_are_private_by_construction() -> None:
    states = drawn()
    states = replace(states, off=states.never[::-1])  # in another order
    assert judged(states, fingerprint_equal=True).verdict == "private by construction"
    assert judged(states).verdict == "private as far as tested"


def test_equal_fingerprints_alone_are_no_construction() -> None:
    verdict = judged(drawn(), fingerprint_equal=True)  # predictions differ by arithmetic
    assert verdict.verdict == "private as far as tested"
    assert verdict.is_private


def test_bytes_that_differ_are_never_private() -> None:
    states = drawn()
    states = replace(states, off=list(states.never))
    verdict = judged(states, fingerprint_equal=False)
    assert verdict.verdict == "inconclusive"
    assert "fingerprint was recomputed and differs" in verdict.reason


def test_private_as_far_as_tested_says_how_far() -> None:
    verdict = judged(drawn(OffState(wander=0.05)))
    seen = verdict.sensitivity
    assert seen is not None
    assert verdict.smallest_leak is not None
    assert f"none of {seen.tests} tests" in verdict.reason
    assert "error rate of 0.05 (Holm)" in verdict.reason
    assert f"leak of {seen.uniform_nats:.2g} nats per token" in verdict.reason
    assert f"({verdict.smallest_leak:.2g} of what" in verdict.reason
    assert f"by {seen.record_nats:.1f} nats in all" in verdict.reason
    assert verdict.extraction_on == 1


# ---------------------------------------------------------------- inconclusive


@pytest.mark.parametrize(
    ("off", "reason"),
    [
        (OffState(noise=True), "is not the never-trained model"),
        (OffState(format_share=0.1), "is not the never-trained model"),
        (OffState(wander=1.0), "is not the never-trained model"),
    ],
)
def test_an_off_state_that_is_another_model_is_not_private(off: OffState, reason: str) -> None:
    verdict = judged(drawn(off, per_family=20))
    assert verdict.verdict == "inconclusive"
    assert reason in verdict.reason


def test_an_off_state_that_varies_too_much_hides_leaks() -> None:
    states = drawn(per_family=20)
    rng = np.random.default_rng(0)
    # As often better as worse, so that the mean on twins doesn't tell.
    off = [
        replace(e, token_logprobs=tuple(p + change for p in e.token_logprobs))
        for e, change in zip(states.never, rng.normal(0, 2.5, len(states.never)), strict=True)
    ]
    verdict = audit(off, states.never, states.on)
    assert verdict.verdict == "inconclusive"
    assert "smallest uniform leak that would have been seen" in verdict.reason


def test_what_was_not_learned_or_not_measured_is_inconclusive() -> None:
    states = drawn()
    planted = [e for e in states.on if e.planted]
    n, allowed = len(planted), len(planted) // 10
    by_id = {e.id: e for e in states.never}
    for missed, expected in (
        (allowed, "private as far as tested"),
        (allowed + 1, "inconclusive"),
    ):
        on = [by_id[e.id] if i < missed else e for i, e in enumerate(planted)]
        verdict = audit(states.off, states.never, on)
        assert verdict.verdict == expected
        assert verdict.extraction_on == pytest.approx(1 - missed / n)
    assert "too little to switch off" in verdict.reason
    for unmeasured in (None, [], planted[1:]):
        verdict = audit(states.off, states.never, unmeasured)
        assert verdict.verdict == "inconclusive"
        assert "was not measured on every planted record" in verdict.reason
        assert (verdict.extraction_on, verdict.smallest_leak) == (None, None)
    equal = audit(states.never, states.never, None, fingerprint_equal=True)
    assert equal.verdict == "inconclusive"  # nothing is known to have been there


def without(evidence: Sequence[Evidence], *, keep: int, family: str, planted: bool) -> Any:
    """All but some of a family's planted records or twins."""
    counted: Counter[tuple[str, bool]] = Counter()
    kept = []
    for e in evidence:
        counted[e.family, e.planted] += 1
        if (e.family, e.planted) != (family, planted) or counted[family, planted] <= keep:
            kept.append(e)
    return kept


@pytest.mark.parametrize("planted", [True, False])
@pytest.mark.parametrize(
    ("keep", "verdict"), [(10, "private as far as tested"), (9, "inconclusive")]
)
def test_a_family_needs_enough_of_both(planted: bool, keep: int, verdict: str) -> None:
    states = drawn()
    off, never = (
        without(state, keep=keep, family="codes", planted=planted)
        for state in (states.off, states.never)
    )
    found = audit(off, never, states.on)
    assert found.verdict == verdict
    if verdict == "inconclusive":
        what = "planted records" if planted else "twins"
        assert f"9 {what} of the family codes are too few" in found.reason


def test_few_records_in_all_are_inconclusive() -> None:
    states = drawn(families=SHORT[:1])
    verdict = judged(states)
    assert verdict.verdict == "inconclusive"
    assert f"12 planted records are too few: at least {MIN_AUDIT_RECORDS}" in verdict.reason


def test_the_smallest_family_would_be_seen_if_it_alone_leaked_all() -> None:
    n = MIN_FAMILY_RECORDS
    off = OffState(leak=0.05, families=("codes",), wander=0.001)
    verdict = judged(drawn(off, per_family=n, families=FAMILIES))
    assert verdict.verdict == "leaks"
    assert "in: codes" in verdict.reason
    ranked = stats.mannwhitneyu(range(n, 2 * n), range(n), method="asymptotic").pvalue
    assert ranked == pytest.approx(1.8e-4, rel=0.05)
    assert len(verdict.findings) * ranked < AUDIT_SIGNIFICANCE


def test_evidence_that_does_not_fit_together_is_inconclusive() -> None:
    states = drawn()
    odd = replace(states.off[0], token_logprobs=(math.nan,) * states.off[0].tokens)
    alone = [e for e in states.off if e.family != "codes" or e.planted]
    for off, never, reason in (
        ([], states.never, "no evidence of the off state"),
        (states.off, [], "none of the never-trained model"),
        (states.off[1:], states.never, "1 pieces of evidence are about records that"),
        ([odd, *states.off[1:]], states.never, "not finite on 1 records"),
        (alone, alone, "family codes has no planted record, or fewer than two twins"),
    ):
        verdict = audit(off, never, states.on, fingerprint_equal=True)
        assert verdict.verdict == "inconclusive"
        assert reason in verdict.reason
        assert verdict.findings == ()


def test_impossible_arguments_are_refused() -> None:
    states = drawn()
    with pytest.raises(ValueError, match="occurs twice in the evidence of the off state"):
        audit([*states.off, states.off[0]], states.never, states.on)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            judged(states, significance=level)


@pytest.mark.parametrize("off", [OffState(), OffState(leak=0.5), OffState(noise=True)])
def test_verdicts_go_into_results_and_come_back(off: OffState) -> None:
    states = drawn(off)
    for verdict in (judged(states), audit(states.off, states.never, None), audit([], [], None)):
        content = asdict(verdict)
        check_json_values(content)
        assert from_json(AuditVerdict, json.loads(json.dumps(content))) == verdict


# ---------------------------------------------------------------- error rate and power


def test_clean_models_stay_green_at_the_stated_rate() -> None:
    """200 audits in arithmetic of several precisions: at most 5 % end otherwise than private."""
    rng = np.random.default_rng(20)
    audits = 200
    red = 0
    for i in range(audits):
        off = OffState(wander=(0.003, 0.01, 0.03, 0.1)[i % 4])
        red += not judged(drawn(off, seed=rng)).is_private
    assert red <= stats.binom.ppf(0.999, audits, AUDIT_SIGNIFICANCE)


def test_other_models_that_never_saw_the_records_are_not_accused() -> None:
    """Another quantiser, and training on others of the format: not private, but no leak."""
    rng = np.random.default_rng(21)
    audits = 40
    found = Counter(
        judged(drawn(OffState(wander=0.5, format_share=0.3), seed=rng)).verdict
        for _ in range(audits)
    )
    assert found["leaks"] <= stats.binom.ppf(0.999, audits, AUDIT_SIGNIFICANCE)


def test_power_grows_with_the_leak_and_holds_at_the_stated_size() -> None:
    rng = np.random.default_rng(22)
    audits, wander = 25, 0.05
    stated = []
    for _ in range(5):
        seen = judged(drawn(OffState(wander=wander), seed=rng)).sensitivity
        assert seen is not None
        stated.append(seen.uniform_nats)
    power = []
    for factor in (0.2, 0.5, 1.0, 2.0):
        off = OffState(nats=factor * float(np.mean(stated)), wander=wander)
        verdicts = [judged(drawn(off, seed=rng)).verdict for _ in range(audits)]
        power.append(verdicts.count("leaks") / audits)
    noise = 0.15  # about two standard errors of a difference
    assert all(after >= before - noise for before, after in pairwise(power))
    assert power[0] < 0.5
    assert power[2] >= stats.binom.ppf(0.001, audits, POWER) / audits
    assert power[3] == 1


# ---------------------------------------------------------------- a real model, if a tiny one


def test_a_private_stream_that_was_left_in_is_caught_in_a_real_model(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> None:
    """alpha = 0 passes, and 1 %, 5 % and 25 % of alpha, and INT4 of the whole, do not."""
    n = 20
    codes = [
        Record(code.id, code.prompt[-16:], code.secret[:6], "codes")
        for code in make_codes(2 * n, seed=0)
    ]
    records = plant([codes], seed=0)
    size = {"hidden_size": 96, "intermediate_size": 160}
    model = tiny_model(**size)
    separate(model, tokenizer, public_text, config=small_separation)

    def evidence(of: LlamaForCausalLM) -> list[Evidence]:
        return collect_set(of, tokenizer, records, batch_size=n)

    never = evidence(model)
    recipe = TuningConfig(
        density=0.4,
        slots="magnitude",
        steps=150,
        lr=3e-2,
        replay_window=32,
        replay_weight=0.1,
        records_per_step=15,
        target_loss=0.05,
    )
    tune_private(model, tokenizer, records.repeated, replay=public_text, config=recipe)
    on = evidence(model)
    states = {}
    for strength in (0.0, 0.01, 0.05, 0.25):
        with alpha(model, strength):
            states[f"{strength:.0%} of alpha"] = evidence(model)
    rounded = tiny_model(**size)
    with torch.no_grad():
        for name, layer in ortho_layers(model).items():
            rounded.get_submodule(name).weight.copy_(layer.effective_weight())
    plain = replace(small_separation, residual_density=0.0, search=False)
    separate(rounded, tokenizer, public_text, config=plain)
    states["INT4 of the whole"] = evidence(rounded)

    verdicts = {name: audit(off, never, on).verdict for name, off in states.items()}
    assert verdicts == {
        "0% of alpha": "private as far as tested",
        "1% of alpha": "leaks",
        "5% of alpha": "leaks",
        "25% of alpha": "leaks",
        "INT4 of the whole": "leaks",
    }
    equal = audit(states["0% of alpha"], never, on, fingerprint_equal=True)
    assert equal.verdict == "private by construction"
