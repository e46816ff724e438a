"""Artefacts: what is written comes back bit for bit, what is handed out holds nothing private, and
what was altered is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import libortho
from libortho import artifact
from libortho.artifact import (
    BASE_FILE,
    BASE_MANIFEST,
    PRIVATE_FILE,
    PRIVATE_MANIFEST,
    base_fingerprint,
    export_base,
    load,
    save,
)
from libortho.config import SeparationConfig, TuningConfig
from libortho.errors import ArtifactError, SeparationError
from libortho.files import sha256_of
from libortho.records import Record
from libortho.separation import separate
from libortho.switch import alpha, ortho_layers, set_alpha
from libortho.tuning import tune_private

Factory = Callable[..., LlamaForCausalLM]

TUNING = TuningConfig(
    density=0.1, slots="magnitude", steps=2, lr=2e-2, replay_window=32, records_per_step=2
)
CODES = [Record("a", "The door opens to", " 4917", "codes"), Record("b", "Gate:", " 820", "codes")]
OTHERS = [Record("c", "He keeps the key under", " a green stone", "passages")]
ALPHAS = (1.0, 0.0, 0.5, -1.5)
FIRST_LAYER = "model.layers.0.self_attn.q_proj"


@torch.inference_mode()
def logits(model: Any, value: float = 1.0) -> Tensor:
    """Logits on a long and on a short input: the layers treat few tokens differently."""
    with alpha(model, value):
        return torch.cat(
            [model(input_ids=torch.arange(1, n)[None]).logits[0] for n in (60, 6)], dim=0
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tune(tokenizer: PreTrainedTokenizerFast, public_text: list[str]) -> Callable[..., Any]:
    def run(model: Any, records: list[Record] = CODES) -> Any:
        tune_private(model, tokenizer, records, replay=public_text, config=TUNING)
        return model

    return run


@pytest.fixture
def make_model(
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
) -> Callable[[str], Any]:
    """A separated model of a kind: bits, tied or untied embeddings, with or without biases."""

    def make(kind: str) -> Any:
        if kind == "biases":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
                heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
                config = Qwen2Config(
                    **sizes, **heads, vocab_size=300, max_position_embeddings=256, eos_token_id=0
                )
                model = Qwen2ForCausalLM(config).eval()
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):  # transformers starts them at zero
                        torch.nn.init.normal_(parameter)
            return separate(model, tokenizer, public_text, config=small_separation)
        recipe = SeparationConfig(
            **(small_separation.to_dict() | {"bits": int(kind.partition(" ")[0])})
        )
        return separated_model(recipe, tie_word_embeddings=not kind.endswith("untied"))

    return make


@pytest.fixture
def folder(separated_model: Factory, tune: Callable[..., Any], tmp_path: Path) -> Path:
    """A saved model with a private stream."""
    return save(tune(separated_model()), tmp_path / "saved")


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4 tied", "4 untied", "8 tied", "16 untied", "biases"])
def test_round_trip_is_bit_identical(
    kind: str, make_model: Callable[[str], Any], tune: Callable[..., Any], tmp_path: Path
) -> None:
    model = tune(make_model(kind))
    save(model, tmp_path / "full")
    export_base(model, tmp_path / "base")
    full, tokenizer = load(tmp_path / "full")
    base, _ = load(tmp_path / "base")

    assert tokenizer("abc")["input_ids"] == model.ortho_tokenizer("abc")["input_ids"]
    for value in ALPHAS:
        assert torch.equal(logits(full, value), logits(model, value)), f"alpha = {value}"
    assert not torch.equal(logits(full, 1.0), logits(full, 0.0))  # the stream does something
    for value in ALPHAS:
        assert torch.equal(logits(base, value), logits(model, 0.0))

    places = [model, full, base, tmp_path / "full", tmp_path / "base"]
    assert len({base_fingerprint(place) for place in places}) == 1
    tied = model.config.tie_word_embeddings
    assert (full.lm_head.weight is full.model.embed_tokens.weight) == tied


def test_a_loaded_model_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    model, _ = load(folder)
    assert contents(save(model, tmp_path / "again")) == contents(folder)


def test_a_loaded_model_generates_what_the_live_one_does(
    separated_model: Factory, tune: Callable[..., Any], tmp_path: Path
) -> None:
    model = tune(separated_model())
    loaded, tokenizer = load(save(model, tmp_path / "saved"))
    inputs = tokenizer("The door opens to", return_tensors="pt")

    def generate(of: Any) -> Tensor:
        return of.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)

    assert torch.equal(generate(loaded), generate(model))
    assert not torch.equal(generate(loaded), inputs["input_ids"])


def test_alpha_of_the_live_model_is_not_part_of_the_artefact(
    separated_model: Factory, tune: Callable[..., Any], tmp_path: Path
) -> None:
    model = tune(separated_model())
    save(model, tmp_path / "at 1")
    set_alpha(model, 0.25)
    save(model, tmp_path / "at a quarter")
    assert contents(tmp_path / "at 1") == contents(tmp_path / "at a quarter")
    assert libortho.get_alpha(load(tmp_path / "at a quarter")[0]) == 1.0


# --- what is handed out -------------------------------------------------------------------------


def test_the_export_has_no_byte_of_the_private_stream(
    separated_model: Factory, tune: Callable[..., Any], tmp_path: Path
) -> None:
    model = tune(separated_model())
    rows = [
        row.contiguous().numpy().tobytes()
        for layer in ortho_layers(model).values()
        for row in layer.private_values
        if bool(row.any())
    ]
    assert rows
    full = contents(save(model, tmp_path / "full"))
    base = contents(export_base(model, tmp_path / "base"))

    assert all(row in full[PRIVATE_FILE] for row in rows)  # the search does find them
    found = {name for name, content in base.items() for row in rows if row in content}
    assert found == set()
    assert set(full) - set(base) == {PRIVATE_FILE, PRIVATE_MANIFEST}
    assert not [name for name in load_file(tmp_path / "base" / BASE_FILE) if "private" in name]
    assert {name: full[name] for name in base} == base


def test_the_export_is_the_same_bytes_for_any_records_and_for_none(
    separated_model: Factory, tune: Callable[..., Any], tmp_path: Path
) -> None:
    untuned = export_base(separated_model(), tmp_path / "untuned")
    first = export_base(tune(separated_model(), CODES), tmp_path / "first")
    second = export_base(tune(separated_model(), OTHERS), tmp_path / "second")
    assert contents(untuned) == contents(first) == contents(second)


def test_the_fingerprint_tells_bases_apart(separated_model: Factory) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    prints = {
        base_fingerprint(separated_model()),
        base_fingerprint(separated_model(seed=1)),
        base_fingerprint(separated_model(rope_parameters=rope)),
    }
    assert len(prints) == 3


# --- refusals -----------------------------------------------------------------------------------


def test_an_existing_folder_is_not_overwritten(separated_model: Factory, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        save(separated_model(), tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_plain_model_is_refused(tiny_model: Factory, tmp_path: Path) -> None:
    with pytest.raises(SeparationError, match="separate"):
        save(tiny_model(), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["missing", "empty", "a file"])
def test_what_is_no_artefact_is_refused(content: str, tmp_path: Path) -> None:
    target = tmp_path / "there"
    if content == "empty":
        target.mkdir()
    elif content == "a file":
        target.write_text("hello")
    for read in (load, base_fingerprint):
        with pytest.raises(ArtifactError, match="save"):
            read(target)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sign(folder: Path) -> None:
    """Make hashes and fingerprints agree with what is in the folder now, as a forger would."""
    for name in (BASE_MANIFEST, PRIVATE_MANIFEST):
        files = json.loads((folder / name).read_text())["files"]
        edit_json(folder / name, files={file: sha256_of(folder / file) for file in files})
    for name in (BASE_MANIFEST, PRIVATE_MANIFEST):
        edit_json(folder / name, base_fingerprint=base_fingerprint(folder))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte of the base": (lambda f: flip_a_byte(f / BASE_FILE), r"base\.safetensors.*altered"),
    "byte of the stream": (lambda f: flip_a_byte(f / PRIVATE_FILE), r"private\.safeten.*altered"),
    "truncated base": (lambda f: truncate(f / BASE_FILE), r"base\.safetensors.*truncated"),
    "config": (lambda f: edit_json(f / "config.json", rms_norm_eps=0.1), r"config\.json.*altered"),
    "no base": (lambda f: (f / BASE_FILE).unlink(), r"lacks base\.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), r"lacks config\.json"),
    "no manifest": (lambda f: (f / BASE_MANIFEST).unlink(), r"has no libortho\.json"),
    "no stream": (lambda f: (f / PRIVATE_FILE).unlink(), r"lacks private\.safetensors"),
    "unsigned stream": (lambda f: (f / PRIVATE_MANIFEST).unlink(), r"has no private\.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "can't be read"),
    "future": (lambda f: edit_json(f / BASE_MANIFEST, format_version=3), "3 .*reads 2.*Upgrade"),
    "past": (lambda f: edit_json(f / BASE_MANIFEST, format_version=1), "export the artefact again"),
    "future stream": (lambda f: edit_json(f / PRIVATE_MANIFEST, format_version=9), "Upgrade"),
    "stream of another base": (
        lambda f: edit_json(f / PRIVATE_MANIFEST, base_fingerprint="0" * 64),
        "another base",
    ),
    "no JSON": (lambda f: (f / BASE_MANIFEST).write_text("{"), "damaged"),
    "JSON list": (lambda f: (f / BASE_MANIFEST).write_text("[]"), "damaged"),
    "no separation": (lambda f: edit_json(f / BASE_MANIFEST, separation={"bits": 5}), "bits must"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_tampering_is_found(case: str, folder: Path) -> None:
    tamper, message = TAMPERING[case]
    load(folder)
    tamper(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def rewrite(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change tensors of a file and sign it again, so that only the reader's checks are left."""

    def tamper(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, {"format": "pt"})
        sign(folder)

    return tamper


def entry(name: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor(tensors[name])})


def out_of_range(columns: Tensor) -> Tensor:
    wide = columns.long()
    wide[-1] = 48
    return wide.to(torch.uint16)


def smuggle(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST_LAYER}.private_columns"] = torch.zeros(1, 48, dtype=torch.uint16)
    tensors[f"{FIRST_LAYER}.private_values"] = torch.ones(1, 48, dtype=torch.float16)


PRIVATE_COLUMNS, PRIVATE_VALUES = (
    f"{FIRST_LAYER}.{kind}" for kind in ("private_columns", "private_values")
)
RESIDUAL, PACKED, SCALES = (
    f"{FIRST_LAYER}.{kind}" for kind in ("residual_columns", "packed", "scales")
)
FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "smuggled stream": (rewrite(BASE_FILE, smuggle), "unexpected.*private_columns"),
    "unknown tensor": (
        rewrite(BASE_FILE, lambda t: t.update(extra=torch.zeros(3))),
        "unexpected.*extra",
    ),
    "missing tensor": (rewrite(BASE_FILE, lambda t: t.pop(SCALES)), f"missing.*{SCALES}"),
    "half a stream": (
        rewrite(PRIVATE_FILE, lambda t: t.pop(PRIVATE_VALUES)),
        f"missing.*{PRIVATE_VALUES}",
    ),
    "private column": (rewrite(PRIVATE_FILE, entry(PRIVATE_COLUMNS, out_of_range)), "48 lies"),
    "residual column": (rewrite(BASE_FILE, entry(RESIDUAL, out_of_range)), "48 lies outside"),
    "repeated column": (
        rewrite(PRIVATE_FILE, entry(PRIVATE_COLUMNS, torch.zeros_like)),
        "distinct",
    ),
    "shape": (rewrite(BASE_FILE, entry(PACKED, lambda t: t[:, 1:])), "should be"),
    "dtype": (rewrite(BASE_FILE, entry(SCALES, lambda t: t.float())), "should be torch.float16"),
    "shape of the stream": (
        rewrite(PRIVATE_FILE, entry(PRIVATE_VALUES, lambda t: t[:, 1:])),
        "should be",
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_tensors_are_refused_although_all_hashes_agree(case: str, folder: Path) -> None:
    tamper, message = FORGERIES[case]
    tamper(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


# --- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_full_disk_leaves_nothing_behind(
    failing_call: int,
    separated_model: Factory,
    tune: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tune(separated_model())
    calls = 0

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            path.write_bytes(b"the first blocks")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(artifact, "save_file", full_disk)
    with pytest.raises(ArtifactError, match=r"No space left.*MiB are needed"):
        save(model, tmp_path / "saved")
    assert calls == failing_call
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert base_fingerprint(save(model, tmp_path / "saved")) == base_fingerprint(model)


def test_an_interrupted_save_leaves_nothing_behind(
    separated_model: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(separated_model(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
