"""The table of metrics: each cell made once more, and fit for a results file."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from libortho.audit_metrics import AuditMetrics, MetricValue, measure_state
from libortho.contrast import ALL_FAMILIES
from libortho.evidence import Evidence
from libortho.simulation import OffState, SimulatedFamily, SimulatedStates, simulate
from libortho.typed_json import check_json_values, from_json

FAMILIES = (SimulatedFamily("codes", 9, 0.5), SimulatedFamily("people", 12, 2.5))
N = 15


@pytest.fixture(scope="module")
def states() -> SimulatedStates:
    off = OffState(leak=0.5, format_share=0.1, wander=0.5)
    return simulate(np.random.default_rng(0), off, per_family=N, families=FAMILIES, vocabulary=12)


def references(states: SimulatedStates, n: int = 7) -> dict[str, list[float]]:
    """Total losses of references for the planted codes; people have none."""
    rng = np.random.default_rng(1)
    return {
        e.id: rng.normal(12, 3, n).tolist() for e in states.off if e.planted and e.family == "codes"
    }


@pytest.fixture(scope="module")
def table(states: SimulatedStates) -> tuple[AuditMetrics, ...]:
    return measure_state(states.off, states.never, name="off", references=references(states))


def losses(evidence: list[Evidence], planted: bool) -> list[float]:
    return [
        -sum(e.token_logprobs) / len(e.token_logprobs) for e in evidence if e.planted == planted
    ]


def interval(metric: MetricValue) -> tuple[float, float]:
    assert metric.low95 is not None
    assert metric.high95 is not None
    return metric.low95, metric.high95


def test_the_rows_are_all_families_and_each(table: tuple[AuditMetrics, ...]) -> None:
    assert [(row.state, row.family) for row in table] == [
        ("off", ALL_FAMILIES),
        ("off", "codes"),
        ("off", "people"),
    ]
    assert [(row.n_planted, row.n_twins) for row in table] == [(2 * N, 2 * N), (N, N), (N, N)]


def test_one_family_has_one_row(states: SimulatedStates) -> None:
    codes = [e for e in states.off if e.family == "codes"]
    assert [row.family for row in measure_state(codes, codes, name="off")] == ["codes"]


def test_cells_are_those_of_other_implementations(
    states: SimulatedStates, table: tuple[AuditMetrics, ...]
) -> None:
    found = table[0].metrics
    planted = [e for e in states.off if e.planted]
    twins = [e for e in states.off if not e.planted]
    n = len(planted)

    hits = sum(max(e.ranks) == 0 for e in planted)
    assert 0 < hits < n  # else little would be compared
    assert found["extraction, planted"].value == hits / n
    assert interval(found["extraction, planted"]) == pytest.approx(
        proportion_confint(hits, n, method="beta")
    )
    discovered = sum(1 - (1 - math.exp(sum(e.token_logprobs))) ** 1000 >= 0.5 for e in planted)
    assert 0 < discovered < n
    assert found["(1000, 0.5)-discoverable extraction, planted"].value == discovered / n

    for of, group in (("planted", planted), ("twins", twins)):
        strength = []
        for e in group:
            right = 0
            while right < e.tokens and e.ranks[e.tokens - 1 - right] == 0:
                right += 1
            strength.append(right / e.tokens)
        assert found[f"extraction strength, {of}"].value == pytest.approx(np.mean(strength))
        similar = [e.similarity for e in group]
        assert found[f"teacher-forced similarity, {of}"].value == pytest.approx(np.mean(similar))
        loss = DescrStatsW(losses(states.off, of == "planted"))
        assert found[f"mean loss, {of}"].value == pytest.approx(loss.mean)
        assert interval(found[f"mean loss, {of}"]) == pytest.approx(loss.tconfint_mean())
        ks = stats.ks_2samp(
            losses(states.off, of == "planted"), losses(states.never, of == "planted")
        )
        assert found[f"KS distance to B0, {of}"].value == pytest.approx(ks.statistic)

    known, guessed = losses(states.off, True), losses(states.off, False)
    difference = found["mean loss, planted - twins"]
    assert difference.value == pytest.approx(np.mean(known) - np.mean(guessed))
    compared = CompareMeans(DescrStatsW(known), DescrStatsW(guessed))
    assert interval(difference) == pytest.approx(compared.tconfint_diff(usevar="unequal"))

    before = losses(states.never, True) + losses(states.never, False)
    labels = [1] * n + [0] * len(twins)
    ratio = np.array(before) - np.array(known + guessed)
    assert found["ratio to B0: AUC"].value == pytest.approx(roc_auc_score(labels, ratio))
    loss_auc = roc_auc_score(labels, -np.array(known + guessed))
    assert found["loss: AUC"].value == pytest.approx(loss_auc)
    best_twin = max(ratio[n:])
    assert found["ratio to B0: TPR at 1% FPR"].value == np.mean(ratio[:n] > best_twin)

    extracted = np.zeros((2, 2))
    for off, never in zip(states.off, states.never, strict=True):
        if off.planted:
            extracted[int(max(off.ranks) == 0), int(max(never.ranks) == 0)] += 1
    assert table[0].mcnemar_p == pytest.approx(mcnemar(extracted, exact=True).pvalue)


@pytest.mark.parametrize("metric", ["loss", "zlib", "min-k %", "min-k %++", "ratio to B0"])
def test_every_attack_has_an_auc_and_a_rate(metric: str, table: tuple[AuditMetrics, ...]) -> None:
    for row in table:
        for cell in (row.metrics[f"{metric}: AUC"], row.metrics[f"{metric}: TPR at 1% FPR"]):
            assert cell.value is not None
            low, high = interval(cell)
            assert 0 <= low <= cell.value <= high <= 1
            assert low < high
            assert cell.n == row.n_planted + row.n_twins


def test_exposure_is_the_mean_over_records_that_have_references(
    states: SimulatedStates, table: tuple[AuditMetrics, ...]
) -> None:
    given = references(states)
    bits = []
    for e in states.off:
        if e.id in given:
            total = -sum(e.token_logprobs)
            bits.append(3 - math.log2(1 + sum(other <= total for other in given[e.id])))
    for row in table[:2]:
        cell = row.metrics["exposure"]
        assert cell.value == pytest.approx(np.mean(bits))
        low, high = interval(cell)
        assert 0 <= low < cell.value < high <= 3
        assert (cell.n, cell.unit) == (N, "bits, at most 3")
    missing = table[2].metrics["exposure"]
    assert (missing.value, missing.low95, missing.high95, missing.n) == (None, None, None, 0)
    assert set(missing.reasons) == {"value", "low95", "high95"}
    assert "0 planted records have reference secrets" in missing.reasons["value"]


def test_exposures_of_different_sizes_have_no_mean(states: SimulatedStates) -> None:
    given = references(states)
    given[next(iter(given))].append(1.0)
    row = measure_state(states.off, states.never, name="off", references=given)[0]
    assert "differ in how many" in row.metrics["exposure"].reasons["value"]


def test_the_never_trained_model_is_its_own_reference(states: SimulatedStates) -> None:
    row = measure_state(states.never, states.never[::-1], name="B0")[0]
    assert row.metrics["ratio to B0: AUC"].value == 0.5
    assert row.metrics["ratio to B0: TPR at 1% FPR"].value == 0
    assert row.metrics["KS distance to B0, planted"].value == 0
    assert row.mcnemar_p == 1


def test_nothing_known_still_has_intervals_with_a_width(states: SimulatedStates) -> None:
    low = [
        dataclasses.replace(e, ranks=tuple(1 for _ in e.ranks), similarity=0.0)
        for e in states.never
    ]
    row = measure_state(low, low, name="off")[0]
    for metric in ("extraction", "extraction strength", "teacher-forced similarity"):
        assert row.metrics[f"{metric}, planted"].value == 0
        assert interval(row.metrics[f"{metric}, planted"]) == pytest.approx(
            proportion_confint(0, 2 * N, method="beta")
        )


def test_rows_go_into_results_and_come_back(table: tuple[AuditMetrics, ...]) -> None:
    for row in table:
        content = dataclasses.asdict(row)
        check_json_values(content)
        assert from_json(AuditMetrics, json.loads(json.dumps(content))) == row


def test_rows_hold_nothing_of_single_records(
    states: SimulatedStates, table: tuple[AuditMetrics, ...]
) -> None:
    text = json.dumps([dataclasses.asdict(row) for row in table])
    for evidence in states.off:
        assert evidence.id not in text
        assert all(repr(p) not in text for p in evidence.token_logprobs)


def test_states_that_do_not_fit_are_refused(states: SimulatedStates) -> None:
    lone = [e for e in states.off if not e.planted or e.id == "codes-0000"]
    with pytest.raises(ValueError, match=r"found 1 and 30|found 1 and 15"):
        measure_state(lone, lone, name="off")
    cases: list[Any] = [
        (states.off[1:], states.never),
        (states.off, [*states.never, states.off[0]]),
    ]
    for off, never in cases:
        with pytest.raises(ValueError, match="same records, once each"):
            measure_state(off, never, name="off")
    broken = [dataclasses.replace(e, token_logprobs=(math.nan,) * e.tokens) for e in states.off]
    with pytest.raises(ValueError, match="finite"):
        measure_state(broken, states.never, name="off")
