"""The command line as a whole, and check-gpu: what is printed, and how every ending ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from libortho import cli, hardware
from libortho.cli import machine as machine_commands
from libortho.cli.output import columns
from libortho.errors import HardwareError
from libortho.registry import REGISTRY

RTX_4050 = hardware.Card(
    index=0,
    name="NVIDIA GeForce RTX 4050 Laptop GPU",
    compute_capability=(8, 9),
    total_mib=6141,
    free_mib=5800,
    tensor_cores="fp16, bf16, tf32, fp8",
    memory_bandwidth_gb_per_s=192.0,
    driver="580.65.06",
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the machine these cards, none of which torch can use."""

    def install(*cards: hardware.Card) -> None:
        monkeypatch.setattr(hardware, "cards", lambda: list(cards))
        monkeypatch.setattr(hardware, "why_no_gpu", lambda: "torch is a build without CUDA.")

    return install


def test_check_gpu_runs_as_a_module_and_writes_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "libortho", "check-gpu", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {model["name"] for model in facts["models"]} == set(REGISTRY)
    assert facts["cpu"]["logical_cores"] >= 1
    assert facts["torch"]["gpu_usable"] == (facts["why_no_gpu"] is None)


def test_without_a_card_the_profile_and_the_host_decide(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    assert cli.main(["check-gpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cards"] == []
    assert facts["card_memory"]["usable_mib"] == 5120
    assert "gtx4050" in facts["card_memory"]["basis"]
    fits = {
        model["name"]: {bits: cell["fits"] for bits, cell in model["card"].items()}
        for model in facts["models"]
    }
    assert fits["smollm2"] == {"16": True, "8": True, "4": True}
    assert fits["llama-3.2-3b"] == {"16": False, "8": True, "4": True}
    assert fits["llama-3-8b"] == {"16": False, "8": False, "4": True}
    assert fits["llama-3-70b"] == {"16": False, "8": False, "4": False}


def test_a_card_is_shown_with_its_facts_and_decides(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(RTX_4050)
    assert cli.main(["check-gpu"]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "RTX 4050" in line and "8.9" in line]
    for fact in ("6,141", "5,800", "fp16, bf16, tf32, fp8", "192", "580.65.06"):
        assert fact in line
    assert "torch is a build without CUDA." in text
    assert "5,117 MiB usable (card 0" in text
    for name in REGISTRY:
        assert name in text


def test_a_card_that_hides_its_memory_is_shown_as_unknown(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(hardware.Card(0, "NVIDIA GB10", None, None, None, "unknown", None, None))
    assert cli.main(["check-gpu"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA GB10  unknown" in text
    assert "profile gtx4050" in text


def test_columns_are_aligned() -> None:
    lines = columns([["a", "bbb", "c"], ["aaaa", "b", "c"]])
    assert lines == ["  a     bbb  c", "  aaaa  b    c"]


def test_a_refusal_is_one_paragraph_on_stderr_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise HardwareError("The card is asleep. Wake it.")

    monkeypatch.setattr(machine_commands, "gather_facts", refuse)
    assert cli.main(["check-gpu"]) == 2
    written = capsys.readouterr()
    assert written.err == "libortho: The card is asleep. Wake it.\n"
    assert written.out == ""


def test_an_interrupt_ends_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine_commands, "gather_facts", interrupt)
    assert cli.main(["check-gpu"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["check-cpu"], ["check-gpu", "--yaml"]])
def test_a_wrong_command_line_exits_2_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m libortho" in capsys.readouterr().err


def test_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("libortho ")


COMMANDS = (
    "check-gpu",
    "plan",
    "separate",
    "tune",
    "export-base",
    "fingerprint",
    "generate",
    "audit",
    "report",
    "compare",
)


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    for command in COMMANDS:
        assert f"    {command}" in text
    assert "Exit codes: 0 done or yes; 1 the answer is no" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_has_examples_that_parse_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = helped(capsys, command)
    assert "exit codes: 0 " in text
    assert "130 interrupted" in text
    examples = [line.strip() for line in text.splitlines() if line.startswith("  libortho ")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" >")[0].partition(" <")[0])
        options = cli._parser().parse_args(words[1:])
        assert words[1] == command
        assert callable(options.run)


def test_an_error_of_several_lines_is_told_as_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise HardwareError("One line.\n  Another.")

    monkeypatch.setattr(machine_commands, "gather_facts", refuse)
    assert cli.main(["check-gpu"]) == 2
    assert capsys.readouterr().err == "libortho: One line. Another.\n"


def test_a_reader_that_goes_away_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert cli.main(["check-gpu", "--json"]) == 141
        gone.write("what is written later is dropped")
