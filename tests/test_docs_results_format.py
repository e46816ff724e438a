"""The page on the results file names every field, with the type that the code gives it."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libortho import provenance
from libortho.audit_metrics import measure_state
from libortho.evidence import Evidence
from libortho.results import Results, read_results

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "results-format.md").read_text(encoding="utf-8")
WORDS = {int: "integer", float: "number", str: "string", bool: "boolean", Any: "object"}


def tables() -> dict[str, list[list[str]]]:
    """The cells of each table of fields, by the dataclass that it is about."""
    found = re.findall(r"<!-- fields: (\w+) -->\n\|.*\n\|---.*\n((?:\|.*\n)+)", PAGE)
    return {
        name: [[c.strip() for c in line.strip("|").split(" | ")] for line in body.splitlines()]
        for name, body in found
    }


def kinds(kind: Any) -> Iterator[Any]:
    """The dataclasses within an annotation, and within theirs."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from kinds(hint)
    for argument in typing.get_args(kind):
        yield from kinds(argument)


KINDS = {kind.__name__: kind for kind in kinds(Results)}


def in_words(hint: Any) -> str:
    """What the page calls a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (kind,) = (a for a in arguments if a is not type(None))
        return f"{in_words(kind)} or null"
    if origin is tuple:
        return f"array of {in_words(arguments[0])}s"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "object"
    return "string" if origin is typing.Literal else WORDS[hint]


def test_every_part_of_the_file_has_a_table() -> None:
    assert set(tables()) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_table_has_the_fields_and_types_of_the_code(name: str) -> None:
    expected = [
        [f"`{field}`", in_words(h)] for field, h in typing.get_type_hints(KINDS[name]).items()
    ]
    assert [row[:2] for row in tables()[name]] == expected
    assert all(len(row) == 3 and row[2] for row in tables()[name])


def test_every_metric_is_named() -> None:
    def evidence(i: int) -> Evidence:
        values = (-0.5 - i / 10, -0.25)
        return Evidence(f"r{i}", "codes", i < 3, values, (1, 0), values, (0.5, 0.5), 0.5, 20)

    state = [evidence(i) for i in range(6)]
    (measured,) = measure_state(state, state, name="off")
    table = PAGE.split("| metric | source |\n|---|---|\n")[1].split("\n\n")[0]
    named = set()
    for line in table.splitlines():
        quoted = re.findall(r"`([^`]+)`", line.split("|")[1])
        of_twins = {quoted[0].replace(", planted", q) for q in quoted if q.startswith(", ")}
        named |= {q for q in quoted if not q.startswith(", ")} | of_twins
    assert named == set(measured.metrics)


def test_literal_values_are_named() -> None:
    """Where a field holds one of a few words, the page says which."""
    for name, kind in KINDS.items():
        rows = {row[0].strip("`"): row[2] for row in tables()[name]}
        for field, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is typing.Literal:
                assert {f"`{word}`" for word in typing.get_args(hint)} <= set(
                    re.findall(r"`[^`]+`", rows[field])
                ), field


def test_the_version_is_the_one_that_is_written() -> None:
    version = Results.__dataclass_fields__["schema_version"].default
    assert f"`schema_version` is {version}." in PAGE


def test_the_example_is_the_measured_file() -> None:
    examples = re.findall(r"<!-- example: (\S+) -->\n```json\n(.*?)```", PAGE, flags=re.S)
    assert examples
    for name, text in examples:
        path = ROOT / "bench" / "results" / name
        measured = json.loads(path.read_text(encoding="utf-8"))
        for section, shown in json.loads(text).items():
            assert shown.items() <= measured[section].items()
        assert read_results(path).schema_version == measured["schema_version"]


def test_the_options_whose_values_are_hidden_are_the_ones_named() -> None:
    row = next(row for row in tables()["Provenance"] if row[0] == "`command`")
    assert set(re.findall(r"`(--[a-z-]+)`", row[2])) == set(provenance._HIDDEN)
