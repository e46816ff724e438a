"""What the pages tell people to type: fenced blocks, and commands within sentences.

It reads Markdown and `.ci/run`, and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = (
    *READMES,
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
SHELL = ("", "bash", "sh", "console")
PROGRAMS = (
    *("python", "python3", "pytest", "pip", "libortho", "ruff", "mypy", "pre-commit", "hf"),
    *("uv", "git", "curl", "conda", "docker", "source", "export", "make", "tox"),
)
FORMULAS = {
    "W = base + residual + alpha * private",
    "base = scale * (q - 2**(bits - 1)) + zero",
}
"""Blocks without a language that are no commands; any other such block is taken for some."""


class Block(NamedTuple):
    """A fenced block: its page, language and text, comments and empty lines left out."""

    page: str
    language: str
    text: str


def read(page: str) -> str:
    """A page's text, with one kind of newline."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """A page's fenced blocks, in order."""
    found = re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```$", read(page))
    return [Block(page, language, without_comments(text)) for language, text in found]


def without_comments(text: str) -> str:
    """A block without what stands behind `  #` or ` #`, and without empty lines."""
    lines = (re.sub(r"(^|\s+)#\s.*$", "", line).rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", read(page))


def code_spans(text: str) -> list[str]:
    """Inline code, broken lines joined."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: str, subcommands: tuple[str, ...]) -> Iterator[str]:
    """Every command of a page: lines of shell blocks, and code in sentences that starts like one.

    subcommands: of our own command line, which sentences name without the program
    """
    for block in blocks(page):
        if block.language in SHELL and block.text not in FORMULAS:
            yield from re.sub(r"\\\n\s*", "", block.text).splitlines()
    for span in code_spans(prose(page)):
        first, *rest = span.split()
        if first in (*subcommands, "pytest", "libortho") or (rest and first in PROGRAMS):
            yield span


def parts(command: str) -> list[str]:
    """The commands that `&&` joins; python3 is python."""
    return [re.sub(r"^python3 ", "python ", part.strip()) for part in command.split("&&")]


def run_by_ci() -> set[str]:
    """The single commands that `.ci/run` runs: its own lines, and those of the README's marks."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = set()
    for mark in re.findall(r"\$\(readme_command (\w+)\)", script):
        assert f'eval "${mark}"' in script
        block = read("README.md").split(f"<!-- command: {mark} -->\n```\n")[1].split("```")[0]
        found |= set(parts(block))
    for line in script.splitlines():
        if line.split()[:1] and line.split()[0] in PROGRAMS:
            found |= set(parts(line.replace('"$cache/out.json"', "out.json")))
    return found
