"""The model card says what the artefact is and what was measured on it, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

import libortho
from libortho.card import CARD_FILE, model_card
from libortho.errors import ArtifactError
from libortho.layout import BASE_FILE
from libortho.provenance import collect_provenance
from libortho.results import ArmResult, KillSwitchResult, NullTestResult, Results, write_results


@pytest.fixture(scope="module")
def folder(
    separated_model: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return libortho.save(separated_model(), tmp_path_factory.mktemp("card") / "saved")


def results(fingerprint: str | None, *, null_test: bool = True, **changes: Any) -> Results:
    where = collect_provenance(
        command=[],
        cpu_model="test",
        cpu_cores=2,
        device_name="cpu",
        compute_dtype="float32",
        now=datetime(2026, 3, 4, tzinfo=UTC),
    )
    shared: dict[str, Any] = {
        **{"model": "a-model", "quantization": True, "quantization_bits": 4, "seed": 0},
        "config": {},
    }
    first = KillSwitchResult(
        **shared,
        method="ortho",
        base_fingerprint=fingerprint or "",
        fingerprint_equal=True,
        alpha0_source="exported base, reloaded from disk",
        n_planted=40,
        n_twins=38,
        records_source="test",
        record_hashes=(),
        per_family={},
        hits_alpha1=39,
        hits_alpha0=1,
        privacy_ratio_lower95=9.876,
        loss_planted_alpha0=2.9504,
        min_privacy_ratio=8.0,
        verdict="passes",
        verdict_reason="39 of 40 extracted",
    )
    second = NullTestResult(
        **shared,
        corpus="notes | <b>mine</b>",
        corpus_sha256="0" * 64,
        calibration_corpus="enwiki",
        calibration_sha256="1" * 64,
        windows=50,
        window_tokens=512,
        batch_size=1,
        arms={"nf4": ArmResult(precision="not measured", ppl=30.5)},
        max_ppl_ratio=1.12,
        verdict="fails",
        verdict_reason="the ratio is too large",
    )
    return Results(
        provenance=where,
        exp1_kill_switch=None if fingerprint is None else dataclasses.replace(first, **changes),
        exp2_null_test=second if null_test else None,
    )


def explained(section: Any) -> Any:
    """A section with a reason for whatever is null in it, as a results file demands."""
    nulls = [f.name for f in dataclasses.fields(section) if getattr(section, f.name) is None]
    return dataclasses.replace(section, reasons=dict.fromkeys(nulls, "not measured here"))


def test_a_saved_folder_has_a_card_with_recipe_and_fingerprint(folder: Path) -> None:
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    assert libortho.base_fingerprint(folder) in text
    assert "| group size | 32 |" in text
    assert "Nothing was measured" in text
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["libortho", "4-bit"]
    # Its own snippet names a file that is there.
    assert BASE_FILE in text
    assert (folder / BASE_FILE).exists()


def test_measured_verdicts_come_onto_the_card(folder: Path, tmp_path: Path) -> None:
    measured = results(libortho.base_fingerprint(folder))
    path = model_card(folder, measured, base_model="owner/model", license="apache-2.0")
    assert path == folder / CARD_FILE
    text = path.read_text(encoding="utf-8")
    assert "**Kill switch: passes.** 39 of 40 extracted." in text
    assert "| records planted / twins | 40 / 38 |" in text
    assert "| privacy ratio, 95 % lower limit | 9.88 |" in text
    assert "| loss on twins at alpha = 0, nats/token | not measured |" in text
    assert "**Null test: fails.**" in text
    assert "| nf4 | 30.500 | not measured |" in text
    assert "Nothing was measured" not in text
    assert ModelCard(text).data.base_model == "owner/model"
    libortho.load(folder)  # a card is not part of what is verified

    first = explained(measured.exp1_kill_switch)
    only_first = dataclasses.replace(measured, exp1_kill_switch=first, exp2_null_test=None)
    file = write_results(explained(only_first), tmp_path)
    again = model_card(folder, file).read_text(encoding="utf-8")
    assert "**Kill switch: passes.**" in again
    assert "Null test" not in again


def test_names_of_users_stay_text(folder: Path) -> None:
    text = model_card(folder, results(None)).read_text(encoding="utf-8")
    assert "notes \\| &lt;b&gt;mine&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "states no fingerprint" in text


def test_results_of_another_base_are_refused(folder: Path) -> None:
    before = (folder / CARD_FILE).read_bytes()
    with pytest.raises(ArtifactError, match="another base"):
        model_card(folder, results("f" * 64))
    with pytest.raises(ArtifactError, match="no experiment"):
        model_card(folder, results(None, null_test=False))
    assert (folder / CARD_FILE).read_bytes() == before


def test_what_is_no_artefact_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no libortho\.json"):
        model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []
