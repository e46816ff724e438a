"""Two runs against each other: what is noise, what is a change, and what can't be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_examples import (
    ARMS,
    arm,
    kill_switch,
    null_test,
    provenance,
    run_results,
    throughput_case,
)
from scipy import stats

from libortho.compare import SIGNIFICANCE, Change, Comparison, compare
from libortho.figures import figures
from libortho.results import Results

RATE = "exp1_kill_switch.extraction_rate_alpha0"
RATIO = "exp2_null_test.arms.alpha1.ratio"
DECODE = "throughput.alpha1.decode.tokens_per_s"


def change_of(comparison: Comparison, name: str) -> Change:
    (change,) = (c for c in comparison.changes if c.before.name == name)
    return change


def with_alpha1(ratio: float, spread: float = 0.01, bits: float = 5.02) -> Results:
    """A run whose alpha = 1 has that perplexity ratio, with limits `spread` to either side."""
    arms = ARMS | {"alpha1": arm(28.8617 * ratio, ratio, bits, "INT4", spread)}
    return run_results(exp2_null_test=null_test(arms=arms))


def with_hits(hits_alpha0: int, *, salt: int = 0, n: int = 40) -> Results:
    """A run with so many hits at alpha = 0; another salt gives other hashes."""
    result = kill_switch(n, n, hits_alpha0)
    hashes = tuple(
        replace(r, salted_hash=f"{salt + i:016x}") for i, r in enumerate(result.record_hashes)
    )
    return run_results(exp1_kill_switch=replace(result, record_hashes=hashes))


def with_decode(tokens_per_s: float, **changes: Any) -> Results:
    return run_results(throughput=(throughput_case("alpha1", "decode", tokens_per_s, **changes),))


# --- noise --------------------------------------------------------------------------------------


def test_a_run_is_as_good_as_itself() -> None:
    comparison = compare(run_results(), run_results())
    assert comparison.obstacles == ()
    assert comparison.notes == ()
    assert not comparison.is_worse
    assert {c.outcome for c in comparison.changes} == {"same", "not judged"}
    assert {v.outcome for v in comparison.verdicts} == {"same"}
    judged = {c.before.name for c in comparison.changes if c.outcome == "same"}
    assert {RATE, RATIO, DECODE} <= judged


@given(
    ratios=st.tuples(st.floats(1, 2), st.floats(1, 2)),
    spreads=st.tuples(st.floats(0, 0.3), st.floats(0, 0.3)),
)
@settings(max_examples=50)
def test_figures_with_intervals_changed_if_these_do_not_overlap(
    ratios: tuple[float, float], spreads: tuple[float, float]
) -> None:
    one, two = (with_alpha1(r, s) for r, s in zip(ratios, spreads, strict=True))
    change = change_of(compare(one, two), RATIO)
    low, high = (figures(run)[RATIO] for run in (one, two))
    if low.value is not None and high.value is not None and low.value > high.value:
        low, high = high, low
    apart = (low.high or 0) < (high.low or 0)
    expected = "same" if not apart else "worse" if ratios[1] > ratios[0] else "better"
    assert change.outcome == expected
    assert change.rule == f"95 % intervals {'do not overlap' if apart else 'overlap'}"


@given(one=st.integers(0, 40), two=st.integers(0, 40))
@settings(max_examples=40)
def test_the_direction_of_a_change_turns_with_the_order(one: int, two: int) -> None:
    first, second = with_hits(one), with_hits(two, salt=1000)
    there = change_of(compare(first, second), RATE).outcome
    back = change_of(compare(second, first), RATE).outcome
    assert (there, back) in (("same", "same"), ("worse", "better"), ("better", "worse"))
    if there != "same":
        assert (there == "worse") == (two > one)


@given(one=st.integers(0, 40), two=st.integers(0, 40))
@settings(max_examples=40)
def test_counts_of_other_records_are_fishers(one: int, two: int) -> None:
    change = change_of(compare(with_hits(one), with_hits(two, salt=1000)), RATE)
    p = stats.fisher_exact([[one, 40 - one], [two, 40 - two]])[1]
    assert (change.outcome != "same") == (p < SIGNIFICANCE)
    assert change.rule.startswith("Fisher")


@pytest.mark.parametrize(("hits", "outcome"), [(5, "same"), (6, "worse")])
def test_counts_of_the_same_records_are_mcnemars(hits: int, outcome: str) -> None:
    """Of pairs that differ all in one direction, 5 have p = 0.0625 and 6 have p = 0.03125."""
    change = change_of(compare(with_hits(0), with_hits(hits)), RATE)
    assert change.outcome == outcome
    assert change.rule.startswith("McNemar on the same records")


def test_families_are_tested_apart() -> None:
    before = kill_switch(40, 40, 0)
    leaked = tuple(replace(r, extracted_alpha0=r.family == "codes") for r in before.record_hashes)
    families = dict(before.per_family)
    families["codes"] = replace(families["codes"], hits_alpha0=20)
    after = replace(before, record_hashes=leaked, per_family=families)
    comparison = compare(run_results(exp1_kill_switch=before), run_results(exp1_kill_switch=after))
    where = "exp1_kill_switch.per_family.{}.hits_alpha0"
    assert change_of(comparison, where.format("codes")).outcome == "worse"
    assert change_of(comparison, where.format("passages")).outcome == "same"


@given(speed=st.floats(0.5, 500))
@settings(max_examples=40)
def test_figures_without_an_interval_change_from_a_factor_on(speed: float) -> None:
    change = change_of(compare(with_decode(20.0), with_decode(speed)), DECODE)
    expected = "worse" if speed <= 10 else "better" if speed >= 40 else "same"
    assert change.outcome == expected
    strict = change_of(compare(with_decode(20.0), with_decode(speed), factor=1.0001), DECODE)
    assert (strict.outcome == "same") == (20 / 1.0001 < speed < 20 * 1.0001)


@pytest.mark.parametrize("factor", [1.0, 0.5, float("inf"), float("nan")])
def test_a_factor_that_makes_no_sense_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        compare(run_results(), run_results(), factor=factor)


def test_bits_are_exact() -> None:
    name = "exp2_null_test.arms.alpha1.bits_per_linear_weight"
    comparison = compare(with_alpha1(1.1, bits=5.02), with_alpha1(1.1, bits=5.021))
    assert change_of(comparison, name).outcome == "worse"


def test_what_has_no_better_direction_is_changed_and_no_worse() -> None:
    after = run_results(exp1_kill_switch=kill_switch(loss_planted_alpha0=0.5))
    comparison = compare(run_results(), after)
    assert change_of(comparison, "exp1_kill_switch.loss_planted_alpha0").outcome == "changed"
    assert not comparison.is_worse


def test_derived_figures_are_shown_and_not_judged() -> None:
    comparison = compare(with_hits(0), with_hits(20))
    change = change_of(comparison, "exp1_kill_switch.privacy_ratio_lower95")
    assert change.outcome == "not judged"
    assert change.rule == "follows from other figures"


def test_a_figure_that_one_file_lacks_is_not_judged() -> None:
    without = {name: value for name, value in ARMS.items() if name != "nf4"}
    after = run_results(exp2_null_test=null_test(arms=without))
    change = change_of(compare(run_results(), after), "exp2_null_test.arms.nf4.ratio")
    assert change.outcome == "not judged"
    assert change.rule == "not measured in the second run: the file has no such figure"
    back = change_of(compare(after, run_results()), "exp2_null_test.arms.nf4.ratio")
    assert back.rule == "not measured in the first run: the file has no such figure"


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ("passes", "fails", "worse"),
        ("passes", "inconclusive", "worse"),
        ("fails", "passes", "better"),
        ("fails", "inconclusive", "changed"),
    ],
)
def test_a_gate_that_passes_no_more_is_worse(before: Any, after: Any, outcome: str) -> None:
    runs = [run_results(exp1_kill_switch=kill_switch(verdict=v)) for v in (before, after)]
    comparison = compare(*runs)
    (change,) = (v for v in comparison.verdicts if v.gate == "privacy")
    assert change.outcome == outcome
    assert comparison.is_worse == (outcome == "worse")


# --- what can't be compared ---------------------------------------------------------------------

OTHERS = {
    "the device": run_results(provenance=provenance(device_name="A card")),
    "the CPU": run_results(provenance=provenance(cpu_model="Another processor")),
    "only the first run has experiment 1": run_results(exp1_kill_switch=None),
    "only the first run has experiment 2": run_results(exp2_null_test=None),
    "only the first run has throughput": run_results(throughput=()),
    "experiment 1's model": run_results(exp1_kill_switch=kill_switch(model="another")),
    "experiment 2's model": run_results(exp2_null_test=null_test(model="another")),
    "the families of records": run_results(exp1_kill_switch=kill_switch(per_family={})),
    "the test text's SHA-256": run_results(exp2_null_test=null_test(corpus_sha256="ef" * 32)),
    "the number of windows": run_results(exp2_null_test=null_test(windows=49)),
    "the tokens of a window": run_results(exp2_null_test=null_test(window_tokens=256)),
    "different checkpoints of that name": run_results(exp2_null_test=null_test(ppl_fp16=29.3)),
}


@pytest.mark.parametrize("obstacle", OTHERS)
def test_what_was_measured_differently_is_refused_and_named(obstacle: str) -> None:
    comparison = compare(run_results(), OTHERS[obstacle])
    assert len(comparison.obstacles) == 1
    assert obstacle in comparison.obstacles[0]
    assert comparison.changes == ()
    assert comparison.verdicts == ()
    assert not comparison.judged
    waived = compare(run_results(), OTHERS[obstacle], anyway=True)
    assert waived.obstacles == comparison.obstacles
    assert waived.judged
    assert waived.changes


def test_another_workload_is_another_case() -> None:
    longer = with_decode(20.0, conditions={"batch": 1, "prompt_tokens": 16, "new_tokens": 64})
    (obstacle,) = compare(with_decode(20.0), longer).obstacles
    assert obstacle == (
        "throughput.alpha1.decode was measured with new_tokens 16 in one run and 64 in the other"
    )


def test_a_reference_that_moved_a_little_is_the_same_checkpoint() -> None:
    assert not compare(
        run_results(), run_results(exp2_null_test=null_test(ppl_fp16=28.88))
    ).obstacles


def test_in_another_dtype_the_reference_tells_nothing() -> None:
    after = run_results(
        provenance=provenance(compute_dtype="float32"),
        exp2_null_test=null_test(ppl_fp16=29.9),
    )
    comparison = compare(run_results(), after)
    assert comparison.obstacles == ()
    assert "compute_dtype is bfloat16 in one run and float32 in the other" in comparison.notes


def test_the_processor_of_a_card_is_no_obstacle() -> None:
    runs = [
        run_results(provenance=provenance(device_name="A card", cpu_model=name))
        for name in ("one", "two")
    ]
    assert compare(*runs).obstacles == ()


def test_what_differs_and_does_not_hinder_is_noted() -> None:
    after = run_results(
        provenance=provenance(torch="2.14.0"),
        exp1_kill_switch=kill_switch(
            seed=1, config={"separation": {"group_size": 128}, "tuning": {"density": 0.01}}
        ),
    )
    notes = compare(run_results(), after).notes
    assert "torch is 2.13.0 in one run and 2.14.0 in the other" in notes
    assert "experiment 1's seed is 0 in one run and 1 in the other" in notes
    assert "experiment 1, separation, group_size is 64 in one run and 128 in the other" in notes


# --- figures ------------------------------------------------------------------------------------


def test_figures_of_one_case_measured_twice_have_two_names() -> None:
    cases = (throughput_case("alpha1", "decode", 1.0), throughput_case("alpha1", "decode", 2.0))
    found = figures(run_results(throughput=cases))
    assert found[DECODE].value == 1.0
    assert found["throughput.alpha1.decode#2.tokens_per_s"].value == 2.0


def test_impossible_counts_are_no_counts() -> None:
    assert figures(run_results(exp1_kill_switch=kill_switch(hits_alpha0=0)))[RATE].counts == (0, 40)
    for hits in (-1, 41, 10**9):
        broken = run_results(exp1_kill_switch=replace(kill_switch(), hits_alpha0=hits))
        assert figures(broken)[RATE].counts is None
        assert change_of(compare(broken, broken), RATE).outcome == "same"
