"""A report as GitHub's Markdown, for `$GITHUB_STEP_SUMMARY` and comments.

The same document as the page; what a drawing shows stands in its description or in a table.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from .blocks import Block, Bullets, Document, Facts, Paragraph, Section, Table
from .drawing import Drawing
from .html import printable

_SPECIAL = re.compile(r"([\\`*_\[\]#|~$])")
_SIGNS = {"passes": "✅", "fails": "❌", "inconclusive": "❔", "missing": "❔", "plain": ""}


def to_markdown(document: Document) -> str:
    """The document's text, ending in a newline."""
    lines = [f"# {escape(document.title)}", ""]
    for part in document.parts:
        top = part.headline
        if len(document.parts) > 1:
            lines += [f"## {escape(part.title)}", ""]
        lines += [f"{_SIGNS[top.tone]} **{escape(top.word)}**: {escape(top.sentence)}", ""]
    for section in document.comparison:
        lines += _section(section)
    for part in document.parts:
        if len(document.parts) > 1:
            lines += [f"# {escape(part.title)}", ""]
        for section in part.sections:
            lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that Markdown and the HTML within it show as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", _markup(text))


def _markup(text: str) -> str:
    return html.escape(" ".join(str(printable(text)).split()), quote=False)


def _section(section: Section) -> Iterator[str]:
    verdict = f" ({section.verdict})" if section.verdict else ""
    yield from (f"## {escape(section.title + verdict)}", "")
    for block in section.blocks:
        lines = list(_block(block))
        if lines:
            yield from (*lines, "")


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield escape(block.text)
    elif isinstance(block, Facts):
        yield from (f"- **{escape(name)}**: {escape(value)}" for name, value in block.items)
    elif isinstance(block, Bullets):
        yield from (f"- {escape(item)}" for item in block.items)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Drawing):
        yield f"*{escape(block.title)}*: {escape(block.description)}"


def _table(table: Table) -> Iterator[str]:
    if table.folded:
        # GitHub renders Markdown inside it if blank lines surround it.
        yield from (f"<details><summary>{_markup(table.caption)}</summary>", "")
    else:
        yield from (f"{escape(table.caption)}:", "")
    yield "| " + " | ".join(escape(text) for text in table.header) + " |"
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    numeric = [bool(cells) and all(c.value is not None for c in cells) for cells in columns]
    yield "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    for row in table.rows:
        yield "| " + " | ".join(escape(cell.text) for cell in row) + " |"
    if table.folded:
        yield from ("", "</details>")
