"""Simulated evidence: is it what a model would give, and is the leak the one that was asked for?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from libortho.evidence import Evidence
from libortho.membership import is_extracted, mean_loss
from libortho.simulation import FAMILIES, OffState, SimulatedStates, simulate


def drawn(off: OffState | None = None, per_family: int = 10) -> SimulatedStates:
    return simulate(np.random.default_rng(0), off, per_family=per_family, vocabulary=32)


def gains(states: SimulatedStates, *, planted: bool, share: bool = True) -> list[float]:
    """Loss that is gone, as a share of the never-trained model's or in nats per token."""
    return [
        (mean_loss(b) - mean_loss(a)) / (mean_loss(b) if share else 1)
        for a, b in zip(states.off, states.never, strict=True)
        if a.planted == planted
    ]


def test_states_are_about_the_same_records() -> None:
    states = drawn()
    keys = [[(e.id, e.family, e.planted, e.tokens) for e in s] for s in vars(states).values()]
    assert keys[0] == keys[1] == keys[2]
    assert len({e.id for e in states.off}) == 2 * 10 * len(FAMILIES)
    assert sum(e.planted for e in states.off) == 10 * len(FAMILIES)


def test_the_on_state_knows_planted_records_by_heart_and_no_twin_better() -> None:
    states = drawn()
    assert all(is_extracted(e) for e in states.on if e.planted)
    pairs = zip(states.on, states.never, strict=True)
    assert all(mean_loss(a) == pytest.approx(mean_loss(b)) for a, b in pairs if not a.planted)


@pytest.mark.parametrize("share", [0.01, 0.5, -0.2])
def test_the_leak_is_the_share_that_was_asked_for(share: float) -> None:
    states = drawn(OffState(leak=share, arithmetic=0.0))
    assert gains(states, planted=True) == pytest.approx([share] * 50, abs=1e-6)
    assert gains(states, planted=False) == pytest.approx([0] * 50, abs=1e-9)
    nats = drawn(OffState(nats=0.3, arithmetic=0.0))
    assert gains(nats, planted=True, share=False) == pytest.approx([0.3] * 50, abs=1e-6)


def test_leaks_stay_where_they_were_put() -> None:
    states = drawn(OffState(leak=0.5, records=4, families=("people", "traps"), arithmetic=0.0))
    leaking = [
        a.family
        for a, b in zip(states.off, states.never, strict=True)
        if mean_loss(b) - mean_loss(a) > 1e-6
    ]
    assert len(leaking) == 4
    assert set(leaking) <= {"people", "traps"}
    learned = drawn(OffState(format_share=0.2, arithmetic=0.0))
    assert gains(learned, planted=True) == pytest.approx(gains(learned, planted=False), abs=1e-6)


def test_evidence_belongs_to_one_distribution() -> None:
    """If the truth were drawn from the never-trained model, mean loss would be mean entropy."""
    families = [type(f)(f.name, f.tokens, f.spread, miss=0.0) for f in FAMILIES]
    states = simulate(np.random.default_rng(1), per_family=60, families=families, vocabulary=32)
    standardised = [
        (p - mean) / deviation
        for e in states.never
        for p, mean, deviation in zip(e.token_logprobs, e.means, e.deviations, strict=True)
    ]
    assert np.mean(standardised) == pytest.approx(0, abs=0.03)
    assert np.var(standardised) == pytest.approx(1, abs=0.05)


def test_ranks_and_entropies_are_possible() -> None:
    def possible(e: Evidence) -> bool:
        return all(
            0 <= rank < 32 and p <= math.log(1 / (rank + 1)) + 1e-9 and -math.log(32) - 1e-9 <= mean
            for rank, p, mean in zip(e.ranks, e.token_logprobs, e.means, strict=True)
        )

    for state in vars(drawn(OffState(noise=True))).values():
        assert all(possible(e) for e in state)


def test_noise_knows_nothing_of_anyone() -> None:
    states = drawn(OffState(noise=True), per_family=40)
    known, guessed = (gains(states, planted=p, share=False) for p in (True, False))
    assert np.mean(known) == pytest.approx(np.mean(guessed), abs=0.15)
    assert np.mean(guessed) < -1
