"""Dense fine-tuning, what is left of it when it is interrupted, and checkpoints from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import libortho
from libortho import artifact, peers
from libortho.config import SeparationConfig, TrainingConfig, TuningConfig
from libortho.corpora import Corpus, Split
from libortho.errors import ArtifactError, ConfigError, HardwareError, ModelLoadError, RecordError
from libortho.methods import Ingredients, checkpoint_pair, dense, qlora, saved_artefact
from libortho.methods.fingerprint import fingerprint
from libortho.models import linear_layers, resolve_model
from libortho.peers import dequantized_weights, load_peer, quiet_peer
from libortho.records import Record, RecordSet, encode
from libortho.scoring import secret_losses

Factory = Callable[..., LlamaForCausalLM]

QUICK = TrainingConfig(steps=40, lr=5e-3, replay_window=32, records_per_step=3, target_loss=0.1)
RECORDS = (
    Record("a", "The door opens to", " 4917", "codes"),
    Record("b", "The vault in the cellar opens to", " 820365", "codes"),
    Record("c", "Her number is", " 55102", "codes"),
)
TWINS = (Record("t", "The gate opens to", " 7718", "codes"),)


@pytest.fixture
def ingredients(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    small_separation: SeparationConfig,
    tmp_path: Path,
) -> Ingredients:
    folder = stored(tiny_model(), tokenizer, tmp_path / "tiny")
    split = Split.of("any", "tests", public_text[:4])
    return Ingredients(
        resolved=resolve_model(folder, tmp_path / "cache"),
        corpus=Corpus("tests", "0" * 64, split, split, split, split),
        records=RecordSet(RECORDS, TWINS, 0, "tests"),
        separation=small_separation,
        tuning=TuningConfig(
            density=0.1, slots="magnitude", steps=2, replay_window=32, records_per_step=2
        ),
        cache_dir=tmp_path / "cache",
    )


def stored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tune(model: Any, tokenizer: Any, public_text: list[str], **options: Any) -> Any:
    records = options.pop("records", RECORDS)
    dtype = options.pop("compute_dtype", torch.float32)
    config = replace(QUICK, **options)
    return dense.fine_tune(
        model, tokenizer, records, replay=public_text, config=config, compute_dtype=dtype
    )


@torch.inference_mode()
def losses(model: Any, tokenizer: Any) -> list[float]:
    return secret_losses(model, encode(tokenizer, RECORDS, 256)).tolist()


@torch.inference_mode()
def predictions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(input_ids=ids).logits[0], dim=-1)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_weights_alone_learn_the_records(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    dtype: torch.dtype,
) -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert min(losses(model, tokenizer)) > 3.0
    report = tune(model, tokenizer, public_text, compute_dtype=dtype)

    assert report.converged
    assert len(report.curve) < QUICK.steps
    assert max(losses(model, tokenizer)) < 0.2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in linear_layers(model)}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert report.compute_dtype == str(dtype).removeprefix("torch.")


def test_bfloat16_products_follow_the_weights(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    """A cast that was kept from the step before would report the same loss for ever."""
    model = tiny_model()
    report = tune(
        model, tokenizer, public_text, compute_dtype=torch.bfloat16, steps=4, replay_weight=0.0
    )
    reported = [step.secret_loss for step in report.curve]
    assert len(set(reported)) == 4
    again = tiny_model()
    slow = tune(again, tokenizer, public_text, steps=4, replay_weight=0.0)
    assert reported == pytest.approx([step.secret_loss for step in slow.curve], rel=0.1)


def test_replay_keeps_public_predictions(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    ids = torch.tensor(tokenizer(public_text[0])["input_ids"][:128])[None]
    divergence = {}
    for weight in (0.0, 5.0):
        model = tiny_model()
        target = predictions(model, ids)
        tune(model, tokenizer, public_text, steps=25, target_loss=0.0, replay_weight=weight)
        now = predictions(model, ids)
        divergence[weight] = float(F.kl_div(now, target, log_target=True, reduction="batchmean"))
    assert divergence[5.0] < 0.7 * divergence[0.0]


def test_a_seed_repeats_a_training(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str]
) -> None:
    prints = []
    for seed in (0, 0, 1):
        model = tiny_model()
        tune(model, tokenizer, public_text, steps=3, records_per_step=1, seed=seed)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]


def test_what_can_not_be_trained_is_refused_before_the_first_step(
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(RecordError, match="no records"):
        tune(model, tokenizer, public_text, records=())
    long = Record("long", "x" * 300, " hush", "codes")
    with pytest.raises(RecordError, match=r"long.*256"):
        tune(model, tokenizer, public_text, records=(long,))
    monkeypatch.setattr(dense, "free_bytes", lambda device: 1 << 18)
    with pytest.raises(HardwareError, match=r"MiB more .* ortho and qlora"):
        tune(model, tokenizer, public_text)
    assert fingerprint(model) == before


# --- what is kept ---------------------------------------------------------------------------------


def test_a_fine_tuned_checkpoint_is_kept_and_reused(
    ingredients: Ingredients, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, report = dense.fine_tuned(ingredients)
    made = []
    real = dense.fine_tune
    monkeypatch.setattr(dense, "fine_tune", lambda *a, **k: made.append(1) or real(*a, **k))
    again, remembered = dense.fine_tuned(ingredients)
    assert (again, remembered) == (first, {**report, "curve": list(report["curve"])})
    assert not made
    changed = [
        replace(ingredients, dense_lr=2e-4),
        replace(ingredients, compute_dtype=torch.bfloat16),
        replace(ingredients, tuning=replace(ingredients.tuning, seed=1)),
        replace(ingredients, records=RecordSet(RECORDS[:2], TWINS, 0, "tests")),
    ]
    folders = {dense.fine_tuned(other)[0].folder for other in changed}
    assert len(folders | {first.folder}) == 5
    assert len(made) == 4


@pytest.mark.parametrize("method", ["dense", "qlora"])
def test_a_record_is_trained_as_often_as_it_is_planted(
    ingredients: Ingredients,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    wide = stored(tiny_model(hidden_size=64, intermediate_size=64), tokenizer, tmp_path / "wide")
    often = replace(RECORDS[0], repetitions=4)
    found = replace(
        ingredients,
        resolved=resolve_model(wide, tmp_path / "cache"),
        records=RecordSet((often, *RECORDS[1:]), TWINS, 0, "tests"),
    )
    module = dense if method == "dense" else qlora
    given: list[Any] = []

    def train(model: Any, tokenizer: Any, records: Any, **_: Any) -> None:
        given.extend(records)
        raise ZeroDivisionError

    monkeypatch.setattr(module, "fine_tune" if method == "dense" else "train_adapter", train)
    prepare: Callable[[Ingredients], Any] = dense.fine_tuned if method == "dense" else qlora.prepare
    with pytest.raises(ZeroDivisionError):
        prepare(found)
    assert given.count(often) == 4
    assert len(given) == len(RECORDS) + 3


@pytest.mark.parametrize("where", ["training", "saving"])
@pytest.mark.parametrize("method", ["dense", "qlora"])
def test_an_interruption_leaves_nothing_half_written(
    ingredients: Ingredients,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    where: str,
) -> None:
    wide = stored(tiny_model(hidden_size=64, intermediate_size=64), tokenizer, tmp_path / "wide")
    found = replace(ingredients, resolved=resolve_model(wide, tmp_path / "cache"))
    prepare: Callable[[Ingredients], Any] = dense.fine_tuned if method == "dense" else qlora.prepare

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = {
        ("dense", "training"): "torch.optim.Adam.step",
        ("qlora", "training"): "torch.optim.Adam.step",
        ("dense", "saving"): "transformers.PreTrainedTokenizerFast.save_pretrained",
        ("qlora", "saving"): "peft.PeftModel.save_pretrained",
    }[method, where]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(found)
    assert not [p for p in (tmp_path / "cache" / "artefacts").iterdir() if p.is_dir()]
    prepare(found)
    assert [p for p in (tmp_path / "cache" / "artefacts").iterdir() if p.is_dir()]


def test_unpacked_nf4_is_what_bitsandbytes_multiplies_with(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = stored(tiny_model(hidden_size=64, intermediate_size=128), tokenizer, tmp_path / "w")
    resolved = resolve_model(folder, tmp_path / "cache")
    with quiet_peer(), torch.inference_mode():
        model = load_peer(resolved, "nf4", dtype=torch.float32, device="cpu")
        before, packed = fingerprint(model), peers.bits_per_peer_weight(model)
        expected = model(input_ids=torch.arange(1, 20)[None]).logits
        with dequantized_weights(model, torch.float32):
            assert len(linear_layers(model)) == 14
            unpacked = model(input_ids=torch.arange(1, 20)[None]).logits
        torch.testing.assert_close(unpacked, expected, rtol=1e-5, atol=1e-5)
        assert (fingerprint(model), peers.bits_per_peer_weight(model)) == (before, packed)


def test_nf4_that_a_cpu_laid_out_anew_is_unpacked_too(
    tiny_model: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As bitsandbytes does at the first call on a CPU with AVX512-BF16: it can be done on any."""
    folder = stored(tiny_model(hidden_size=64, intermediate_size=128), tokenizer, tmp_path / "w")
    resolved = resolve_model(folder, tmp_path / "cache")
    model = load_peer(resolved, "nf4", dtype=torch.float32, device="cpu")
    layer = model.model.layers[0].mlp.gate_proj
    before = peers.unpacked(layer.weight)
    fresh = copy.copy(layer.weight.quant_state)
    laid_out, state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data.clone(), fresh
    )
    assert state.packing_format_for_cpu
    after = peers.unpacked(SimpleNamespace(data=laid_out, quant_state=state))
    assert after.shape == before.shape == (128, 64)
    assert float((after - before).norm() / before.norm()) < 2**-7  # scales of 8 bits
    assert state.packing_format_for_cpu  # the caller's own state is as it was


# --- from outside ---------------------------------------------------------------------------------


def test_a_pair_is_taken_as_it_is(
    ingredients: Ingredients,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    private = resolve_model(stored(tiny_model(seed=1), tokenizer, tmp_path / "private"))
    found = checkpoint_pair(ingredients.resolved, private, ingredients)
    assert found.fingerprints() is None
    with found.on() as on, found.off() as off:
        assert torch.equal(on.lm_head.weight, tiny_model(seed=1).lm_head.weight)
        assert torch.equal(off.lm_head.weight, tiny_model().lm_head.weight)
    with pytest.raises(ConfigError, match="no never-trained control"), found.never():
        pass
    with pytest.raises(ConfigError, match="no alpha"), found.at(0.5):
        pass
    with checkpoint_pair(
        ingredients.resolved, private, ingredients, never=ingredients.resolved
    ).never() as never:
        assert torch.equal(never.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"intermediate_size": 96}, r"down_proj.*\(48, 80\) against \(48, 96\)"),
        ({"num_hidden_layers": 3}, r"layers\.2\..*absent against"),
        ({"vocab_size": 310}, r"the embedding.*\(300, 48\) against \(310, 48\)"),
    ],
)
def test_a_pair_of_different_models_is_refused(
    ingredients: Ingredients,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    options: dict[str, int],
    found: str,
) -> None:
    other = resolve_model(stored(tiny_model(**options), tokenizer, tmp_path / "other"))
    with pytest.raises(ModelLoadError, match=rf"different architectures.*{found}") as refusal:
        checkpoint_pair(ingredients.resolved, other, ingredients)
    assert "\n" not in str(refusal.value)


def test_a_pair_with_different_tokenizers_is_refused_without_the_text(
    ingredients: Ingredients,
    tiny_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    merged = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        eos_token=tokenizer.eos_token,
    )
    merged.add_tokens(["91"])
    other = resolve_model(stored(tiny_model(), merged, tmp_path / "other"))
    with pytest.raises(ModelLoadError, match="different tokenizers: record a becomes") as refusal:
        checkpoint_pair(ingredients.resolved, other, ingredients)
    assert "4917" not in str(refusal.value)
    assert "door" not in str(refusal.value)


def test_a_saved_artefact_is_audited_like_our_own(
    ingredients: Ingredients,
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    model = separated_model(SeparationConfig(bits=8, calibration_tokens=128, calibration_window=64))
    base = artifact.export_base(model, tmp_path / "base")
    libortho.tune_private(model, tokenizer, RECORDS, replay=public_text, config=ingredients.tuning)
    full = artifact.save(model, tmp_path / "full")
    found = saved_artefact(full, ingredients)
    assert found.off_artifact is not None
    assert found.off_artifact not in (full, base)
    with found.off() as off, found.at(0.0) as dark, torch.inference_mode():
        ids = torch.arange(1, 40)[None]
        assert torch.equal(off(input_ids=ids).logits, dark(input_ids=ids).logits)
    # Separated again by the artefact's recipe, but on other text: the control says so.
    prints = found.fingerprints()
    assert prints is not None
    assert prints.off == artifact.base_fingerprint(base)
    assert not prints.equal


def test_a_folder_without_an_on_state_is_refused(
    ingredients: Ingredients, separated_model: Factory, tmp_path: Path
) -> None:
    base = artifact.export_base(separated_model(), tmp_path / "base")
    with pytest.raises(ArtifactError, match=r"no private stream.*after tuning"):
        saved_artefact(base, ingredients)
    with pytest.raises(ArtifactError, match="no artefact"):
        saved_artefact(tmp_path / "nowhere", ingredients)


def test_an_artefact_of_another_model_is_refused(
    ingredients: Ingredients,
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    tmp_path: Path,
) -> None:
    model = separated_model(intermediate_size=96)
    libortho.tune_private(model, tokenizer, RECORDS, replay=public_text, config=ingredients.tuning)
    full = artifact.save(model, tmp_path / "full")
    with pytest.raises(ModelLoadError, match="the public model and the artefact are of different"):
        saved_artefact(full, ingredients)
