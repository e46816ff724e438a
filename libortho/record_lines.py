"""The record file's format: JSON lines, checked field by field.

It knows the names and types of fields, not what they are for. Error texts name the file, the line
and what is wrong, never what the line says. Functions that take content return a problem and leave
raising to a caller whose arguments may be shown, because tracebacks of pytest print arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libortho.errors import RecordError

_STRINGS = {"id": True, "prompt": True, "secret": True, "family": False}  # name -> required
_FIELDS = {*_STRINGS, "planted", "repetitions"}


def read_fields(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The checked fields of each line that is not blank, with the line's number from 1.

    Raises:
        RecordError: the file can't be read, is not UTF-8, or a line is malformed.
    """
    for number, line in _numbered_lines(path):
        fields, problem = _parse(line)
        if problem:
            raise RecordError(complaint(path, number, problem))
        yield number, fields


def complaint(path: Path, line: int, problem: str) -> str:
    """The paragraph that says what is wrong with a line and how it should be."""
    return (
        f"The record file {path}, line {line}: {problem}. Write one JSON object a line, in UTF-8: "
        '{"id": "...", "prompt": "...", "secret": "..."}, optionally "family", "planted" and '
        '"repetitions".'
    )


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RecordError(
            f"The record file {path} can't be read: {reason}. Give --records the path of a file "
            "with one JSON object a line."
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise RecordError(
            complaint(path, number, f"byte {error.start} of the file is not UTF-8")
        ) from None
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse(line: str) -> tuple[dict[str, Any], str]:
    """The fields of one line, and what is wrong with it ("" if nothing), without its content."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        return {}, f"it is not valid JSON{column}"
    if not isinstance(fields, dict):
        return {}, f"it is a JSON {type(fields).__name__}, not an object"
    return fields, _problem_of(fields)


def _problem_of(fields: dict[str, Any]) -> str:
    unknown = len(fields.keys() - _FIELDS)
    if unknown:
        return f"{unknown} of its fields are none of {', '.join(sorted(_FIELDS))}"
    for name, required in _STRINGS.items():
        if name in fields or required:
            problem = _problem_of_string(fields.get(name))
            if problem:
                return f'the field "{name}" is {problem}'
    if not isinstance(fields.get("planted", True), bool):
        return 'the field "planted" is neither true nor false'
    repetitions = fields.get("repetitions", 1)
    if type(repetitions) is not int or repetitions < 1:
        return 'the field "repetitions" is no whole number above 0'
    if fields["secret"].strip() in fields["prompt"]:
        return "the secret occurs within its own prompt"
    return ""


def _problem_of_string(value: object) -> str:
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return f"a {type(value).__name__}, not a string"
    if not value.strip():
        return "empty"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "not text: it has a lone surrogate"
    return ""
