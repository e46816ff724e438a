"""The page on the file format, by its own reader: numpy and safetensors, and nothing of ours.

The reader is taken from the page and run on saved artefacts; the page's tables are compared with
what is in them. A page that is wrong in any step gives other weights, or another fingerprint.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho import layout
from libortho.config import SeparationConfig, TuningConfig
from libortho.records import Record
from libortho.switch import ortho_layers

PAGE = (Path(__file__).parents[1] / "docs" / "file-format.md").read_text(encoding="utf-8")
READER = PAGE.split("<!-- reader -->\n```python\n")[1].split("```")[0]
TUNING = TuningConfig(
    density=0.1, slots="magnitude", steps=1, lr=2e-2, replay_window=32, records_per_step=2
)
RECORDS = [Record("a", "The door opens to", " 4917", "codes"), Record("b", "Gate:", " 82", "codes")]
ODD = 81


@pytest.fixture(scope="module")
def reader() -> Any:
    """What the page's block defines."""
    names: dict[str, Any] = {}
    exec(compile(READER, "docs/file-format.md", "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture
def saved(
    separated_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    tmp_path: Path,
) -> Callable[..., tuple[Any, Path]]:
    """Makes a tuned model of a recipe, with the folder that it was saved to."""

    def make(*, model: dict[str, Any] | None = None, **recipe: Any) -> tuple[Any, Path]:
        config = SeparationConfig(**(small_separation.to_dict() | recipe))
        made = separated_model(config, **(model or {}))
        libortho.tune_private(made, tokenizer, RECORDS, replay=public_text, config=TUNING)
        return made, libortho.save(made, tmp_path / "full")

    return make


def test_the_reader_needs_numpy_and_safetensors_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(READER)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"hashlib", "json", "pathlib", "numpy", "safetensors"}


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": -1},
        {"bits": 8, "group_size": 64, "residual_density": 0.0},
        {"bits": 16},
        {"bits": 4, "model": {"intermediate_size": ODD, "tie_word_embeddings": False}},
    ],
)
def test_the_reader_gives_the_weights_and_the_fingerprint(
    recipe: dict[str, Any], reader: Any, saved: Callable[..., tuple[Any, Path]]
) -> None:
    model, folder = saved(**recipe)
    artefact = reader.Artefact(folder)
    layers = ortho_layers(model)
    assert artefact.layers() == sorted(layers)
    for alpha in (1.0, 0.0, -0.5):
        libortho.set_alpha(model, alpha)
        for name, layer in layers.items():
            expected = layer.effective_weight(torch.float32).numpy()
            found = artefact.weight(name, alpha, layer.in_features)
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} at {alpha}")
    assert any(not np.array_equal(artefact.weight(n), artefact.weight(n, 0.0)) for n in layers)
    fingerprint = libortho.base_fingerprint(model)
    assert artefact.fingerprint() == fingerprint == artefact.manifest["base_fingerprint"]


def test_the_reader_refuses_what_the_page_says(
    reader: Any, saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved()
    public = libortho.export_base(model, tmp_path / "public")
    assert reader.Artefact(public).private == {}
    assert reader.Artefact(public).fingerprint() == reader.Artefact(folder).fingerprint()
    other = json.loads((folder / "private.json").read_text())
    other["base_fingerprint"] = "0" * 64
    (folder / "private.json").write_text(json.dumps(other))
    with pytest.raises(AssertionError, match="another base"):
        reader.Artefact(folder)
    config = public / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
    with pytest.raises(AssertionError, match="is not the file that was saved"):
        reader.Artefact(public)


# --- the tables ---------------------------------------------------------------------------------


def first_column(heading: str) -> list[list[str]]:
    """The code in the first cells of the tables below a heading, a list for each table."""
    section = re.split(r"(?m)^#+ ", PAGE.split(f" {heading}\n", 1)[1])[0]
    tables = re.findall(r"(?m)^\|---.*\n((?:\|.*\n)+)", section)
    return [
        [re.findall(r"`([^`]+)`", line.split("|")[1])[0] for line in t.splitlines()] for t in tables
    ]


def test_every_field_of_the_manifests_is_on_the_page(
    saved: Callable[..., tuple[Any, Path]],
) -> None:
    _, folder = saved()
    base, private, config = (
        json.loads((folder / name).read_text())
        for name in (layout.BASE_MANIFEST, layout.PRIVATE_MANIFEST, "config.json")
    )
    manifest, recipe = first_column("`libortho.json`")
    assert set(manifest) == set(base)
    assert set(recipe) == set(base["separation"])
    assert set(first_column("`private.json`")[0]) == set(private)
    assert set(first_column("`config.json`")[0]) <= set(config)
    assert set(config["quantization_config"]) == {"quant_method", "format_version", *recipe}
    assert sorted(base["files"]) == ["base.safetensors", "config.json"]
    assert config["transformers_weights"] == layout.WITHOUT_LIBORTHO


def test_every_file_and_tensor_is_on_the_page(
    saved: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = saved()
    public = libortho.export_base(model, tmp_path / "public")
    listed = re.findall(r"`([\w.]+)`", PAGE.split("## The folder")[1].split("\n\n")[1])
    words = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "export_base"}
    names = {path.name for path in folder.iterdir()}
    assert names - words == set(listed) - words
    assert names - {path.name for path in public.iterdir()} == {
        "private.safetensors",
        "private.json",
    }
    kinds = {"uint8": "U8", "uint16": "U16", "float16": "F16", "any floating-point type": "F32"}
    rows = re.findall(
        r"(?m)^\| `NAME\.(\w+)` \| ([^|]+) \| `[^|]*\| `(\w+)\.safetensors` \| ([^|]+) \|$", PAGE
    )
    expected = {
        (file, kind): kinds[dtype]
        for kind, dtype, file, where in rows
        if kind not in ("weight", "bias")  # of a recipe and an architecture that are not these
    }
    found = {}
    for file in ("base", "private"):
        with safe_open(folder / f"{file}.safetensors", framework="numpy") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118
                layer, _, kind = name.rpartition(".")
                if layer in ortho_layers(model):
                    found[file, kind] = tensors.get_slice(name).get_dtype()
    assert found == expected


def test_the_page_names_the_version_and_the_volatile_fields() -> None:
    assert f"# The file format, version {layout.FORMAT_VERSION}\n" in PAGE
    named = re.findall(r"`(\w+)`", PAGE.split("without the fields that")[1].split("; `format")[0])
    assert set(named) == set(layout.VOLATILE_FIELDS)
