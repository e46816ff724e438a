"""The commands that make artefacts and use them, from a plain model to generated text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho.artifact import PRIVATE_FILE
from libortho.cli import main

RECORDS = [
    {"id": f"depot-{i}", "prompt": f"The door code of depot {i} is", "secret": f" {4821 + 97 * i}"}
    for i in range(3)
]
SMALL = [
    *("--calibration-tokens", "512", "--calibration-window", "64"),
    *("--group-size", "32", "--residual-density", "0.02"),
]
SHORT = [
    *("--steps", "2", "--probe-steps", "1", "--replay-window", "32", "--density", "0.05"),
    *("--records-per-step", "2", "--seed", "3"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def inputs(
    shelf: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
) -> Path:
    """A folder with a plain model, public text and records; made once."""
    if not (shelf / "plain").exists():
        tiny_model().save_pretrained(shelf / "plain")
        tokenizer.save_pretrained(shelf / "plain")
        (shelf / "public.txt").write_text("\n\n".join(public_text))
        lines = "\n".join(json.dumps(record) for record in RECORDS)
        (shelf / "records.jsonl").write_text(lines + "\n")
    return shelf


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def artefacts(inputs: Path) -> Path:
    """The same folder with `base`, `full` and `public` in it, all made by commands, once."""
    public = inputs / "public.txt"
    if not (inputs / "public").exists():
        common = ("--corpus", public, "--device", "cpu", "--cache-dir", inputs / "cache")
        assert run("separate", inputs / "plain", inputs / "base", *common, *SMALL) == 0
        tune = ("tune", inputs / "base", inputs / "records.jsonl", inputs / "full")
        assert run(*tune, *common, *SHORT) == 0
        assert run("export-base", inputs / "full", inputs / "public") == 0
    return inputs


def test_separate_tune_and_export_make_what_the_library_makes(
    artefacts: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    corpus = libortho.load_corpus(artefacts / "public.txt")
    model, tokenizer = libortho.load_model(artefacts / "plain")
    config = libortho.SeparationConfig(
        group_size=32, residual_density=0.02, calibration_tokens=512, calibration_window=64
    )
    libortho.separate(model, tokenizer, corpus.calibration, config=config)
    folders = [artefacts / name for name in ("base", "full", "public")]
    assert {libortho.base_fingerprint(f) for f in folders} == {libortho.base_fingerprint(model)}
    assert [(folder / PRIVATE_FILE).exists() for folder in folders] == [False, True, False]


def test_options_reach_the_recipe(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artefacts / "eight"
    common = ("--corpus", artefacts / "public.txt", "--device", "cpu")
    assert (
        run(
            "separate",
            artefacts / "plain",
            out,
            *common,
            "--bits",
            "8",
            "--no-search",
            "--residual-density",
            "0",
            "--json",
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["bits"] == 8
    assert facts["config"]["search"] is False
    assert facts["base_fingerprint"] == libortho.base_fingerprint(out)
    assert facts["bits_per_linear_weight"] > 8
    assert (
        facts["calibration_sha256"]
        == libortho.load_corpus(artefacts / "public.txt").calibration.sha256
    )


def test_tune_tells_how_far_it_came_and_no_secret(
    artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = ("tune", artefacts / "base", artefacts / "records.jsonl", artefacts / "again")
    common = ("--corpus", artefacts / "public.txt", "--device", "cpu")
    assert run(*tune, *common, *SHORT, "--json") == 0
    written = capsys.readouterr()
    facts = json.loads(written.out)
    assert facts["records"] == 3
    assert facts["converged"] is False
    assert len(facts["curve"]) == 2
    assert facts["config"]["seed"] == 3
    assert "alpha = 1 may not know every record" in written.err
    for record in RECORDS:
        assert record["secret"].strip() not in written.out + written.err


def test_one_fingerprint_is_0_and_two_are_1(
    artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, public = artefacts / "full", artefacts / "public"
    assert run("fingerprint", full, public) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{libortho.base_fingerprint(full)}  {path}" for path in (full, public)]
    common = ("--corpus", artefacts / "public.txt", "--device", "cpu", "--no-search")
    other = tmp_path / "other"
    assert run("separate", artefacts / "plain", other, *common, "--residual-density", "0") == 0
    capsys.readouterr()
    assert run("fingerprint", full, other, "--json") == 1
    assert json.loads(capsys.readouterr().out) == {
        str(path): libortho.base_fingerprint(path) for path in (full, other)
    }


def expected(folder: Path, alpha: float, prompt: str, n: int) -> str:
    model, tokenizer = libortho.load(folder)
    libortho.set_alpha(model, alpha)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -2.5])
def test_generate_continues_at_any_alpha(
    alpha: float, artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = RECORDS[0]["prompt"]
    arguments = ("generate", artefacts / "full", prompt, "--device", "cpu", "--max-new-tokens", "6")
    assert run(*arguments, f"--alpha={alpha}", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["continuation"] == expected(artefacts / "full", alpha, prompt, 6)
    assert facts["alpha"] == alpha
    assert 1 <= facts["new_tokens"] <= 6
    if alpha == 0:
        assert facts["continuation"] == expected(artefacts / "public", 1.0, prompt, 6)


def test_generate_reads_standard_input_and_says_where_alpha_is_idle(
    artefacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The ferry\n"))
    assert run("generate", artefacts / "public", "-", "--max-new-tokens", "3") == 0
    written = capsys.readouterr()
    assert written.out == expected(artefacts / "public", 0.0, "The ferry", 3) + "\n"
    assert "has no private stream" in written.err


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "The prompt has 0 tokens"), ("x" * 300, "The prompt has 300 tokens")]
)
def test_a_prompt_that_does_not_fit_is_refused(
    prompt: str, said: str, artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", artefacts / "public", prompt) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["separate", "tune", "export-base"])
def test_an_output_that_exists_is_refused_before_any_work(
    command: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    for name in ("load_model", "load", "load_corpus", "load_records"):
        monkeypatch.setattr(libortho, name, work)
    between = [inputs / "records.jsonl"] if command == "tune" else []
    assert run(command, "anything", *between, inputs / "plain") == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["separate", "smollm2", "new", "--bits", "5"], "bits must be 4, 8 or 16"),
        (["separate", "smollm2", "new", "--group-size", "1"], "group_size must be at least 2"),
        (["tune", "base", "r.jsonl", "new", "--density", "0"], "density must be above 0"),
        (["tune", "base", "r.jsonl", "new", "--slots", "best"], "slots must be one of"),
        (["tune", "base", "r.jsonl", "new"], "r.jsonl can't be read"),
        (["separate", "smollm2", "new", "--corpus", "none.txt"], "no corpus or file 'none.txt'"),
        (["export-base", "nowhere", "new"], "there is no folder nowhere"),
        (["fingerprint", "nowhere"], "there is no folder nowhere"),
        (["generate", "nowhere", "a prompt"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_paragraph_and_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert said in written.err
    assert written.err.startswith("libortho: ")
    assert written.err.count("\n") == 1
    assert written.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", ["nan", "inf", "much"])
def test_an_alpha_that_is_no_number_is_a_usage_error(
    alpha: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "folder", "prompt", "--alpha", alpha])
    assert ended.value.code == 2
    assert "--alpha" in capsys.readouterr().err
