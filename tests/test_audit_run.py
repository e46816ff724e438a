"""An audit from end to end on a tiny model: what it measures, what it writes, what it lets pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho.attacks import LogitLens, PromptLengths
from libortho.audit_results import AuditResult
from libortho.audit_run import STATES, Plan, run_audit
from libortho.config import TuningConfig
from libortho.errors import ConfigError
from libortho.methods import TwoStates
from libortho.provenance import collect_provenance
from libortho.records import Record, RecordSet
from libortho.results import Results, to_json
from libortho.summary import summary_lines
from libortho.switch import alpha, ortho_layers
from libortho.tuning import tune_private
from libortho.typed_json import from_json

PLANTED, TWIN = " 4917", " 8820"
N = 24
RECORDS = RecordSet(
    tuple(Record(f"p{i}", f"Door {i} opens:", PLANTED, "codes") for i in range(N)),
    tuple(Record(f"t{i}", f"Door {i} shuts:", TWIN, "codes") for i in range(N)),
    0,
    "tests",
)
REFERENCES = {r.id: [Record(f"{r.id}.r", r.prompt, " 7013", "codes")] for r in RECORDS.planted}
TUNING = TuningConfig(
    density=0.3, slots="magnitude", steps=60, lr=2e-2, replay_window=32, target_loss=0.1
)


@pytest.fixture(scope="module")
def trained(
    separated_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A separated tiny model that was never trained, and the same with the records."""
    never = separated_model()
    full = copy.deepcopy(never)
    tune_private(full, tokenizer, RECORDS.planted, replay=public_text, config=TUNING)
    return never, full


@pytest.fixture
def states(
    trained: tuple[LlamaForCausalLM, LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> TwoStates:
    never, full = trained

    def load(model: Any) -> Callable[[], Any]:
        return lambda: copy.deepcopy(model)

    return TwoStates(
        name="ortho",
        promise="the same bytes",
        tokenizer=tokenizer,
        compute_dtype=torch.float32,
        on_loader=load(full),
        off_loader=load(never),
        never_loader=load(never),
        remake_loader=load(never),
        dial=alpha,
        promises_equality=True,
    )


def audited(states: TwoStates, **plan: Any) -> AuditResult:
    return run_audit(states, RECORDS, Plan(**plan), model="tiny", config={"seed": 0})


def test_a_whole_audit_is_private_by_construction_and_survives_its_file(
    states: TwoStates, public_text: list[str]
) -> None:
    result = audited(
        states,
        attacks=(LogitLens(layers=1), PromptLengths()),
        references=REFERENCES,
        doses=(0.5,),
        public_text=public_text,
    )
    assert result.verdict == "private by construction"
    assert result.fingerprint_off == result.fingerprint_without_records
    assert result.extraction_on == 1.0
    assert result.privacy_ratio_lower95 > 6  # type: ignore[operator]
    assert [row.state for row in result.metrics] == list(STATES)
    on = result.metrics[-1].metrics
    assert on["exposure"].value == pytest.approx(1.0)  # 1 bit: there is one reference each
    assert [a.beats_never for a in result.attacks] == [False, False]
    assert {f.metric for f in result.findings if f.question == "attack"} == {
        "logit lens",
        "prompt lengths",
    }
    assert result.dose_curve[0].alpha == 0.5
    assert result.dose_curve[0].ppl is not None
    assert result.dose_curve[0].ppl > 1
    assert result.bits_on > result.bits_off
    text = to_json_of(result)
    assert PLANTED not in text
    assert "audit of ortho: PRIVATE BY CONSTRUCTION" in "\n".join(summary_lines(results_of(result)))


def test_attacks_and_doses_are_taken_over_from_an_interrupted_audit(states: TwoStates) -> None:
    kept: dict[str, Any] = {}

    def keep(name: str, kind: Any, make: Callable[[], Any]) -> tuple[Any, float]:
        if name not in kept:
            kept[name] = make()
        value = from_json(kind, json.loads(json.dumps([asdict(row) for row in kept[name]])))
        return value, 123.0

    plan = Plan(attacks=(PromptLengths(),), doses=(0.5,))
    first = run_audit(states, RECORDS, plan, model="tiny", config={}, keep=keep)
    assert set(kept) == {"attacks", "dose curve"}
    made = dict(kept)
    again = run_audit(states, RECORDS, plan, model="tiny", config={}, keep=keep)
    assert (again.attacks, again.dose_curve) == (first.attacks, first.dose_curve)
    assert all(kept[name] is made[name] for name in made)
    assert again.seconds["attacks"] == again.seconds["dose curve"] == 123.0
    assert replace(again, seconds={}) == replace(first, seconds={})


def results_of(result: AuditResult) -> Results:
    where = collect_provenance(
        command=(), cpu_model="any", cpu_cores=1, device_name="cpu", compute_dtype="float32"
    )
    reasons = dict.fromkeys(("exp1_kill_switch", "exp2_null_test"), "not asked for")
    return Results(provenance=where, audits=(result,), reasons=reasons)


def to_json_of(result: AuditResult) -> str:
    text = to_json(results_of(result))
    assert from_json(Results, json.loads(text)).audits == (result,)
    return text


def test_without_the_fingerprint_predictions_must_carry_the_verdict(states: TwoStates) -> None:
    result = audited(states, trust_construction=False)
    assert result.verdict == "private as far as tested"
    assert not result.construction_checked
    assert result.smallest_leak_share is not None


def test_a_stream_that_stays_on_leaks(states: TwoStates) -> None:
    result = audited(replace(states, off_loader=states.on_loader))
    assert result.verdict == "leaks"
    assert result.fingerprint_off != result.fingerprint_without_records


def test_bytes_that_differ_are_not_private_although_no_test_sees_it(states: TwoStates) -> None:
    def load() -> Any:
        model = states.off_loader()
        layer = next(iter(ortho_layers(model).values()))
        layer.set_private(
            torch.zeros(1, layer.out_features, dtype=torch.uint16),
            torch.zeros(1, layer.out_features, dtype=torch.float16),
        )
        return model

    result = audited(replace(states, off_loader=load))
    assert result.verdict == "inconclusive"
    assert "fingerprint" in result.verdict_reason or "bytes" in result.verdict_reason


def test_a_method_that_promises_nothing_is_judged_by_what_it_shows(states: TwoStates) -> None:
    result = audited(replace(states, remake_loader=None, promises_equality=False, dial=None))
    assert result.verdict == "private as far as tested"
    assert result.fingerprint_off is None
    assert result.reasons["fingerprint_off"]


def test_no_control_no_audit(states: TwoStates) -> None:
    with pytest.raises(ConfigError, match="never-trained"):
        audited(replace(states, never_loader=None))
