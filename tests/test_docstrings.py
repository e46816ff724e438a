"""The API's pages render without a warning, and nothing public is without a docstring."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest

import libortho

pdoc: Any = pytest.importorskip("pdoc", reason='pip install -e ".[dev]"')


def can_be_imported(name: str) -> bool:
    """Whether a module is there on this machine: kernels are not without Triton."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False
    return True


FOUND = sorted(
    module.name
    for module in pkgutil.walk_packages(libortho.__path__, "libortho.")
    if not module.name.endswith("__main__")
)
MODULES = ["libortho", *filter(can_be_imported, FOUND)]


def resolve_named_tuples() -> None:
    """Look up the annotations of our named tuples, which pdoc does for other classes only."""
    for name in MODULES:
        for thing in list(vars(importlib.import_module(name)).values()):
            if inspect.isclass(thing) and issubclass(thing, tuple) and hasattr(thing, "_fields"):
                thing.__new__.__annotations__ = typing.get_type_hints(thing)


def test_every_module_is_rendered_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Imported beforehand: other people's warnings at import are not about our text.
    exporting = {n for n in MODULES if hasattr(importlib.import_module(n), "__all__")}
    # pdoc finds the modules of a package by itself, unless it has an `__all__`.
    asked = [n for n in MODULES if n == "libortho" or n.rpartition(".")[0] in exporting]
    left_out = [f"!{name}" for name in FOUND if name not in MODULES]
    resolve_named_tuples()
    # Values that a variable of the environment happens to have are no secrets of ours.
    monkeypatch.setenv("PDOC_DISPLAY_ENV_VARS", "1")
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pdoc.pdoc(*asked, *left_out, output_directory=tmp_path)
    absent = tuple(f"Couldn't import {name[1:]}" for name in left_out)
    told = [text for w in said if not (text := str(w.message)).startswith(absent)]
    assert not told, "\n".join(told)
    pages = {p.relative_to(tmp_path).with_suffix("").as_posix() for p in tmp_path.rglob("*.html")}
    assert pages >= {name.replace(".", "/") for name in MODULES}


def public_members(name: str) -> list[str]:
    """What an exported name brings: itself, and the methods and properties of a class of ours."""
    thing = getattr(libortho, name)
    if not inspect.isclass(thing):
        return [name]
    own = [key for key, value in vars(thing).items() if not key.startswith("_")]
    return [name, *(f"{name}.{key}" for key in own if callable(getattr(thing, key)))]


@pytest.mark.parametrize("name", libortho.__all__)
def test_everything_exported_has_a_docstring(name: str) -> None:
    bare = []
    for path in public_members(name):
        thing: Any = libortho
        for part in path.split("."):
            thing = getattr(thing, part)
        if not inspect.getdoc(thing):
            bare.append(path)
    assert not bare
