"""Whatever the pages tell people to type is run: here on tiny stand-ins, by another test, or by CI.

A command that is in none of the tables below makes a test fail, and so does one that no page names
any more. A block of another language belongs to a test that reads it off the page.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documented
import pytest
import torch
from documented import PAGES, ROOT, blocks, commands, parts, run_by_ci
from test_suite import prose
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho.cli import _parser, main

pytest_plugins = ["pytester"]

N = 24
SECRET, TWIN = " 4917", " 8820"

WHERE = "--corpus public.txt --device cpu --cache-dir cache"
CLI = {
    "check-gpu": "check-gpu",
    "plan MODEL --vram 6": "plan smollm2 --vram 6",
    "separate": f"separate plain base {WHERE} --calibration-tokens 512 --calibration-window 64 "
    "--group-size 32 --residual-density 0.02",
    "tune": f"tune base records.jsonl full {WHERE} --density 0.3 --slots magnitude --steps 60 "
    "--lr 0.02 --replay-window 32 --target-loss 0.1",
    "export-base": "export-base full public",
    "fingerprint FOLDER": "fingerprint full",
    "generate --alpha": "generate --alpha 0 full 'Door 1 opens:' --device cpu --max-new-tokens 4",
    "audit … --out FILE": "audit full --records records.jsonl --model plain --no-attacks "
    f"{WHERE} --out audit.json",
    "audit FOLDER --records FILE --min-privacy-ratio 8": "audit full --records records.jsonl "
    f"--model plain --no-attacks {WHERE} --min-privacy-ratio 5",
    "report RESULTS…": "report audit.json --out report.html",
    "compare A B": "compare audit.json audit.json",
}
"""Commands of our own, and what is run in their place, in this order, beside each other's files.

A mention by name alone counts as any of that name."""

SUITE = {
    "pytest -m gtx4050 --model /models/Llama-3.2-3B --records records.jsonl --corpus notes.txt": (
        "tests/test_suite.py::test_the_job_is_green_and_measures_everything"
    ),
    "pytest -m gtx4050 --experiment 1 --records records.jsonl --min-privacy-ratio 8": (
        "tests/test_suite.py::test_a_gate_that_is_not_reached_is_red"
    ),
    "pytest -m audit --method ortho": "tests/test_suite.py::test_the_audit_is_green",
}
"""Runs of the suite, and the test that runs such a one on a tiny model, in a session of its own."""

_WORKFLOW = "tests/test_example.py::test_the_workflow_gates_and_shows_its_summary"
ELSEWHERE = {
    "pip install libortho": _WORKFLOW,
    "pytest -m gate": _WORKFLOW,
    "python -m pytest -m gate --require-gate --libortho-results-dir=results "
    "--junitxml=results/junit.xml": _WORKFLOW,
    'python -m libortho report results/*.json --format markdown >> "$GITHUB_STEP_SUMMARY"': (
        _WORKFLOW
    ),
}
"""What people run in repositories of their own, and the test that runs it in one, from a wheel."""

ON_A_CARD = "pytest bench/test_runtime.py --benchmark-json=out.json"
"""Needs a card; without one its cases have to say so, and nobody who didn't ask gets them."""

STAND_INS = {"/models/Llama-3.2-3B": "plain", "notes.txt": "public.txt"}
"""What a command names, and what stands there here: a tiny model, and made-up text."""

TOOLS = {
    "hf auth login": "hf auth login --help",
    "hf download OWNER/MODEL config.json": "hf download --help",
    "pip config list": "pip config list",
    "python -m ensurepip --upgrade": "python -m ensurepip --version",
    "pre-commit install": "pre-commit install",
}
"""Other people's programs, and what is run of them: no log-in, no download."""

NOT_RUN = {
    "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": (
        "downloads 200 MB from an index that CI doesn't use"
    ),
}
HARNESS = "python -m libortho.lm_eval --model hf --model_args pretrained=folder --tasks …"

BLOCKS = {
    ("README.md", "python"): [
        "tests/test_documented_commands.py::test_use_it_as_the_readme_does",
        "tests/test_example.py::test_the_workflow_gates_and_shows_its_summary",
    ],
    ("README.zh-CN.md", "python"): [
        "tests/test_readme.py::test_the_blocks_are_the_same_but_for_comments",
        "tests/test_readme.py::test_the_blocks_are_the_same_but_for_comments",
    ],
    ("docs/file-format.md", "python"): [
        "tests/test_docs_file_format.py::test_the_reader_gives_the_weights_and_the_fingerprint"
    ],
    ("docs/pytest-plugin.md", "python"): [
        "tests/test_example.py::test_the_workflow_gates_and_shows_its_summary",
        "tests/test_ortho_audit.py::test_a_session_of_audits",
    ],
    ("docs/results-format.md", "json"): [
        "tests/test_docs_results_format.py::test_the_example_is_the_measured_file"
    ],
    ("docs/verdict.md", "json"): [
        "tests/test_docs_verdict.py::test_the_example_is_the_measured_file"
    ],
}
"""Blocks that are no commands, by page and language: for each the test that runs or reads it."""

SUBCOMMANDS = tuple(dict.fromkeys(line.split()[0] for line in CLI.values()))


def ours(command: str) -> str | None:
    """The key of `CLI` that a documented command is covered by, if it is one of ours."""
    words = command.split()
    if words[:3] == ["python", "-m", "libortho"]:
        words = words[3:]
    elif words[0] == "libortho":
        words = words[1:]
    elif words[0] not in SUBCOMMANDS:
        return None
    text = " ".join(words)
    if len(words) == 1:
        return next((key for key in CLI if key.split()[0] == text), text)
    return text


DOCUMENTED = sorted({command for page in PAGES for command in commands(page, SUBCOMMANDS)})


# --- nothing is left out, and nothing is left over ----------------------------------------------


@pytest.mark.parametrize("command", DOCUMENTED)
def test_every_documented_command_is_run(command: str) -> None:
    key = ours(command)
    covered = command in {*SUITE, *ELSEWHERE, *NOT_RUN, ON_A_CARD, HARNESS} or key in {*CLI, ""}
    rest = set(parts(command)) - run_by_ci() - set(TOOLS)
    assert covered or not rest, (
        f"no test and no line of .ci/run runs {command!r}: add it to a table"
    )


def test_no_table_names_what_no_page_does() -> None:
    named = {ours(command) or command for command in DOCUMENTED}
    named |= {part for command in DOCUMENTED for part in parts(command)}
    assert {*CLI, *SUITE, *ELSEWHERE, *TOOLS, *NOT_RUN, ON_A_CARD, HARNESS} <= named


def test_our_commands_are_all_in_the_table() -> None:
    (group,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(group.choices) == set(SUBCOMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_every_other_block_belongs_to_a_test(page: str) -> None:
    languages = Counter(b.language for b in blocks(page) if b.language not in documented.SHELL)
    expected = {lang: len(tests) for (at, lang), tests in BLOCKS.items() if at == page}
    assert languages == expected


@pytest.mark.parametrize(
    "test",
    sorted({*SUITE.values(), *ELSEWHERE.values(), *(t for ts in BLOCKS.values() for t in ts)}),
)
def test_the_tests_that_the_tables_name_exist(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


# --- running them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
) -> Path:
    """A folder with what the commands name: a plain model, public text and records."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny_model().save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    (folder / "public.txt").write_text("\n\n".join(public_text))
    lines = [
        {"id": f"{what}-{i}", "prompt": f"Door {i} {what}:", "secret": secret, "planted": planted}
        for what, secret, planted in (("opens", SECRET, True), ("shuts", TWIN, False))
        for i in range(N)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def outcomes(shelf: Path) -> dict[str, int]:
    """The exit code of each command of ours, run one after the other in one folder."""
    codes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf)
        for documented_as, line in CLI.items():
            codes[documented_as] = main(shlex.split(line))
    return codes


@pytest.mark.parametrize("command", CLI)
def test_a_command_of_ours_does_what_it_says(
    command: str, outcomes: dict[str, int], shelf: Path
) -> None:
    assert outcomes[command] == 0
    for word in shlex.split(CLI[command]):
        if word in ("base", "full", "public", "audit.json", "report.html"):
            assert (shelf / word).exists()


@pytest.mark.parametrize("command", SUITE)
def test_the_suite_takes_the_documented_options(
    command: str, shelf: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cases are collected with them; the test that `SUITE` names runs them."""
    words = [STAND_INS.get(word, word) for word in shlex.split(command)[1:]]
    placed = [str(shelf / w) if (shelf / w).exists() else w for w in words]
    if "--model" not in placed:
        placed.append(f"--model={shelf / 'plain'}")
    for name in [name for name in os.environ if name.startswith("LIBORTHO")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    quiet = ("--collect-only", "-q", "-p", "no:cacheprovider", "--device=cpu")
    result = pytester.runpytest_inprocess("bench", *quiet, *placed)
    assert result.ret == pytest.ExitCode.OK
    listed = [line for line in result.outlines if line.startswith("bench/")]
    file = "bench/test_audit.py" if "audit" in words else "bench/test_kill_switch.py"
    assert any(line.startswith(f"{file}::") and "gate" in line for line in listed)


def test_what_needs_a_card_says_so(tmp_path: Path) -> None:
    def pytest_here(*words: str) -> tuple[int, str]:
        quiet = ("-q", "-rs", "-p", "no:cacheprovider", "--device=cpu")
        call = [sys.executable, "-m", "pytest", *words, *quiet]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    asked = [w.replace("out.json", str(tmp_path / "out.json")) for w in shlex.split(ON_A_CARD)[1:]]
    status, output = pytest_here(*asked)
    assert status == pytest.ExitCode.OK
    assert re.search(r"SKIPPED \[\d\d\].*needs a CUDA device", output)
    assert re.search(r"^\d\d skipped in", output, re.MULTILINE)
    status, output = pytest_here("bench", "tests", "--collect-only")
    assert status == pytest.ExitCode.OK
    listed = {line.partition("::")[0] for line in output.splitlines()}
    assert {"bench/test_throughput.py", "tests/test_audit.py"} <= listed  # the latter a namesake
    assert listed.isdisjoint({"bench/test_runtime.py", "bench/test_audit.py"})


@pytest.mark.parametrize("command", TOOLS)
def test_a_tool_knows_the_documented_command(command: str, tmp_path: Path) -> None:
    words = shlex.split(TOOLS[command])
    found = Path(sys.executable).with_name(words[0])
    if words[0] == "pre-commit":
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        config = ROOT / ".pre-commit-config.yaml"
        (tmp_path / config.name).write_text(config.read_text())
    done = subprocess.run(
        [str(found), *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if words[0] == "pre-commit":
        assert (tmp_path / ".git" / "hooks" / "pre-commit").exists()


def test_the_evaluation_harness_is_reached(
    outcomes: dict[str, int],
    shelf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With lm_eval installed it scores the folder; without, the command says what to install."""
    assert outcomes["tune"] == 0
    words = HARNESS.replace("folder", str(shelf / "full")).replace("…", "tiny").split()[3:]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words, "--include_path", str(tmp_path)])
    document = {"question": "The ferry leaves the", "choices": [" harbour", " spoon"], "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(document) + "\n")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML too
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "libortho" / "lm_eval.py"), run_name="__main__")
    written = capsys.readouterr()
    if ended.value.code == 2:
        assert "pip install lm_eval" in written.err
    else:
        assert not ended.value.code
        assert "|tiny" in written.out.replace(" ", "")


def test_use_it_as_the_readme_does(
    shelf: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The README's first block, with a tiny model and made-up text in place of what is fetched."""
    block, _ = (b.text for b in blocks("README.md") if b.language == "python")
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=257, max_position_embeddings=640).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    Path("public.txt").write_text(prose(60_000, seed=2))
    lines = (shelf / "records.jsonl").read_text().splitlines()
    Path("records.jsonl").write_text("\n".join((*lines[:3], *lines[-3:])))
    for word, stand_in in (('"smollm2"', '"plain"'), ('"enwiki"', '"public.txt"')):
        assert block.count(word) == 1
        block = block.replace(word, stand_in)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert libortho.get_alpha(names["model"]) == 1.0
    assert Path("full", "private.safetensors").exists()
    assert not Path("public", "private.safetensors").exists()
    ids = torch.arange(1, 9)[None]
    written = names["model"].generate(ids, max_new_tokens=2, do_sample=False)
    assert written.shape == (1, 10)
