"""From shards to an artefact, block by block: the bytes of a separation in memory, and no rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import libortho
from libortho import blockwise, sharded
from libortho.config import NO_LATTICE, SeparationConfig
from libortho.errors import ArtifactError, ModelLoadError, OrthoError, SeparationError
from libortho.models import load_model
from libortho.separation import separate, separated_layer
from libortho.sharded import separate_checkpoint, separate_shards
from libortho.switch import bits_per_weight
from libortho.tensorfile import TensorFile

Factory = Callable[..., LlamaForCausalLM]


@pytest.fixture
def checkpoint(tiny_model: Factory, tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a plain checkpoint in several shards."""

    def make(dtype: torch.dtype = torch.float32, model: Any = None, **options: Any) -> Path:
        folder = tmp_path / "plain"
        made = (model or tiny_model(**options)).to(dtype)
        made.save_pretrained(folder, max_shard_size="60kB")
        tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "base.safetensors")


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"head_bits": 8}, {}),
        ({"head_bits": 8}, {"tie_word_embeddings": False}),
        ({}, {"dtype": torch.bfloat16, "tie_word_embeddings": False}),
        ({"bits": 8, "residual_density": 0.0, "group_size": -1}, {"attention_bias": True}),
        ({"bits": NO_LATTICE}, {"mlp_bias": True}),
        ({"search": False, "residual_density": 0.0}, {}),
    ],
)
def test_the_bytes_are_those_of_a_separation_in_memory(
    changes: dict[str, Any],
    options: dict[str, Any],
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    folder, recipe = checkpoint(**options), replace(small_separation, **changes)
    model, tokenizer = load_model(folder)
    separate(model, tokenizer, public_text, config=recipe)
    expected = libortho.save(model, tmp_path / "in memory")
    report = separate_shards(folder, tmp_path / "streamed", public_text, config=recipe)

    assert report.base_fingerprint == libortho.base_fingerprint(model)
    assert report.bits_per_linear_weight == libortho.bits_per_linear_weight(model)
    assert report.bits_per_weight == bits_per_weight(model)
    there, here = tensors_of(expected), tensors_of(report.folder)
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert tensor.dtype == here[name].dtype
        assert torch.equal(tensor.view(torch.uint8), here[name].view(torch.uint8)), name
    assert contents(expected) == contents(report.folder)
    loaded, _ = libortho.load(report.folder)
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_other_architectures_are_taken_as_well(
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 12}
    config = Qwen3Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    folder = checkpoint(model=Qwen3ForCausalLM(config).eval())
    model, tokenizer = load_model(folder)
    separate(model, tokenizer, public_text, config=small_separation)
    report = separate_shards(folder, tmp_path / "out", public_text, config=small_separation)
    assert report.streamed
    assert report.base_fingerprint == libortho.base_fingerprint(model)


def test_never_more_than_one_block_is_filled(
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(num_hidden_layers=6)
    made: list[Any] = []
    most = 0
    outline, fill = sharded.outline_model, blockwise.Walk._fill

    def remembered(*args: Any) -> Any:
        made.append(outline(*args)[0])
        return made[0], outline(*args)[1]

    def counted(*args: Any, **options: Any) -> None:
        nonlocal most
        fill(*args, **options)
        most = max(most, sum(p.numel() for p in made[0].parameters() if not p.is_meta))

    monkeypatch.setattr(sharded, "outline_model", remembered)
    monkeypatch.setattr(blockwise.Walk, "_fill", counted)
    separate_shards(folder, tmp_path / "out", public_text, config=small_separation)
    embedding, block = 300 * 48, 2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48 + 2 * 48
    last_norm = 48
    assert most == max(embedding, block) + last_norm
    assert sum(p.numel() for p in made[0].parameters()) > 5 * block
    assert [n for n, p in made[0].named_parameters() if not p.is_meta] == ["model.norm.weight"]


@pytest.mark.parametrize("where", ["a weight", "the embedding"])
def test_a_failure_leaves_nothing(
    where: str,
    tiny_model: Factory,
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    model = tiny_model()
    spoiled = {
        "a weight": model.model.layers[1].mlp.up_proj.weight,
        "the embedding": model.model.embed_tokens.weight,
    }[where]
    with torch.no_grad():
        spoiled[3, 4] = torch.nan
    folder = checkpoint(model=model)
    recipe = replace(small_separation, head_bits=8, residual_density=0.0, search=False)
    name = {"a weight": r"layers\.1\.mlp\.up_proj\.weight"}.get(where, where)
    with pytest.raises(SeparationError, match=rf"{name} has 1 NaN.*row 3, column 4"):
        separate_shards(folder, tmp_path / "out", public_text, config=recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_an_interruption_leaves_nothing(
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, calls = checkpoint(), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:  # in the second block; the name appears at the very end
            (unfinished,) = (path for path in tmp_path.iterdir() if path != folder)
            assert (unfinished / "base.safetensors").stat().st_size > 0
            raise KeyboardInterrupt
        return separated_layer(*args)

    monkeypatch.setattr(blockwise, "separated_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        separate_shards(folder, tmp_path / "out", public_text, config=small_separation)
    assert list(tmp_path.iterdir()) == [folder]


def test_an_incomplete_checkpoint_is_refused_before_work(
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    def attempt(said: str) -> None:
        with pytest.raises(ModelLoadError, match=said):
            separate_shards(folder, tmp_path / "out", public_text, config=small_separation)
        assert not (tmp_path / "out").exists()

    folder = checkpoint()
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    victim = folder / where["model.norm.weight"]
    kept = load_file(victim)
    save_file({n: t for n, t in kept.items() if n != "model.norm.weight"}, victim)
    attempt("lacks 1 of the model's tensors, model.norm.weight")
    save_file(kept | {"model.norm.weight": torch.ones(47)}, victim)
    attempt(r"model.norm.weight has the shape \[47\]")
    other = torch.zeros(300, 48)
    save_file(kept | {"lm_head.weight": other}, victim)
    attempt("ties model.embed_tokens.weight and lm_head.weight")


def test_an_existing_folder_is_not_overwritten(
    checkpoint: Callable[..., Path], public_text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        separate_shards(checkpoint(), tmp_path / "out", public_text)


def test_blocks_that_are_not_told_apart_are_separated_in_memory(
    checkpoint: Callable[..., Path],
    small_separation: SeparationConfig,
    public_text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint()
    expected = separate_shards(folder, tmp_path / "a", public_text, config=small_separation)
    monkeypatch.setattr("libortho.sharded.blocks_of", lambda model: None)
    with pytest.raises(SeparationError, match="load_model and call separate"):
        separate_shards(folder, tmp_path / "b", public_text, config=small_separation)
    report = separate_checkpoint(folder, tmp_path / "b", public_text, config=small_separation)
    assert not report.streamed
    assert report.base_fingerprint == expected.base_fingerprint


# --- the file ------------------------------------------------------------------------------------


def test_tensors_come_back_whatever_their_order(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.zeros(0, 7, dtype=torch.float16),
        "b": torch.randn(9).bfloat16(),
        "columns": torch.arange(6, dtype=torch.int32).to(torch.uint16).view(2, 3),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    outline = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "file", outline, {"format": "pt"}) as file:
        for name in sorted(tensors, reverse=True):
            file.write(name, tensors[name])
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "file").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_was_not_planned_is_refused(tmp_path: Path) -> None:
    outline = {"a": torch.zeros(2), "b": torch.zeros(2)}

    def write(tensor: Tensor) -> None:
        with TensorFile(tmp_path / "file", outline, {}) as file:
            file.write("a", tensor)

    with pytest.raises(ArtifactError, match="1 tensors that were never made, b"):
        write(torch.ones(2))
    with pytest.raises(ArtifactError, match=r"float32 .* was planned"):
        write(torch.ones(2).half())
    with pytest.raises(OrthoError, match=r"\[3\]"):
        write(torch.ones(3))
