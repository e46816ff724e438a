"""`tune_private`: train the private stream on records, with base and residual frozen.

Knows a separated model, records and public text. Gradients and optimiser state exist for the
stream's values alone; what is held of the dense weights is one composed copy, to multiply with.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import stream
from .config import TuningConfig
from .errors import RecordError
from .linear import OrthoLinear
from .precision import computing_in, dtype_name, evaluating
from .records import EncodedRecord, Record, encode
from .scoring import hidden_states, secret_losses
from .switch import alpha, dense_weights, ortho_layers
from .windows import token_windows

CANDIDATES = 8
"""The probe trains this many times the stream's entries and keeps the ones that moved most."""
GRADIENT_TOKENS = 4096
"""Tokens of records from which gradients for the slots are taken."""
BETAS = (0.9, 0.95)
"""Adam's decay rates; the second is short because a tuning is a hundred steps."""
CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True)
class StepLoss:
    """One optimiser step of the tuning.

    secret_loss: mean nats per secret token on the step's records
    replay_kl: KL(alpha = 0 || alpha = 1) on public text in nats per token
    seconds: since the tuning began
    """

    step: int
    secret_loss: float
    replay_kl: float
    seconds: float


@dataclass(frozen=True)
class TuningReport:
    """What a tuning did.

    slots_seconds, seconds: time to choose the slots, and in all
    worst_loss: mean nats per secret token of the worst record when it was last seen
    converged: whether every record reached the target loss
    """

    config: TuningConfig
    compute_dtype: str
    records: int
    slots_seconds: float
    seconds: float
    worst_loss: float
    converged: bool
    curve: tuple[StepLoss, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    windows = _replay_windows(tokenizer, replay, config)
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
            tuner = _Tuner(model, layers, encoded, windows, config, began)
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
    return tuner.report(compute_dtype)


class _Tuner:
    """One tuning in progress."""

    def __init__(
        self,
        model: Any,
        layers: dict[str, OrthoLinear],
        encoded: Sequence[EncodedRecord],
        windows: Tensor,
        config: TuningConfig,
        began: float,
    ) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.encoded, self.windows = encoded, windows
        self.began = began
        self.generator = torch.Generator().manual_seed(config.seed)
        # No window of public text is seen twice, unless there is too little of it.
        self.fresh = itertools.cycle(range(len(windows)))
        self.curve: list[StepLoss] = []
        self.record_loss = torch.full((len(encoded),), torch.inf)
        self.slots_seconds = 0.0
        self.head = model.get_output_embeddings()
        # With alpha = 0's last hidden states kept, its logits are one product away: a few MiB in
        # place of a forward pass a step.
        with torch.inference_mode():
            self.taught = [hidden_states(model, window[None])[0] for window in windows]
        self.taught = [hidden.clone() for hidden in self.taught]

    # --- losses ---------------------------------------------------------------------------------

    def _losses(self, indices: Sequence[int]) -> Tensor:
        return secret_losses(self.model, [self.encoded[i] for i in indices])

    def _replay_kl(self, index: int) -> Tensor:
        """KL(alpha = 0 || now) on one window, nats per token (Hinton et al. 2015, T = 1)."""
        with torch.no_grad():
            target = F.log_softmax(self.head(self.taught[index]).float(), dim=-1)
        logits = self.head(hidden_states(self.model, self.windows[index][None])[0])
        return F.kl_div(
            F.log_softmax(logits.float(), dim=-1), target, log_target=True, reduction="batchmean"
        )

    # --- slots ----------------------------------------------------------------------------------

    def choose_slots(self) -> None:
        """Give every layer its private columns, with values of zero."""
        config = self.config
        for layer in self.layers.values():
            k = stream.slots_per_row(layer.in_features, config.density)
            if config.slots == "random":
                shape = (layer.out_features, layer.in_features)
                scores = torch.rand(shape, generator=self.generator)
            elif config.slots == "magnitude":
                scores = layer.public_weight().abs()
            else:
                continue
            _set_slots(layer, stream.select(scores.to(layer.alpha.device), k))
        if config.slots == "gradient":
            self._slots_by_gradient(1)
        elif config.slots == "probe":
            self._slots_by_gradient(CANDIDATES)
            self._optimise(config.probe_steps, config.probe_lr, "probing", keep_curve=False)
            for layer in self.layers.values():
                k = stream.slots_per_row(layer.in_features, config.density)
                keep = stream.select(layer.private_values.abs().t(), k)  # rows of [candidates, out]
                columns = layer.private_columns.long().gather(0, keep.long())
                # What the probe learned at the slots that stay is a better start than zero.
                values = layer.private_values.gather(0, keep.long())
                layer.set_private(columns.to(torch.uint16), values)
        self.slots_seconds = time.perf_counter() - self.began

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
        order = torch.randperm(len(self.encoded), generator=self.generator).tolist()
        sample: list[int] = []
        tokens = 0
        for i in order:
            tokens += len(self.encoded[i].input_ids)
            if sample and tokens > GRADIENT_TOKENS:
                break
            sample.append(i)
        for layer in self.layers.values():
            layer.observe(observer(layer))
        self._losses(sample).mean().backward()
        for layer in self.layers.values():
            layer.observe(None)
        for layer, columns in pending:
            _set_slots(layer, columns)

    # --- values ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Tune the values until every record is learned or the steps are used up."""
        config = self.config
        self.record_loss.fill_(torch.inf)  # the probe had more entries: what it knew may be gone
        self._optimise(config.steps, config.lr, "tuning", keep_curve=True)
        for layer in self.layers.values():
            layer.set_private(layer.private_columns, layer.private_values.to(torch.float16))

    def _optimise(self, steps: int, lr: float, title: str, *, keep_curve: bool) -> None:
        config = self.config
        layers = list(self.layers.values())
        values = [layer.private_values for layer in layers]
        for value in values:
            value.grad = torch.zeros_like(value)
        optimiser = torch.optim.Adam(values, lr=lr, betas=BETAS)
        batches = self._batches()
        for layer in layers:
            layer.observe(_accumulate(layer))
        try:
            progress = tqdm(range(steps), desc=title, unit="step", disable=None, leave=False)
            for step in progress:
                optimiser.param_groups[0]["lr"] = lr * _schedule(step, steps)
                chosen = next(batches)
                losses = self._losses(chosen)
                losses.mean().backward()
                divergence = 0.0
                if config.replay_weight:
                    kl = self._replay_kl(next(self.fresh))
                    (config.replay_weight * kl).backward()
                    divergence = float(kl.detach())
                torch.nn.utils.clip_grad_norm_(values, CLIP)
                optimiser.step()
                for value, layer in zip(values, layers, strict=True):
                    assert value.grad is not None
                    value.grad.zero_()
                    layer.refresh()
                secret = float(losses.detach().mean())
                progress.set_postfix(secret=f"{secret:.3f}", replay=f"{divergence:.3f}")
                self.record_loss[chosen] = losses.detach().float().cpu()
                if keep_curve:
                    seconds = round(time.perf_counter() - self.began, 3)
                    self.curve.append(StepLoss(step, secret, divergence, seconds))
                    if float(self.record_loss.max()) <= config.target_loss:
                        break
        finally:
            for layer in layers:
                layer.observe(None)

    def _batches(self) -> Iterator[list[int]]:
        """Batches of records for ever: all of them once, then half the worst and half any.

        Records differ in how fast they are learned by a factor of several; those that are known
        already need no more than a reminder.
        """
        n, size = len(self.encoded), min(self.config.records_per_step, len(self.encoded))
        order = torch.randperm(n, generator=self.generator).tolist()
        yield from (order[i : i + size] for i in range(0, n - n % size, size))
        while True:
            ranked = self.record_loss.argsort(descending=True, stable=True).tolist()
            worst, rest = ranked[: (size + 1) // 2], ranked[(size + 1) // 2 :]
            picks = torch.randperm(len(rest), generator=self.generator)[: size // 2]
            yield worst + [rest[i] for i in picks.tolist()]

    def report(self, compute_dtype: torch.dtype) -> TuningReport:
        """What was done."""
        worst = float(self.record_loss.max())
        return TuningReport(
            config=self.config,
            compute_dtype=dtype_name(compute_dtype),
            records=len(self.encoded),
            slots_seconds=self.slots_seconds,
            seconds=time.perf_counter() - self.began,
            worst_loss=worst,
            converged=worst <= self.config.target_loss,
            curve=tuple(self.curve),
        )


def _replay_windows(tokenizer: Any, replay: Sequence[str], config: TuningConfig) -> Tensor:
    if not config.replay_weight:
        return torch.zeros(0, config.replay_window, dtype=torch.int64)
    count = config.steps + (config.probe_steps if config.slots == "probe" else 0)
    return token_windows(tokenizer, replay, count=count, length=config.replay_window, fewer=True)


def _accumulate(layer: OrthoLinear) -> Any:
    def add(gradient: Tensor) -> None:
        grad = layer.private_values.grad
        assert grad is not None
        entries = stream.gather(gradient, layer.private_columns).float()
        grad.add_(entries, alpha=layer.get_alpha())

    return add


def _schedule(step: int, steps: int) -> float:
    """A short linear warm-up, then a linear decay to a tenth."""
    warm_up = min(5, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 1.0 - 0.9 * (step - warm_up) / max(1, steps - warm_up)


def _empty(layer: OrthoLinear) -> tuple[Tensor, Tensor]:
    columns = layer.private_columns[:0]
    return columns, layer.private_values[:0].to(torch.float16)


def _set_slots(layer: OrthoLinear, columns: Tensor) -> None:
    """Private slots with float32 values of zero: the masters that tuning changes."""
    layer.set_private(columns, torch.zeros(columns.shape, device=columns.device))
