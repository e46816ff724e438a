"""The page of errors has a place for every class and every message, and quotes only what is said.

Messages are read from the source: the text of every error that is raised, with `…` for each value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from libortho import errors
from libortho.errors import OrthoError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
CLASSES = sorted(
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, OrthoError) and kind is not OrthoError
)
VALUE = "…"
FEW_LETTERS = 12
"""A message of fewer letters than these says only what another function gave it."""


class Message(NamedTuple):
    """One thing that an error may say: where, of which class, and its text."""

    where: str
    kind: str
    text: str


def text_of(node: ast.expr) -> str:
    """The text that an expression makes, each value in it as `…`; the first choice of several."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) if isinstance(v, ast.Constant) else VALUE for v in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return VALUE


TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("libortho", "libortho_pytest", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FUNCTIONS = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
}


def returned_by(name: str) -> Iterator[str]:
    """The texts that a function of ours returns."""
    function = FUNCTIONS.get(name)
    for node in ast.walk(function) if function else ():
        if isinstance(node, ast.Return) and node.value is not None:
            yield text_of(node.value)


def messages() -> Iterator[Message]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id not in CLASSES:
                continue
            said, where = node.args[0], f"{path}:{node.lineno}"
            call = said.func if isinstance(said, ast.Call) else None
            texts = list(returned_by(call.id)) if isinstance(call, ast.Name) else []
            yield from (Message(where, node.func.id, t) for t in texts or [text_of(said)])


MESSAGES = [m for m in messages() if sum(map(str.isalpha, m.text)) >= FEW_LETTERS]
ELSEWHERE = {
    text_of(node)
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, (ast.JoinedStr, ast.Constant))
}


def quoted(kind: str) -> list[str]:
    """The messages that the page quotes under a class."""
    section = re.split(r"(?m)^## ", PAGE.split(f"\n## `{kind}`\n")[1])[0]
    cells = re.findall(r"(?m)^\| (`.*?) \| ", section)
    return [part.strip("`") for cell in cells for part in cell.split("<br>")]


def pattern(quote: str) -> re.Pattern[str]:
    parts = [re.escape(part) for part in quote.strip(VALUE).split(VALUE)]
    return re.compile(".*?".join(parts), flags=re.S)


def test_the_page_has_a_section_for_every_class() -> None:
    assert sorted(re.findall(r"(?m)^## `(\w+)`$", PAGE)) == CLASSES


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m.kind}-{m.where}")
def test_every_message_has_a_place(message: Message) -> None:
    assert any(pattern(quote).search(message.text) for quote in quoted(message.kind)), message.text


@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_is_quoted_that_the_code_does_not_say(kind: str) -> None:
    for quote in quoted(kind):
        of_class = [m.text for m in MESSAGES if m.kind == kind]
        # What a message only passes on (`it is not valid JSON`) stands elsewhere in the source.
        assert any(pattern(quote).search(text) for text in (*of_class, *ELSEWHERE)), quote


def test_the_pattern_is_not_satisfied_by_anything() -> None:
    found = pattern("… has no revision …")
    assert found.search("… has no revision …. If the owner")
    assert not found.search("… has no tokenizer")


def test_exit_codes_are_those_of_the_command_line() -> None:
    from libortho import cli
    from libortho.cli import commands

    for code, said in (
        (commands.EXIT_REFUSED, "the exit code is {}"),
        (commands.EXIT_DONE, "{} done, or yes"),
        (commands.EXIT_NO, "{} the answer is no"),
        (commands.EXIT_INTERRUPTED, "{} interrupted"),
        (cli.EXIT_BROKEN_PIPE, "{} the reader of the output went away"),
        (pytest.ExitCode.USAGE_ERROR.value, "a usage error, exit code {}"),
    ):
        assert said.format(code) in " ".join(PAGE.split())
