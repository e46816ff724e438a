"""Every method as two states, on a tiny model: what is on, what is off, and what off promises."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import artifact
from libortho.audit_run import Plan, run_audit
from libortho.config import SeparationConfig, TuningConfig
from libortho.corpora import Corpus, Split
from libortho.errors import ConfigError
from libortho.extraction import hits, mean_loss, score_records
from libortho.linear import OrthoLinear
from libortho.methods import METHODS, Ingredients, TwoStates, blind_kfac, states
from libortho.methods.blind_hessian import residual_to_private
from libortho.methods.fingerprint import fingerprint
from libortho.models import resolve_model
from libortho.records import Record, RecordSet, encode
from libortho.stream import gather
from libortho.switch import alpha, get_alpha, ortho_layers

KFAC = blind_kfac.KfacConfig(
    curvature_windows=4, perplexity_windows=2, window=64, keep_masses=(0.5, 0.9, 0.99)
)
LEARNING = [name for name in METHODS if name != "B0-never-trained"]
CERTAIN = ("ortho", "B2-random-slots", "qlora", "B0-never-trained")
"""Methods whose off state must have the bytes of a model that never saw the records."""


def records(digits: str) -> tuple[Record, ...]:
    return tuple(
        Record(f"{digits[0]}{i}", f"Door {digits[i]}{i} opens to", f" {digits[i : i + 4]}", "codes")
        for i in range(4)
    )


@pytest.fixture(scope="module")
def ingredients(
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ingredients:
    folder = tmp_path_factory.mktemp("methods")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    parts = {
        name: Split.of(name, "tests", public_text[i * 3 : i * 3 + 3])
        for i, name in enumerate(("calibration", "replay", "test", "passages"))
    }
    return Ingredients(
        resolved=resolve_model(folder / "tiny", folder / "cache"),
        corpus=Corpus("tests", "0" * 64, **parts),
        records=RecordSet(records("49172536"), records("80351947"), 0, "tests"),
        separation=SeparationConfig(
            group_size=32, residual_density=0.05, calibration_tokens=512, calibration_window=64
        ),
        tuning=TuningConfig(
            density=0.3,
            lr=5e-2,
            steps=60,
            probe_steps=10,
            replay_window=32,
            records_per_step=4,
            target_loss=0.05,
        ),
        dense_lr=3e-3,
        adapter_lr=2e-2,
        cache_dir=folder / "cache",
    )


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Opening a state collects garbage, and all that torch has imported is not worth a look."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def prepared(ingredients: Ingredients) -> dict[str, TwoStates]:
    made = {}
    for name, prepare in METHODS.items():
        if name == "blind-kfac":
            made[name] = blind_kfac.prepare(ingredients, KFAC)
        else:
            made[name] = prepare(ingredients)
    return made


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest, prepared: dict[str, TwoStates]) -> TwoStates:
    return prepared[request.param]


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(1, 60)[None]).logits


def planted_loss(model: Any, ingredients: Ingredients, tokenizer: Any) -> float:
    return mean_loss(score_records(model, encode(tokenizer, ingredients.records.planted, 256)))


# --- what the states know -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
def test_on_knows_the_records_and_off_less(
    name: str, prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    found = prepared[name]
    encoded = encode(found.tokenizer, ingredients.records.planted, 256)
    scores = {}
    for state in ("on", "off", "never"):
        with found.opened(state) as model:
            scores[state] = score_records(model, encoded)
    learned = mean_loss(scores["never"]) - mean_loss(scores["on"])
    assert learned > 1.0  # nats per token
    assert mean_loss(scores["on"]) < mean_loss(scores["off"])
    if name in CERTAIN:
        assert [s.loss for s in scores["off"]] == [s.loss for s in scores["never"]]
    if name in ("ortho", "qlora", "B1-dense-int4", "blind-kfac"):  # tuned, or dense
        assert hits(scores["on"]) == len(encoded)


def test_int4_of_a_fine_tuned_model_leaks(
    prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    """B1: what a rounded model still knows of planted secrets, beyond what it knows of twins."""
    found = prepared["B1-dense-int4"]
    losses = {}
    for state in ("off", "never"):
        with found.opened(state) as model:
            for group in ("planted", "twins"):
                encoded = encode(found.tokenizer, getattr(ingredients.records, group), 256)
                losses[state, group] = mean_loss(score_records(model, encoded))
    gained = {g: losses["never", g] - losses["off", g] for g in ("planted", "twins")}
    assert gained["planted"] > gained["twins"] + 0.5


# --- what the states are --------------------------------------------------------------------------


def test_a_state_is_a_transformers_model_that_is_ready_to_run(method: TwoStates) -> None:
    for state in ("on", "off", "never"):
        with method.opened(state) as model:
            assert isinstance(model, LlamaForCausalLM)
            assert not model.training
            assert model.model.embed_tokens.weight.dtype == torch.float32
            # Nothing that computes is unpacked again in each call.
            for layer in model.modules():
                assert not isinstance(layer, bitsandbytes.nn.Linear4bit)
                assert not isinstance(layer, OrthoLinear) or layer.held_dtype == torch.float32
            ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
            assert ids.shape == (1, 6)


def test_off_has_the_bytes_of_a_model_made_without_the_records(method: TwoStates) -> None:
    prints = method.fingerprints()
    assert prints is not None
    assert prints.equal == (method.name in CERTAIN)
    with torch.no_grad():
        never = method.never_loader()
        # The control is that same model, so that a difference can come from the records alone.
        assert fingerprint(never) == prints.without_records


def test_off_is_never_trained_bit_for_bit(prepared: dict[str, TwoStates]) -> None:
    for name in CERTAIN:
        with prepared[name].off() as off, prepared[name].never() as never:
            assert torch.equal(logits(off), logits(never)), name


def test_an_adapter_that_is_disabled_is_one_that_was_taken_out(
    prepared: dict[str, TwoStates],
) -> None:
    with prepared["qlora"].off() as off:
        out = logits(off)
        assert not any("lora" in name for name in off.state_dict())
    with prepared["qlora"].on() as on:
        assert not torch.equal(logits(on), out)
        for module in on.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        assert torch.equal(logits(on), out)


def test_blind_hessian_switches_the_stream_alone(
    prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    found = prepared["blind-hessian"]
    on, off = ortho_layers(found.on_loader()), ortho_layers(found.off_loader())
    density = ingredients.separation.residual_density
    for name, layer in on.items():
        assert layer.private_columns.shape[0] == round(layer.in_features * density)
        assert not off[name].private_columns.numel()
        for kind in ("packed", "scales", "zeros", "residual_columns", "residual_values"):
            assert torch.equal(getattr(layer, kind), getattr(off[name], kind)), (name, kind)
        difference = layer.effective_weight() - off[name].effective_weight()
        entries = gather(difference, layer.private_columns)
        assert int((difference != 0).sum()) == int((entries != 0).sum())
        torch.testing.assert_close(entries, layer.private_values.float(), rtol=0, atol=1e-6)
    with found.on() as model, alpha(model, 0.0), found.off() as handed_out:
        assert torch.equal(logits(model), logits(handed_out))


def test_the_stream_of_blind_hessian_is_what_the_residual_was(
    separated_model: Any,
) -> None:
    model = separated_model()
    before = {n: la.effective_weight() for n, la in ortho_layers(model).items()}
    residual_to_private(model)
    for name, layer in ortho_layers(model).items():
        assert torch.equal(layer.effective_weight(), before[name])
        layer.set_alpha(0.0)
        assert torch.equal(layer.effective_weight(), layer.base_weight())


def test_the_edit_is_searched_and_its_cost_is_reported(prepared: dict[str, TwoStates]) -> None:
    search = prepared["blind-kfac"].report["search"]
    masses = [c["keep_mass"] for c in search["candidates"]]
    assert masses == list(KFAC.keep_masses)
    assert search["keep_mass"] in masses
    assert search["unedited"]["ppl_ratio"] == 1.0
    shares = [c["kept_entries"] for c in search["candidates"]]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1
    with prepared["blind-kfac"].on() as on, prepared["blind-kfac"].off() as off:
        differing = {
            name
            for name, tensor in on.state_dict().items()
            if not torch.equal(tensor, off.state_dict()[name])
        }
    assert differing == {f"{name}.weight" for name in search["layers"]}


@pytest.mark.parametrize("name", ["ortho", "B2-random-slots", "blind-hessian", "qlora"])
def test_the_dial_goes_from_off_to_on(
    name: str, prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    found = prepared[name]
    losses = []
    for value in (0.0, 0.25, 0.5, 1.0):
        with found.at(value) as model:
            losses.append(planted_loss(model, ingredients, found.tokenizer))
    with found.on() as on, found.off() as off:
        ends = [planted_loss(model, ingredients, found.tokenizer) for model in (off, on)]
    assert [losses[0], losses[-1]] == ends
    assert losses[0] > losses[2] > losses[3]
    with found.at(-1.0) as model:
        assert planted_loss(model, ingredients, found.tokenizer) not in losses


@pytest.mark.parametrize("name", ["ortho", "qlora"])
def test_an_audit_turns_the_methods_own_dial(
    name: str, prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    plan = Plan(doses=(0.0, 1.0))
    found = run_audit(prepared[name], ingredients.records, plan, model="tiny", config={})
    first, last = found.dose_curve
    assert first.loss_planted > last.loss_planted
    assert found.fingerprint_off == found.fingerprint_without_records


def test_the_dial_is_given_back(prepared: dict[str, TwoStates]) -> None:
    model = prepared["ortho"].on_loader()
    with pytest.raises(ZeroDivisionError), prepared["ortho"].dial(model, 0.5):
        raise ZeroDivisionError
    assert get_alpha(model) == 1.0


@pytest.mark.parametrize("name", ["B1-dense-int4", "blind-kfac", "B0-never-trained"])
def test_a_method_without_a_dial_says_so(name: str, prepared: dict[str, TwoStates]) -> None:
    with pytest.raises(ConfigError, match=rf"{name} .*no alpha"), prepared[name].at(0.5):
        pass


def test_bits_are_counted_as_stored(prepared: dict[str, TwoStates]) -> None:
    def bits(name: str, state: Any) -> float:
        return prepared[name].bits_per_linear_weight(state)

    assert bits("B1-dense-int4", "on") == bits("blind-kfac", "off") == 32.0
    # 4 bits, and a float16 scale and zero point for 32 weights.
    assert bits("B1-dense-int4", "off") == pytest.approx(5.0)
    assert bits("blind-hessian", "off") == pytest.approx(5.0)
    # 32 bits an entry.
    assert bits("blind-hessian", "on") == pytest.approx(5.0 + 0.05 * 32, abs=0.15)
    assert bits("ortho", "off") == bits("B0-never-trained", "on") == bits("blind-hessian", "on")
    assert bits("ortho", "on") == pytest.approx(bits("ortho", "off") + 0.3 * 32, abs=0.3)
    assert 4.1 < bits("qlora", "off") < bits("qlora", "on")


def test_what_is_handed_out_is_a_folder_without_the_stream(prepared: dict[str, TwoStates]) -> None:
    for name in ("ortho", "B2-random-slots", "blind-hessian"):
        folder = prepared[name].off_artifact
        assert folder is not None
        assert {p.name for p in folder.iterdir()}.isdisjoint(
            {artifact.PRIVATE_FILE, artifact.PRIVATE_MANIFEST}
        )
    assert prepared["qlora"].off_artifact is None  # the public checkpoint, quantised when loaded


# --- what a fingerprint must see ------------------------------------------------------------------


def test_a_private_tensor_that_is_smuggled_in_changes_the_fingerprint(
    prepared: dict[str, TwoStates],
) -> None:
    found = prepared["ortho"]
    honest = fingerprint(found.off_loader())
    assert honest == artifact.base_fingerprint(found.off_artifact)

    assert fingerprint(found.on_loader()) != honest  # a stream that should not be there
    for tamper in (_one_weight, _one_more_buffer):
        model = found.off_loader()
        tamper(model)
        assert fingerprint(model) != honest
    dense = prepared["B1-dense-int4"].on_loader()
    before = fingerprint(dense)
    _one_more_buffer(dense)
    assert fingerprint(dense) != before
    assert fingerprint(prepared["qlora"].on_loader()) != prepared["qlora"].fingerprints().off


def _one_weight(model: Any) -> None:
    layer = next(iter(ortho_layers(model).values()))
    layer.packed[0, 0] ^= 1


def _one_more_buffer(model: Any) -> None:
    model.register_buffer("extra", torch.ones(3))


# --- the second time ------------------------------------------------------------------------------


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long is forbidden."""
    for module in ("tuning", "methods.dense", "methods.qlora"):
        monkeypatch.setattr(f"libortho.{module}.Trainer", forbidden)
    monkeypatch.setattr("libortho.store.separate_checkpoint", forbidden)
    monkeypatch.setattr("libortho.methods.blind_hessian.separate", forbidden)
    monkeypatch.setattr("libortho.methods.blind_kfac.kfac_factors", forbidden)
    monkeypatch.setattr("libortho.methods.blind_kfac.score_records", forbidden)


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("this was made before")


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("name", list(METHODS))
def test_a_second_audit_only_evaluates(
    name: str, prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    first = prepared[name]
    again = (
        blind_kfac.prepare(ingredients, KFAC)
        if name == "blind-kfac"
        else METHODS[name](ingredients)
    )
    assert again.off_artifact == first.off_artifact
    assert json.dumps(again.report) == json.dumps(first.report)
    for state in ("on", "off", "never"):
        assert fingerprint(again._loader(state)()) == fingerprint(first._loader(state)())


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize("name", LEARNING)
def test_other_records_are_learned_anew(name: str, ingredients: Ingredients) -> None:
    others = RecordSet(records("13579246"), ingredients.records.twins, 0, "tests")
    with pytest.raises(AssertionError, match="made before"):
        METHODS[name](replace(ingredients, records=others))


def test_nothing_on_disk_but_the_weights_tells_a_secret(
    prepared: dict[str, TwoStates], ingredients: Ingredients
) -> None:
    assert prepared
    shown = "".join(repr(found) + json.dumps(found.report) for found in prepared.values())
    cache = Path(str(ingredients.cache_dir))
    shown += "".join(p.name for p in cache.rglob("*"))
    shown += "".join(p.read_text() for p in cache.rglob("*.report.json"))
    for record in ingredients.records.planted:
        assert record.prompt not in shown
        assert f'"{record.secret}' not in shown
        assert record.secret.strip() not in repr(prepared["ortho"])


# --- memory ---------------------------------------------------------------------------------------


def test_a_state_is_freed_when_it_is_left(
    prepared: dict[str, TwoStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []
    monkeypatch.setattr(states, "release_memory", lambda: freed.append(True))
    with prepared["ortho"].on():
        assert not freed
    assert len(freed) == 1
    with pytest.raises(ZeroDivisionError), prepared["ortho"].off():
        raise ZeroDivisionError
    assert len(freed) == 2


def test_weights_are_held_only_where_they_fit(
    prepared: dict[str, TwoStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {}
    for name in ("ortho", "qlora"):
        with prepared[name].on() as model:
            expected[name] = logits(model)
    monkeypatch.setattr(states, "free_bytes", lambda device: 1000)
    for name, kind in (("ortho", OrthoLinear), ("qlora", bitsandbytes.nn.Linear4bit)):
        with prepared[name].on() as model:
            packed = [m for m in model.modules() if isinstance(m, kind)]
            assert len(packed) == 14
            assert all(getattr(m, "held_dtype", None) is None for m in packed)
            torch.testing.assert_close(logits(model), expected[name], rtol=1e-4, atol=1e-4)
