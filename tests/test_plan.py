"""What a small card makes of a request: fewer bits, another model, or a refusal."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.plan import Plan, plan_of
from libortho import budget, hardware
from libortho.budget import recipes
from libortho.errors import HardwareError
from libortho.registry import REGISTRY, entry_from_config
from libortho.settings import SETTINGS, Settings

LLAMA_3B_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "resolve_device", lambda asked: "cuda")


def asked_for(**values: Any) -> Settings:
    every = {setting.key: setting.default for setting in SETTINGS} | values
    return Settings(every, dict.fromkeys(every, "default"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "Llama-3.2-3B"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(LLAMA_3B_CONFIG))
    return target


def test_what_fits_runs_as_it_was_asked_for(folder: Path) -> None:
    unquantised, default = recipes(16)[0], recipes(4)[0]
    assert plan_of(asked_for(model="smollm2", quantization_bits=16)) == Plan(
        "smollm2", unquantised, ()
    )
    assert plan_of(asked_for(model=str(folder))) == Plan(str(folder), default, ())
    packed = plan_of(asked_for(model=str(folder), head_bits=8))
    assert packed == Plan(str(folder), replace(default, head_bits=8), ())


def test_a_folder_is_judged_by_its_geometry(folder: Path) -> None:
    plan = plan_of(asked_for(model=str(folder), quantization_bits=16))
    assert (plan.model, plan.bits) == (str(folder), 4)
    assert "Taken to 4 bits" in plan.notes[0]


def test_a_model_that_is_too_large_is_replaced_and_named() -> None:
    plan = plan_of(asked_for(model="llama-3-8b", quantization_bits=8, head_bits=16))
    assert (plan.model, plan.recipe) == ("llama-3.2-3b", recipes(4)[0])
    assert "Taken to 4 bits" in plan.notes[0]
    assert "Replaced by llama-3.2-3b" in plan.notes[1]


def test_a_model_that_needs_a_leaner_recipe_gets_it_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "_TRAINED_BYTES", 0)  # it runs in 6 GB, and can't be tuned there
    plan = plan_of(asked_for(model="llama-3-8b"))
    assert plan.model == "llama-3-8b"
    assert (plan.recipe.head_bits, plan.recipe.group_size) == (8, 128)
    assert "embedding and head at 8 bits" in plan.notes[-1]


def test_a_strict_run_replaces_nothing() -> None:
    with pytest.raises(HardwareError, match=r"llama-3-8b at 4 bits .* needs"):
        plan_of(asked_for(model="llama-3-8b", strict_model=True, head_bits=16))


def test_a_hub_id_is_taken_on_trust() -> None:
    assert plan_of(asked_for(model="owner/model", quantization_bits=8)) == Plan(
        "owner/model", recipes(8)[0], ()
    )
    packed = plan_of(asked_for(model="owner/model", head_bits=8))
    assert packed.recipe == replace(recipes(4)[0], head_bits=8)


def test_a_configuration_gives_the_geometry_of_the_registry() -> None:
    known = asdict(REGISTRY["llama-3.2-3b"])
    read = entry_from_config("llama-3.2-3b", LLAMA_3B_CONFIG)
    assert read is not None
    elsewhere = ("hub_id", "revision", "licence", "gated")
    assert {k: v for k, v in asdict(read).items() if k not in elsewhere} == {
        k: v for k, v in known.items() if k not in elsewhere
    }
    assert read.linear_parameters == REGISTRY["llama-3.2-3b"].linear_parameters


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_configuration_of_another_kind_gives_none(missing: str) -> None:
    config = {k: v for k, v in LLAMA_3B_CONFIG.items() if k != missing}
    assert entry_from_config("other", config) is None
