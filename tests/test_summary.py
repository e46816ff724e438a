"""The closing table says what the results say, and a dash where nothing was measured."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from libortho.provenance import collect_provenance
from libortho.results import (
    ArmResult,
    KillSwitchResult,
    NullTestResult,
    Results,
    ThroughputResult,
)
from libortho.summary import number, summary_lines, table

KILL_SWITCH = KillSwitchResult(
    model="a-model",
    method="ortho",
    quantization=True,
    quantization_bits=4,
    seed=0,
    config={},
    base_fingerprint="0123456789abcdef" * 4,
    fingerprint_equal=True,
    alpha0_source="exported base, reloaded from disk",
    n_planted=40,
    n_twins=40,
    records_source="test",
    record_hashes=(),
    per_family={},
    hits_alpha1=39,
    hits_alpha0=1,
    extraction_rate_never_trained=0.025,
    privacy_ratio=39.0,
    privacy_ratio_lower95=9.87,
    privacy_ratio_censored=False,
    loss_planted_alpha1=0.0123,
    loss_twins_alpha1=4.5,
    loss_planted_alpha0=2.9504,
    loss_twins_alpha0=2.949,
    loss_planted_never_trained=2.95,
    loss_planted_never_trained_low95=2.7,
    loss_planted_never_trained_high95=3.2,
    min_privacy_ratio=8.0,
    verdict="passes",
    verdict_reason="because of the ratio",
)
NULL_TEST = NullTestResult(
    model="a-model",
    quantization=True,
    quantization_bits=4,
    seed=0,
    config={},
    corpus="a-corpus",
    corpus_sha256="0" * 64,
    calibration_corpus="a-corpus",
    calibration_sha256="1" * 64,
    windows=50,
    window_tokens=512,
    batch_size=1,
    arms={
        "reference": ArmResult(
            ppl=20.0,
            ratio=1.0,
            ratio_low95=1.0,
            ratio_high95=1.0,
            bits_per_linear_weight=32.0,
            precision="float32",
        ),
        "nf4": ArmResult(precision="not measured", reasons={"ppl": "bitsandbytes is missing"}),
    },
    max_ppl_ratio=1.12,
    verdict="fails",
    verdict_reason="because of the perplexity",
)
DECODE = ThroughputResult(
    arm="alpha1",
    phase="decode",
    tokens_per_s=12.34,
    median_s=0.5,
    peak_memory_mib=1024.4,
    outcome="passed",
    conditions={},
)
SWITCH = ThroughputResult(arm="alpha1", phase="switch", outcome="passed", conditions={})


def summary(**sections: Any) -> str:
    where = collect_provenance(
        command=[],
        cpu_model="test",
        cpu_cores=2,
        device_name="cpu",
        compute_dtype="float32",
        now=datetime(2026, 3, 4, tzinfo=UTC),
    )
    return "\n".join(summary_lines(Results(provenance=where, **sections)))


def row(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
    return line.strip().removeprefix(name).split()


def test_the_kill_switch_shows_verdict_counts_and_losses() -> None:
    text = summary(exp1_kill_switch=KILL_SWITCH)
    assert "PASSES (a-model, 4 bits)" in text
    assert "because of the ratio" in text
    assert "lower limit 9.87" in text
    assert "0123456789abcdef unchanged" in text
    assert "half a hit" not in text
    assert row(text, "alpha = 1") == ["39/40", "0.012", "4.500"]
    assert row(text, "alpha = 0") == ["1/40", "2.950", "2.949"]
    assert row(text, "never trained") == ["1/40", "2.950", "[2.700,", "3.200]"]
    assert "experiment 2" not in text


@pytest.mark.parametrize("verdict", ["fails", "inconclusive"])
def test_a_verdict_that_is_no_pass_is_shown_as_such(verdict: Any) -> None:
    text = summary(exp1_kill_switch=replace(KILL_SWITCH, verdict=verdict))
    assert verdict.upper() in text
    assert "PASSES" not in text


def test_a_changed_base_and_an_assumed_half_hit_are_said() -> None:
    result = replace(KILL_SWITCH, fingerprint_equal=False, privacy_ratio_censored=True)
    text = summary(exp1_kill_switch=result)
    assert "CHANGED" in text
    assert "half a hit assumed" in text


def test_what_was_not_measured_is_a_dash() -> None:
    blank = {"loss_planted_alpha1": None, "extraction_rate_never_trained": None}
    text = summary(exp1_kill_switch=replace(KILL_SWITCH, **blank, privacy_ratio_lower95=None))
    assert row(text, "alpha = 1") == ["39/40", "-", "4.500"]
    assert row(text, "never trained")[0] == "-"
    assert "lower limit -" in text


def test_the_null_test_shows_every_arm_and_why_one_is_missing() -> None:
    text = summary(exp2_null_test=NULL_TEST)
    assert "FAILS (a-corpus, 50 windows of 512 tokens, batch 1)" in text
    assert "because of the perplexity" in text
    assert row(text, "reference") == ["20.000", "1.0000", "[1.000,", "1.000]", "32.000"]
    assert row(text, "nf4 (bitsandbytes is missing)") == ["-", "-", "[-,", "-]", "-"]
    assert "experiment 1" not in text


def test_throughput_shows_each_case() -> None:
    text = summary(throughput=(DECODE, SWITCH))
    assert row(text, "decode alpha1") == ["12.3", "500.00", "1024"]
    assert row(text, "switch alpha1") == ["-", "-", "-"]


def test_nothing_measured_gives_no_lines() -> None:
    assert summary() == ""


def test_columns_are_aligned() -> None:
    lines = table(["name", "value"], [["a", "1.0"], ["a longer name", "1000.0"]])
    assert lines == [
        "name            value",
        "-------------  ------",
        "a                 1.0",
        "a longer name  1000.0",
    ]


def test_numbers_have_the_digits_asked_for() -> None:
    assert number(1.23456, 2) == "1.23"
    assert number(0.0, 1) == "0.0"  # measured, and not the same as missing
    assert number(None, 3) == "-"
