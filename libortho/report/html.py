"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Knows the templates. Everything that comes from a results file is escaped by the template engine,
and the page's own policy forbids scripts and loading anything, should that ever fail.
"""

from __future__ import annotations

import itertools
import unicodedata
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .blocks import Bullets, Document, Facts, Paragraph, Table
from .drawing import Drawing

_KINDS = {
    Paragraph: "paragraph",
    Facts: "facts",
    Bullets: "bullets",
    Table: "table",
    Drawing: "drawing",
}


def to_html(document: Document) -> str:
    """The page's text."""
    ids = itertools.count(1)
    template = _environment().get_template("page.html.jinja")
    return template.render(document=document, kind_of=_kind_of, fresh=lambda: next(ids)) + "\n"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("libortho.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )


def _kind_of(block: Any) -> str:
    return _KINDS[type(block)]


def printable(value: Any) -> Any:
    """Text without characters that HTML forbids or that change how their neighbours are read.

    Control characters, noncharacters and marks that reorder text become U+FFFD.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join("\ufffd" if _is_unwelcome(c) else c for c in value)


def _is_unwelcome(character: str) -> bool:
    if character in "\n\t":
        return False
    code = ord(character)
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or unicodedata.bidirectional(character) in _REORDERING
        or 0xFDD0 <= code <= 0xFDEF
        or code & 0xFFFE == 0xFFFE
    )


_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
