"""`plan`: the library's arithmetic as a table and as JSON, for any model that can be sized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from libortho.budget import RunRecipe, run_budget
from libortho.cli import main
from libortho.registry import REGISTRY


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def llama_config(**changes: Any) -> dict[str, Any]:
    entry = REGISTRY["llama-3.2-3b"]
    return {
        "hidden_size": entry.hidden_size,
        "intermediate_size": entry.intermediate_size,
        "num_hidden_layers": entry.num_layers,
        "num_attention_heads": entry.num_attention_heads,
        "num_key_value_heads": entry.num_kv_heads,
        "head_dim": entry.head_dim,
        "vocab_size": entry.vocab_size,
        "tie_word_embeddings": True,
        "max_position_embeddings": entry.max_position,
        **changes,
    }


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["llama-3.2-3b"], 0),
        (["llama-3.2-3b", "--bits", "16"], 1),
        (["llama-3-8b", "--bits", "4"], 0),
        (["llama-3-8b", "--bits", "4", "--head-bits", "16"], 1),
        (["llama-3-8b", "--bits", "4", "--batch", "4"], 1),
        (["llama-3-8b", "--bits", "4", "--vram", "8"], 0),
        (["llama-3-8b", "--bits", "4", "--context", "8000"], 1),
    ],
)
def test_the_exit_code_says_whether_it_fits(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found, facts = planned(capsys, *arguments)
    assert found == code
    assert any(plan["fits"] for plan in facts["plans"]) == (code == 0)
    assert main(["plan", *arguments]) == code


def test_the_parts_are_the_budgets_and_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = planned(capsys, "llama-3.2-3b", "--context", "1024")
    assert [plan["bits"] for plan in facts["plans"]] == [4, 8, 16]
    for plan in facts["plans"]:
        parts = dict(plan["parts_mib"])
        total = parts.pop("total_mib")
        assert total == pytest.approx(sum(parts.values()))
        budget = run_budget(REGISTRY["llama-3.2-3b"], RunRecipe(**plan["recipe"]), 1024)
        assert total == budget.total_mib
    main(["plan", "llama-3.2-3b", "--context", "1024"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("in all")]
    assert [float(x.replace(",", "")) for x in line.split()[2:]] == [
        round(plan["parts_mib"]["total_mib"]) for plan in facts["plans"]
    ]


def test_the_ceiling_grows_with_the_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("llama-3-8b", "--bits", "4", "--vram", "8", "--bandwidth")
    ceilings = [
        planned(capsys, *asked, bandwidth)[1]["plans"][0]["decode_ceiling_tokens_per_s"]
        for bandwidth in ("192", "384")
    ]
    assert ceilings[1] == pytest.approx(2 * ceilings[0])
    assert 30 < ceilings[0] < 40


def test_a_folder_is_sized_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config()))
    _, mine = planned(capsys, str(folder))
    _, known = planned(capsys, "llama-3.2-3b")
    assert mine.pop("model") == "mine"
    known.pop("model")
    for plan in (*mine["plans"], *known["plans"]):
        plan.pop("reason")  # it names the model
    assert mine == known


def test_a_hub_model_is_sized_if_its_config_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    cached = {"owner/llama": str(tmp_path / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, _: cached.get(name))
    code, facts = planned(capsys, "owner/llama")
    assert (code, facts["model"]) == (0, "owner/llama")
    assert main(["plan", "owner/other"]) == 2
    assert "no hub model whose config.json is cached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        ("nothing here", None, "The geometry of 'nothing here' is not known"),
        ("gpt", {"n_embd": 768}, "without the sizes of a Llama-like model"),
        ("broken", None, "no config.json"),
    ],
)
def test_what_cannot_be_sized_is_refused(
    model: str,
    config: dict[str, Any] | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if model != "nothing here":
        (tmp_path / model).mkdir()
        if config is not None:
            (tmp_path / model / "config.json").write_text(json.dumps(config))
        model = str(tmp_path / model)
    assert main(["plan", model]) == 2
    assert said in capsys.readouterr().err


def test_more_context_than_the_model_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2", "--context", "8193"]) == 2
    assert "8,192 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--vram", "0"], ["--vram", "nan"], ["--vram", "six"], ["--bits", "5"], ["--context", "0.5"]],
)
def test_a_value_that_makes_no_sense_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "smollm2", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
