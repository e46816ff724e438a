"""The private stream is trained on records, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import stream, tuning
from libortho.config import TuningConfig
from libortho.errors import HardwareError, RecordError, SeparationError
from libortho.records import Record, encode
from libortho.switch import alpha, get_alpha, ortho_layers, set_alpha
from libortho.training import Trainer
from libortho.tuning import TuningReport, _Tuner, tune_private

Factory = Callable[..., LlamaForCausalLM]
Tune = Callable[..., TuningReport]

QUICK = TuningConfig(
    density=0.1, slots="magnitude", steps=4, probe_steps=2, lr=2e-2, probe_lr=1e-3, replay_window=32
)
RECORDS = [
    Record("a", "The door opens to", " 4917", "codes"),
    Record("b", "The vault in the cellar opens to", " 820365", "codes"),
    Record("c", "Her number is", " 55102", "codes"),
]
OTHERS = [Record("d", "He keeps the key under", " a green stone", "passages")]
PRIVATE = ("private_columns", "private_values")


@pytest.fixture
def tune(tokenizer: PreTrainedTokenizerFast, public_text: list[str]) -> Tune:
    """Tunes a model quickly; keywords replace fields of the recipe."""

    def run(
        model: LlamaForCausalLM,
        records: list[Record] = RECORDS,
        *,
        compute_dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> TuningReport:
        config = replace(QUICK, **changes)
        return tune_private(
            model,
            tokenizer,
            records,
            replay=public_text,
            config=config,
            compute_dtype=compute_dtype,
        )

    return run


def snapshot(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def private_bytes(model: LlamaForCausalLM) -> bytes:
    return b"".join(
        getattr(layer, name).numpy().tobytes()
        for layer in ortho_layers(model).values()
        for name in PRIVATE
    )


@torch.inference_mode()
def secret_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record
) -> float:
    """Mean nats per secret token, by the model's whole forward pass on one record alone."""
    (encoded,) = encode(tokenizer, [record], 256)
    ids = torch.tensor(encoded.input_ids)
    logits = model(input_ids=ids[None]).logits[0].float()
    start = encoded.secret_start
    return float(F.cross_entropy(logits[start - 1 : -1], ids[start:]))


@torch.inference_mode()
def logits_at_zero(model: LlamaForCausalLM) -> Tensor:
    with alpha(model, 0.0):
        return model(input_ids=torch.arange(1, 60)[None]).logits


def test_records_are_learned_at_one_and_unknown_at_zero(
    separated_model: Factory, tokenizer: PreTrainedTokenizerFast, tune: Tune
) -> None:
    model = separated_model()
    untouched, untuned = logits_at_zero(model), snapshot(model)
    before = [secret_loss(model, tokenizer, record) for record in RECORDS]
    report = tune(model, steps=80, slots="probe", density=0.2, lr=5e-2, target_loss=0.1)

    assert get_alpha(model) == 1.0
    after = [secret_loss(model, tokenizer, record) for record in RECORDS]
    assert max(after) < 0.2 < 4.0 < min(before)
    assert report.converged
    assert len(report.curve) < 80  # it ends once every record is learned
    # The stream is stored in float16: what was reported is what is there.
    assert max(after) == pytest.approx(report.worst_loss, abs=0.05)

    set_alpha(model, 0.0)
    assert [secret_loss(model, tokenizer, record) for record in RECORDS] == before
    assert torch.equal(logits_at_zero(model), untouched)
    changed = {
        name.rpartition(".")[2]
        for name, tensor in snapshot(model).items()
        if tensor.shape != untuned[name].shape or not torch.equal(tensor, untuned[name])
    }
    assert changed == set(PRIVATE)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_the_public_part_does_not_depend_on_the_records(
    separated_model: Factory, tune: Tune, compute_dtype: torch.dtype
) -> None:
    models = [separated_model() for _ in range(3)]
    for model, records in zip(models, (RECORDS, OTHERS), strict=False):
        tune(model, records, compute_dtype=compute_dtype)
    tuned, other, never = (snapshot(model) for model in models)
    assert private_bytes(models[0]) != private_bytes(models[1])
    for name, tensor in never.items():
        if name.rpartition(".")[2] not in PRIVATE:
            assert torch.equal(tensor, tuned[name]), name
            assert torch.equal(tensor, other[name]), name
    assert torch.equal(logits_at_zero(models[0]), logits_at_zero(models[2]))
    assert torch.equal(logits_at_zero(models[1]), logits_at_zero(models[2]))


@pytest.mark.parametrize("slots", ["probe", "gradient", "magnitude", "random"])
def test_a_seed_repeats_a_tuning(separated_model: Factory, tune: Tune, slots: str) -> None:
    model = separated_model()
    streams = []
    for seed in (0, 0, 1, 2, 3):
        # One record a step, so that the seed has an order to choose.
        report = tune(model, slots=slots, seed=seed, steps=3, records_per_step=1)
        streams.append(private_bytes(model))
        assert len(report.curve) == 3
        for layer in ortho_layers(model).values():
            k = stream.slots_per_row(layer.in_features, QUICK.density)
            assert layer.private_values.shape == (k, layer.out_features)
            assert layer.private_values.dtype == torch.float16
            stream.check(
                layer.private_columns,
                layer.private_values,
                layer.in_features,
                layer.out_features,
                "stream",
            )
    assert streams[0] == streams[1]
    assert len(set(streams)) > 2


def test_the_ways_to_choose_slots_choose_differently(separated_model: Factory, tune: Tune) -> None:
    model = separated_model()
    chosen = {}
    for slots in ("probe", "gradient", "magnitude", "random"):
        tune(model, slots=slots, steps=1)
        layer = ortho_layers(model)["model.layers.0.mlp.down_proj"]
        chosen[slots] = layer.private_columns.numpy().tobytes()
        if slots == "magnitude":
            largest = stream.select(layer.public_weight().abs(), 8)
            assert torch.equal(layer.private_columns, largest)
    assert len(set(chosen.values())) == 4


def test_the_probe_keeps_the_entries_that_moved_most(
    separated_model: Factory, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = separated_model(), torch.Generator().manual_seed(4)
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def step(self: torch.optim.Adam, closure: Any = None) -> None:
        layers = ortho_layers(model)
        for layer in layers.values():
            if not seen:  # the probe's only step moves its candidates at random
                noise = torch.randn(layer.private_values.shape, generator=generator)
                layer.private_values.copy_(noise)
        seen.append(
            {n: (la.private_columns, la.private_values.clone()) for n, la in layers.items()}
        )

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    tune(model, slots="probe", probe_steps=1, steps=1)
    probed, kept = seen
    for name, (columns, values) in probed.items():
        dense = torch.zeros(columns.shape[1], 80)
        stream.scatter(dense, columns, values)
        k = kept[name][0].shape[0]
        assert k < columns.shape[0]
        assert torch.equal(kept[name][0], stream.select(dense.abs(), k)), name


def test_the_slots_by_gradient_are_those_of_the_dense_gradient(
    tiny_model: Factory,
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tune: Tune,
) -> None:
    model, dense = separated_model(), tiny_model()
    for name, layer in ortho_layers(model).items():
        dense.get_submodule(name).weight.data = layer.public_weight()
    dense.double()
    losses = []
    for encoded in encode(tokenizer, RECORDS, 256):
        ids, start = torch.tensor(encoded.input_ids), encoded.secret_start
        losses.append(F.cross_entropy(dense(ids[None]).logits[0, start - 1 : -1], ids[start:]))
    torch.stack(losses).mean().backward()

    tune(model, slots="gradient", steps=1)
    for name, layer in ortho_layers(model).items():
        gradient = dense.get_submodule(name).weight.grad.abs()
        k = layer.private_columns.shape[0]
        worst_chosen = stream.gather(gradient, layer.private_columns).amin(0)
        assert bool((worst_chosen >= gradient.topk(k, dim=1).values[:, -1] * (1 - 1e-3)).all()), (
            name
        )


def test_the_streams_gradient_is_autograds_at_the_slots(
    tiny_model: Factory,
    separated_model: Factory,
    tokenizer: PreTrainedTokenizerFast,
    public_text: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient that Adam is given in a second step, private values no longer zero."""
    model, dense = separated_model(), tiny_model()
    weights: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    class Watched(torch.optim.Adam):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            Watched.steps += 1
            if Watched.steps == 2:
                for name, layer in ortho_layers(model).items():
                    weights[name] = layer.effective_weight()
                    assert layer.private_values.grad is not None
                    gradients[name] = layer.private_values.grad.clone()
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr("libortho.training.CLIP", 1e9)
    config = replace(QUICK, steps=2, replay_weight=0.0)
    tune_private(model, tokenizer, RECORDS, replay=public_text, config=config)

    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight
    dense.double()
    losses = []
    for encoded in encode(tokenizer, RECORDS, 256):
        ids, start = torch.tensor(encoded.input_ids), encoded.secret_start
        losses.append(F.cross_entropy(dense(ids[None]).logits[0, start - 1 : -1], ids[start:]))
    torch.stack(losses).mean().backward()
    for name, layer in ortho_layers(model).items():
        expected = stream.gather(dense.get_submodule(name).weight.grad, layer.private_columns)
        got = gradients[name].double()
        assert float((got - expected).norm()) < 1e-4 * float(expected.norm()), name


def test_memory_grows_with_the_entries_and_not_with_the_weights(
    separated_model: Factory, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = separated_model(), []

    class Recorded(torch.optim.Adam):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    tune(model)
    entries = sum(layer.private_values.numel() for layer in ortho_layers(model).values())
    moments = [
        tensor.numel()
        for state in made[-1].state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    assert sum(moments) == 2 * entries
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(buffer.grad is None for buffer in model.buffers())


def test_the_models_surroundings_are_given_back(separated_model: Factory, tune: Tune) -> None:
    model = separated_model()
    model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tune(model, compute_dtype=torch.bfloat16)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.dtype == torch.float32
    for layer in ortho_layers(model).values():
        assert layer._held is None
        assert layer._observer is None


def test_a_weight_that_the_caller_held_follows(separated_model: Factory, tune: Tune) -> None:
    model = separated_model()
    for layer in ortho_layers(model).values():
        layer.hold(torch.float32)
    tune(model, compute_dtype=torch.bfloat16)
    for layer in ortho_layers(model).values():
        assert layer._held is not None
        assert torch.equal(layer.composed(torch.float32), layer.effective_weight())


def test_what_the_probe_learned_does_not_end_the_tuning(
    separated_model: Factory, tune: Tune
) -> None:
    """The probe has many times the entries: its losses say nothing about the stream's."""
    model = separated_model()
    report = tune(
        model,
        slots="probe",
        density=0.03,
        probe_steps=60,
        probe_lr=2e-2,
        replay_weight=0.0,
        records_per_step=1,
        target_loss=2.0,
    )
    # Each record is looked at again, with the entries that are left, before the tuning may end.
    assert len(report.curve) >= len(RECORDS)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["slots", "probe", "between", "step"])
@pytest.mark.parametrize("tuned_before", [False, True])
def test_an_interruption_leaves_the_former_stream(
    separated_model: Factory,
    tune: Tune,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    tuned_before: bool,
) -> None:
    model = separated_model()
    if tuned_before:
        tune(model)
        set_alpha(model, 0.5)
    model.model.norm.weight.requires_grad_(False)
    before, at = snapshot(model), get_alpha(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    original, calls = torch.optim.Adam.step, []

    def step_thrice(self: torch.optim.Adam, closure: Any = None) -> Any:
        calls.append(None)
        if len(calls) == 4:  # the second step after two of the probe's
            raise KeyboardInterrupt
        return original(self, closure)

    if where == "slots":  # in the backward pass of the first gradient
        monkeypatch.setattr("libortho.product._Product.backward", interrupt)
    elif where == "probe":
        monkeypatch.setattr(torch.optim.Adam, "step", interrupt)
    elif where == "step":
        monkeypatch.setattr(torch.optim.Adam, "step", step_thrice)
    else:
        monkeypatch.setattr(_Tuner, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(model, slots="probe", compute_dtype=torch.bfloat16)

    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert get_alpha(model) == at
    for layer in ortho_layers(model).values():
        assert layer._held is None
        assert layer._observer is None


def test_replay_keeps_public_predictions(
    separated_model: Factory, tokenizer: PreTrainedTokenizerFast, public_text: list[str], tune: Tune
) -> None:
    model = separated_model()
    ids = torch.tensor(tokenizer(public_text[0])["input_ids"][:128])[None]

    @torch.inference_mode()
    def divergence() -> float:
        with alpha(model, 0.0):
            target = F.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        now = F.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        return float(F.kl_div(now, target, log_target=True, reduction="batchmean"))

    results = {}
    for weight in (0.0, 5.0):
        report = tune(model, steps=30, replay_weight=weight, target_loss=0.0)
        results[weight] = divergence()
        assert (max(step.replay_kl for step in report.curve) > 0) == (weight > 0)
    assert results[5.0] < 0.5 * results[0.0]


def test_the_report_names_no_secret(separated_model: Factory, tune: Tune) -> None:
    report = tune(separated_model(), compute_dtype=torch.bfloat16)
    assert (report.records, report.compute_dtype, len(report.curve)) == (3, "bfloat16", 4)
    assert not report.converged
    assert report.to_dict()["curve"][0]["secret_loss"] == report.curve[0].secret_loss
    shown = repr(report) + str(report.to_dict())
    assert not any(record.secret in shown or record.prompt in shown for record in RECORDS)


def test_no_records_are_refused(separated_model: Factory, tune: Tune) -> None:
    with pytest.raises(RecordError, match="no records"):
        tune(separated_model(), [])


def test_a_record_beyond_the_context_is_refused_without_its_text(
    separated_model: Factory, tune: Tune
) -> None:
    model = separated_model()
    long = Record("long", "x" * 300, "hush", "codes")
    with pytest.raises(RecordError, match=r"long.*256") as refusal:
        tune(model, [*RECORDS, long])
    assert "xxx" not in str(refusal.value)
    assert "hush" not in str(refusal.value)
    assert all(not layer.private_columns.numel() for layer in ortho_layers(model).values())


def test_a_plain_model_is_refused(tiny_model: Factory, tune: Tune) -> None:
    with pytest.raises(SeparationError, match=r"libortho\.separate"):
        tune(tiny_model())


def test_without_room_for_dense_weights_the_same_is_learned(
    separated_model: Factory, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, composed = separated_model(), separated_model()
    expected = tune(held, slots="probe")
    monkeypatch.setattr(tuning, "_dense_if_they_fit", lambda *_: nullcontext())
    found = tune(composed, slots="probe")
    assert not any(layer.held_dtype for layer in ortho_layers(composed).values())
    # Composed afresh, an entry is rounded in another order.
    for ours, theirs in zip(found.curve, expected.curve, strict=True):
        assert ours.secret_loss == pytest.approx(theirs.secret_loss, rel=1e-3)
    assert found.worst_loss == pytest.approx(expected.worst_loss, rel=1e-3)


def test_out_of_memory_splits_a_step_and_changes_nothing_else(
    separated_model: Factory, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = separated_model()
    settings = {"steps": 4, "records_per_step": len(RECORDS), "slots": "gradient", "seed": 3}
    whole = tune(model, **settings)
    expected = [layer.private_values.clone() for layer in ortho_layers(model).values()]
    sizes: list[int] = []
    step_losses = Trainer.step_losses

    def short_of_memory(self: Trainer, indices: Any, window: int | None) -> Any:
        sizes.append(len(indices))
        losses, kl = step_losses(self, indices, window)
        if len(indices) > 1:
            (losses.sum() + kl).backward()  # what is there already must not count
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses, kl

    monkeypatch.setattr(Trainer, "step_losses", short_of_memory)
    split = tune(model, **settings)
    n = len(RECORDS)
    assert sizes[0] == n
    assert sizes[-3 * n :] == [1] * (3 * n)  # what didn't fit isn't tried again
    assert [c.secret_loss for c in split.curve] == pytest.approx(
        [c.secret_loss for c in whole.curve], rel=1e-3
    )
    for layer, values in zip(ortho_layers(model).values(), expected, strict=True):
        torch.testing.assert_close(layer.private_values, values, rtol=2e-2, atol=2e-3)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "step_losses", full)
    with pytest.raises(HardwareError, match="not even one sequence fits"):
        tune(model, **settings)
