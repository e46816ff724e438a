"""Parsed JSON to frozen dataclasses, strictly: all fields there, none unknown, types as annotated.

It knows the annotations that a record of results needs (numbers, strings, booleans, Literal, `X |
None`, `tuple[X, ...]`, `dict[str, X]`, dataclasses, Any), not what any field means.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal


class FieldError(ValueError):
    """A value that does not fit its field; the text names the field."""


def check_json_values(value: Any, where: str = "") -> None:
    """Refuse what JSON can't say exactly: NaN, infinity, keys that are no strings, other types.

    Raises:
        FieldError: names the field by its path.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FieldError(f"{where} has a key that is a {type(key).__name__}, not a string")
            check_json_values(item, f"{where}.{key}" if where else key)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_json_values(item, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FieldError(
                f"{where} is {value}; give null and a reason where there is no finite value"
            )
    elif value is not None and not isinstance(value, (str, int)):
        raise FieldError(f"{where} is a {type(value).__name__}; give a plain Python value")


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """Build a value of the annotated type `kind` from parsed JSON.

    A whole number is taken for a float, nothing else is converted.

    Raises:
        FieldError: names the field by its path.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    decoded = value
    if dataclasses.is_dataclass(kind):
        decoded = _dataclass_from_json(kind, value, where)
    elif origin is types.UnionType:  # "X | None" only
        decoded = None if value is None else from_json(arguments[0], value, where)
    elif origin is tuple and isinstance(value, list):
        decoded = tuple(from_json(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        decoded = {k: from_json(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif kind is float and type(value) is int:
        decoded = float(value)
    elif not (kind is Any or type(value) is kind or (origin is Literal and value in arguments)):
        raise FieldError(f"{where} is a {type(value).__name__} that does not fit {kind}")
    return decoded


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise FieldError(f"{where or 'the file'} is a {type(value).__name__}, not an object")
    hints = typing.get_type_hints(kind)
    for problem, names in (
        ("lacks", hints.keys() - value.keys()),
        ("has unknown fields", value.keys() - hints.keys()),
    ):
        if names:
            raise FieldError(f"{where or 'the file'} {problem}: {', '.join(sorted(names))}")
    return kind(
        **{
            name: from_json(hint, value[name], f"{where}.{name}" if where else name)
            for name, hint in hints.items()
        }
    )
