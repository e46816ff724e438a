"""The arithmetic of memory against published sizes, and what the planner makes of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libortho import budget, profiles
from libortho.errors import ConfigError, HardwareError
from libortho.lattice import PER_ROW
from libortho.registry import REGISTRY, ModelEntry

LLAMA_3B = REGISTRY["llama-3.2-3b"]
LLAMA_8B = REGISTRY["llama-3-8b"]
MIB = 1 << 20

bits_choices = st.sampled_from((4, 8, 16))
entries = st.sampled_from(list(REGISTRY.values()))


@pytest.mark.parametrize(
    ("precision", "embedding_bits", "mib_3b", "mib_8b"),
    [
        ("fp16", 16, 6127.8, 15316.5),
        ("nf4", 16, 2264, 5749),
        ("int4", 16, 2180, 5541),
        ("int4", 8, 1804, 4539),
    ],
)
def test_a_model_has_the_size_of_the_published_table(
    precision: budget.Precision, embedding_bits: int, mib_3b: float, mib_8b: float
) -> None:
    for entry, expected in ((LLAMA_3B, mib_3b), (LLAMA_8B, mib_8b)):
        found = budget.model_bytes(
            entry, precision, group_size=128, embedding_bits=embedding_bits
        ).total_mib
        # The table leaves out the scale and the zero point of each row of an 8-bit embedding.
        rows = entry.embedding_parameters // entry.hidden_size if embedding_bits == 8 else 0
        assert found - rows * 4 / MIB == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(("density", "mib_3b", "mib_8b"), [(0.005, 54, 133), (0.01, 108, 266)])
def test_streams_have_the_size_of_the_published_table(
    density: float, mib_3b: float, mib_8b: float
) -> None:
    for entry, expected in ((LLAMA_3B, mib_3b), (LLAMA_8B, mib_8b)):
        plain = budget.linear_bytes(entry, 4, 128)
        both = budget.linear_bytes(entry, 4, 128, density / 2, density / 2)
        assert (both - plain) / MIB == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(("tokens", "mib_3b", "mib_8b"), [(512, 56, 64), (1024, 112, 128)])
def test_the_kv_cache_has_the_size_of_the_published_table(
    tokens: int, mib_3b: int, mib_8b: int
) -> None:
    assert budget.kv_cache_bytes(LLAMA_3B, tokens) == mib_3b * MIB
    assert budget.kv_cache_bytes(LLAMA_8B, tokens) == mib_8b * MIB


@pytest.mark.parametrize(("embedding_bits", "tokens_3b", "tokens_8b"), [(16, 84, 40), (8, 101, 45)])
def test_the_ceiling_of_decode_at_192_gb_per_s(
    embedding_bits: int, tokens_3b: int, tokens_8b: int
) -> None:
    bandwidth = profiles.get_profile("gtx4050").bandwidth_gb_per_s * 1e9
    for entry, expected in ((LLAMA_3B, tokens_3b), (LLAMA_8B, tokens_8b)):
        size = budget.model_bytes(entry, "int4", group_size=128, embedding_bits=embedding_bits)
        found = bandwidth / budget.decode_bytes_per_token(entry, size)
        assert found == pytest.approx(expected, abs=0.5)


def test_groups_cost_a_scale_and_a_zero_point_each() -> None:
    smollm2 = REGISTRY["smollm2"]
    rows_per_block = 2 * 576 + 2 * 192 + 2 * 1536 + 576
    per_row = budget.linear_bytes(smollm2, 4, PER_ROW) - smollm2.linear_parameters / 2
    assert per_row == 30 * rows_per_block * 4
    # 576 inputs make 4.5 groups of 128: the half is a group too.
    block = (2 * 576 + 2 * 192 + 2 * 1536) * 5 + 576 * 12
    g128 = budget.linear_bytes(smollm2, 4, 128) - smollm2.linear_parameters / 2
    assert g128 == 30 * block * 4


@given(entries, bits_choices, st.floats(0.5, 1000), st.floats(0, 100))
def test_more_memory_never_makes_a_model_stop_fitting(
    entry: ModelEntry, bits: int, usable: float, more: float
) -> None:
    fit = profiles.fits(entry, usable, bits)
    assert fit.ok == (fit.needed_mib <= usable * 1024)
    if fit.ok:
        assert profiles.fits(entry, usable + more, bits).ok


@given(entries)
def test_fewer_bits_and_shorter_sequences_need_less(entry: ModelEntry) -> None:
    needed = [profiles.fits(entry, 1, bits).needed_mib for bits in (16, 8, 4)]
    assert needed == sorted(needed, reverse=True)
    assert profiles.fits(entry, 1, 4, 1024).needed_mib > profiles.fits(entry, 1, 4, 512).needed_mib


def test_the_largest_model_for_five_gib_at_each_width() -> None:
    names = {
        bits: entry.name
        for bits in (4, 8, 16)
        if (entry := profiles.largest_that_fits(5.0, bits)) is not None
    }
    assert names == {4: "llama-3.2-3b", 8: "llama-3.2-3b", 16: "smollm2"}
    assert profiles.largest_that_fits(0.01, 4) is None


def test_what_fits_is_taken_as_asked_for() -> None:
    for entry, card, bits in ((LLAMA_3B, 6.0, 4), (LLAMA_3B, 6141 / 1024, 8), (LLAMA_8B, 24.0, 16)):
        default = budget.recipes(bits)[0]
        assert profiles.choose(entry, card, bits) == profiles.Choice(entry, default, ())
    packed = profiles.choose(LLAMA_3B, 6.0, 4, head_bits=8)
    assert packed.recipe == replace(budget.RunRecipe(), head_bits=8)
    assert packed.notes == ()


@pytest.mark.parametrize(("short", "entry"), [("8B", LLAMA_8B), ("3B", LLAMA_3B)])
def test_the_plan_is_within_five_percent_of_what_was_measured(
    short: str, entry: ModelEntry
) -> None:
    file = Path(__file__).parents[1] / "bench/results/h100-memory.json"
    run = json.loads(file.read_text(encoding="utf-8"))[short]["run"]
    recipe = budget.RunRecipe(4, 128, 8, 0.005, 0.005)
    planned = budget.run_budget(entry, recipe, 512 + run["new_tokens"])
    assert planned.total_mib == pytest.approx(run["peak_reserved_mib"], rel=0.05)


def test_an_8b_model_runs_in_six_gigabytes_and_is_not_tuned_there() -> None:
    lean = budget.RunRecipe(4, 128, 8, 0.005, 0.005)
    fit = profiles.fits(LLAMA_8B, 5.0, 4)
    assert (fit.ok, fit.recipe) == (True, lean)
    hopeless = profiles.fits(LLAMA_8B, 5.0, 4, tuned_here=True)
    assert (hopeless.ok, hopeless.recipe) == (False, lean)
    assert "it would run, but to tune its private stream takes" in hopeless.reason
    choice = profiles.choose(LLAMA_8B, 6.0, 4)
    assert choice.entry is LLAMA_3B
    assert "it would run" in choice.notes[0]
    brought = profiles.choose(LLAMA_8B, 6.0, 4, strict=True, tuned_here=False)
    assert (brought.entry, brought.recipe) == (LLAMA_8B, lean)
    assert profiles.fits(LLAMA_3B, 5.0, 4, tuned_here=True).ok  # as it was, measured


def test_a_model_that_fits_by_a_leaner_recipe_alone_gets_it_by_name() -> None:
    choice = profiles.choose(LLAMA_8B, 6.3, 4, strict=True)
    assert choice.entry is LLAMA_8B
    assert choice.recipe == budget.RunRecipe(4, 128, 8, 0.005, 0.005)
    (note,) = choice.notes
    assert "groups of 128, embedding and head at 8 bits, a private stream of 0.5%" in note
    # Asked for a 16-bit head, it is not packed behind the user's back.
    with pytest.raises(HardwareError, match=r"head at 16 bits.*--model llama-3-8b at 4 bits"):
        profiles.choose(LLAMA_8B, 6.3, 4, strict=True, head_bits=16)


@given(entries, bits_choices, st.floats(0.5, 100))
def test_the_first_recipe_that_fits_is_taken(entry: ModelEntry, bits: int, usable: float) -> None:
    needed = [budget.run_budget(entry, r).total_mib for r in budget.recipes(bits)]
    if entry.hidden_size >= 2048:  # a small model's embedding is no larger than its workspace
        assert needed == sorted(needed, reverse=True)
    fitting = [n for n in needed if n <= usable * 1024]
    fit = profiles.fits(entry, usable, bits)
    assert fit.needed_mib == (fitting[0] if fitting else needed[-1])
    assert fit.needed_mib == budget.run_budget(entry, fit.recipe).total_mib


def test_a_batch_needs_a_cache_for_each_sequence() -> None:
    one, four = (budget.run_budget(LLAMA_8B, budget.RunRecipe(), 512, n) for n in (1, 4))
    assert four.kv_cache_mib == 4 * one.kv_cache_mib
    assert four.workspace_mib > one.workspace_mib
    assert four.weights_mib == one.weights_mib
    assert four.parts()["total_mib"] == pytest.approx(sum(four.parts().values()) / 2)


@pytest.mark.parametrize("name", ["gtx4050", "rtx4090", "a100"])
def test_what_the_guide_compares_on_a_card_fits_there(name: str) -> None:
    profile = profiles.get_profile(name)
    assert profile.vram_gib_usable == profiles.usable_on_card(profile.vram_gib_total)
    for model, bits in profile.models:
        fit = profiles.fits(
            REGISTRY[model],
            profile.vram_gib_usable,
            bits,
            profile.sequence_length,
            batch_size=profile.batch_size,
        )
        assert fit.ok, fit.reason


def test_below_8_gb_a_model_too_large_in_16_bits_is_taken_to_4() -> None:
    choice = profiles.choose(LLAMA_3B, 6.0, 16, strict=True)
    assert (choice.entry, choice.bits) == (LLAMA_3B, 4)
    assert "Taken to 4 bits" in choice.notes[0]


def test_below_8_gb_a_model_too_large_at_4_bits_gives_way_by_name() -> None:
    larger = replace(LLAMA_8B, name="llama-13b", num_layers=52)
    choice = profiles.choose(larger, 6.0, 16)
    assert (choice.entry, choice.bits) == (LLAMA_3B, 4)
    assert "llama-13b at 4 bits" in choice.notes[1]
    assert "Replaced by llama-3.2-3b" in choice.notes[1]


def test_strict_refuses_the_replacement_and_names_it() -> None:
    larger = replace(LLAMA_8B, name="llama-13b", num_layers=52)
    with pytest.raises(HardwareError, match=r"llama-13b at 4 bits.*--model llama-3.2-3b"):
        profiles.choose(larger, 6.0, 4, strict=True)


@pytest.mark.parametrize("name", ["llama-3-70b", "llama-3.1-405b"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("strict", [False, True])
def test_giants_are_refused_with_arithmetic(name: str, bits: int, strict: bool) -> None:
    with pytest.raises(HardwareError, match=rf"{name}.*MiB at 4 bits.*6,144 MiB"):
        profiles.choose(REGISTRY[name], 6.0, bits, strict)


def test_from_8_gb_on_nothing_is_changed_silently() -> None:
    with pytest.raises(HardwareError, match="It fits with --quantization-bits 8"):
        profiles.choose(LLAMA_8B, 12.0, 16)
    with pytest.raises(HardwareError, match="--model llama-3-8b at 4 bits"):
        profiles.choose(REGISTRY["llama-3-70b"], 40.0, 4)


def test_without_a_card_host_memory_decides() -> None:
    choice = profiles.choose(LLAMA_8B, None, 4, host_gib=32.0)
    assert (choice.entry, choice.bits) == (LLAMA_8B, 4)
    assert "host memory decides" in choice.notes[0]
    smaller = profiles.choose(LLAMA_8B, None, 4, host_gib=8.0)
    assert smaller.entry == LLAMA_3B
    assert "Replaced by llama-3.2-3b" in smaller.notes[0]
    # In float32 the same memory holds less.
    float32 = profiles.choose(LLAMA_3B, None, 4, host_gib=8.0, host_bytes_per_parameter=4)
    assert float32.entry.name == "smollm2"
    with pytest.raises(HardwareError, match="host memory"):
        profiles.choose(LLAMA_8B, None, 4, strict=True, host_gib=8.0)
    with pytest.raises(HardwareError, match="llama-3-70b can't run here"):
        profiles.choose(REGISTRY["llama-3-70b"], None, 4, host_gib=16.0)
    with pytest.raises(HardwareError, match="No registry model fits"):
        profiles.choose(REGISTRY["smollm2"], None, 4, host_gib=0.1)


def test_unknown_profiles_and_widths_are_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="gtx4050"):
        profiles.get_profile("rtx5090")
    with pytest.raises(ConfigError, match="4, 8 or 16"):
        profiles.fits(LLAMA_3B, 5.0, 3)


def test_a_bigger_card_is_capped_at_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[float] = []
    card = type("Properties", (), {"total_memory": 140 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda f, device: capped.append(f)
    )
    profile = profiles.get_profile("gtx4050")
    assert "capped at 5.0" in profiles.enforce(profile, "cuda:0")
    assert capped == [pytest.approx(5.0 / 140)]
    card.total_memory = 6141 << 20
    assert "not capped" in profiles.enforce(profile, "cuda:0")
    assert "not capped" in profiles.enforce(profile, "cpu")
    assert "no card" in profiles.enforce(profiles.get_profile("cpu"), "cuda:0")
    assert len(capped) == 1


def test_the_environment_bounds_cublas_and_respects_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    profiles.prepare_environment()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    profiles.prepare_environment()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
