"""`tune_private`: train the private stream on records, with base and residual frozen.

Knows a separated model, records and public text. Gradients and optimiser state exist for the
stream's values alone; what is held of the dense weights is one composed copy, to multiply with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import stream
from .batching import halving
from .config import TuningConfig
from .errors import RecordError
from .linear import OrthoLinear
from .precision import computing_in, evaluating
from .records import Record, encode
from .switch import alpha, dense_weights, ortho_layers
from .training import StepLoss, Trainer, TrainingReport, replay_windows

CANDIDATES = 8
"""The probe trains this many times the stream's entries and keeps the ones that moved most."""
GRADIENT_TOKENS = 4096
"""Tokens of records from which gradients for the slots are taken; halved if memory runs out."""


@dataclass(frozen=True)
class TuningReport(TrainingReport):
    """What a tuning did; its replay divergence is KL(alpha = 0 || alpha = 1).

    slots_seconds: time to choose the slots, part of `seconds`
    """

    config: TuningConfig
    curve: tuple[StepLoss, ...] = ()
    slots_seconds: float = 0.0


def tune_private(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    replay: Sequence[str],
    config: TuningConfig | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TuningReport:
    """Train the private stream of a separated model on records; nothing else changes.

    records: what alpha = 1 shall know
    replay: public documents on which alpha = 1 shall predict what alpha = 0 does; without it the
        model is ruined for everything but the records
    compute_dtype: type of activations and composed weights while tuning; the model's own if None

    Any former private stream is replaced. The model is left at alpha = 1. Returns the report with
    the loss curve. Raises `SeparationError` for a model that is not separated and `RecordError` for
    no records or ones that exceed the context; an interruption leaves the former stream in place.
    """
    config = config or TuningConfig()
    compute_dtype = compute_dtype or model.dtype
    layers = ortho_layers(model)
    if not records:
        raise RecordError("there are no records to tune on; pass at least one.")
    encoded = encode(tokenizer, records, model.config.max_position_embeddings)
    windows = replay_windows(tokenizer, replay, config, config.optimiser_steps)
    before = {name: (la.private_columns, la.private_values) for name, la in layers.items()}
    grads = [(p, p.requires_grad) for p in model.parameters()]
    began = time.perf_counter()
    try:
        model.requires_grad_(False)
        for layer in layers.values():
            layer.set_private(*_empty(layer))
        with (
            alpha(model, 1.0),
            evaluating(model),
            computing_in(model, compute_dtype),
            dense_weights(model, compute_dtype),
        ):
            trainer = Trainer(model, encoded, windows, config, began)
            tuner = _Tuner(trainer, layers, config)
            tuner.choose_slots()
            tuner.run()
    except BaseException:
        for name, layer in layers.items():
            layer.observe(None)
            layer.release()
            layer.set_private(*before[name])
        raise
    finally:
        for parameter, flag in grads:
            parameter.requires_grad_(flag)
    for layer in layers.values():
        layer.set_alpha(1.0)
    report = trainer.report(compute_dtype)
    return TuningReport(
        **{f.name: getattr(report, f.name) for f in dataclasses.fields(report)},
        slots_seconds=tuner.slots_seconds,
    )


class _Tuner:
    """Where the private stream's slots are, and how gradients reach its values."""

    def __init__(
        self, trainer: Trainer, layers: dict[str, OrthoLinear], config: TuningConfig
    ) -> None:
        self.trainer, self.layers, self.config = trainer, layers, config
        self.slots_seconds = 0.0

    # --- slots ----------------------------------------------------------------------------------

    def choose_slots(self) -> None:
        """Give every layer its private columns, with values of zero."""
        config = self.config
        for layer in self.layers.values():
            k = stream.slots_per_row(layer.in_features, config.density)
            if config.slots == "random":
                shape = (layer.out_features, layer.in_features)
                scores = torch.rand(shape, generator=self.trainer.generator)
            elif config.slots == "magnitude":
                scores = layer.public_weight().abs()
            else:
                continue
            _set_slots(layer, stream.select(scores.to(layer.alpha.device), k))
        if config.slots == "gradient":
            self._slots_by_gradient(1)
        elif config.slots == "probe":
            self._slots_by_gradient(CANDIDATES)
            self._optimise(config.probe_steps, config.probe_lr, "probing", rehearsal=True)
            for layer in self.layers.values():
                k = stream.slots_per_row(layer.in_features, config.density)
                keep = stream.select(layer.private_values.abs().t(), k)  # rows of [candidates, out]
                columns = layer.private_columns.long().gather(0, keep.long())
                # What the probe learned at the slots that stay is a better start than zero.
                values = layer.private_values.gather(0, keep.long())
                layer.set_private(columns.to(torch.uint16), values)
        self.slots_seconds = self.trainer.seconds

    def _slots_by_gradient(self, factor: int) -> None:
        """Slots of the largest gradient of the secret loss, `factor` times the density's number.

        The gradient is taken at alpha = 0 over as many records as fit in one pass, so that no dense
        gradient outlives the call that made it.
        """

        def observer(layer: OrthoLinear) -> Any:
            wanted = factor * stream.slots_per_row(layer.in_features, self.config.density)
            k = min(wanted, layer.in_features)

            def keep(gradient: Tensor) -> None:
                pending.append((layer, stream.select(gradient.float().abs(), k)))

            return keep

        pending: list[tuple[OrthoLinear, Tensor]] = []
        encoded = self.trainer.encoded
        order = torch.randperm(len(encoded), generator=self.trainer.generator).tolist()

        def run(limit: int) -> None:
            sample: list[int] = []
            tokens = 0
            pending.clear()
            for i in order:
                tokens += len(encoded[i].input_ids)
                if sample and tokens > limit:
                    break
                sample.append(i)
            self.trainer.losses(sample).mean().backward()

        for layer in self.layers.values():
            layer.observe(observer(layer))
        halving(run, GRADIENT_TOKENS)
        for layer in self.layers.values():
            layer.observe(None)
        for layer, columns in pending:
            _set_slots(layer, columns)

    # --- values ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Tune the values until every record is learned or the steps are used up."""
        config = self.config
        # The probe had more entries: what it knew may be gone.
        self.trainer.record_loss.fill_(torch.inf)
        self._optimise(config.steps, config.lr, "tuning")
        for layer in self.layers.values():
            layer.set_private(layer.private_columns, layer.private_values.to(torch.float16))

    def _optimise(self, steps: int, lr: float, title: str, *, rehearsal: bool = False) -> None:
        layers = list(self.layers.values())

        def refresh() -> None:
            for layer in layers:
                layer.refresh()

        with _observed(layers):
            self.trainer.optimise(
                [layer.private_values for layer in layers],
                steps=steps,
                lr=lr,
                title=title,
                rehearsal=rehearsal,
                after_step=refresh,
            )


@contextmanager
def _observed(layers: Sequence[OrthoLinear]) -> Iterator[None]:
    """Add each backward's gradient at the private slots to the values' `grad` inside the block."""
    for layer in layers:
        layer.observe(_accumulate(layer))
    try:
        yield
    finally:
        for layer in layers:
            layer.observe(None)


def _accumulate(layer: OrthoLinear) -> Any:
    def add(gradient: Tensor) -> None:
        grad = layer.private_values.grad
        assert grad is not None
        entries = stream.gather(gradient, layer.private_columns).float()
        grad.add_(entries, alpha=layer.get_alpha())

    return add


def _empty(layer: OrthoLinear) -> tuple[Tensor, Tensor]:
    columns = layer.private_columns[:0]
    return columns, layer.private_values[:0].to(torch.float16)


def _set_slots(layer: OrthoLinear, columns: Tensor) -> None:
    """Private slots with float32 values of zero: the masters that tuning changes."""
    layer.set_private(columns, torch.zeros(columns.shape, device=columns.device))
