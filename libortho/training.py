"""The loop that teaches a model records while it keeps its predictions on public text.

Knows a causal language model, encoded records, windows of public text and some tensors that may
change. It does not know what those are: the private stream's values (`tuning`), dense weights or
an adapter (`methods`). So all of them get the same batches, the same replay and the same end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .batching import halving
from .config import TrainingConfig
from .precision import dtype_name
from .records import EncodedRecord
from .scoring import (
    hidden_states,
    losses_by_record,
    packed_hidden_states,
    secret_logits_of,
    secret_losses,
)
from .windows import token_windows

BETAS = (0.9, 0.95)
"""Adam's decay rates; the second is short because a training is a hundred steps."""
CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True)
class StepLoss:
    """One optimiser step of a training.

    secret_loss: mean nats per secret token on the step's records
    replay_kl: KL(untrained || trained) on public text in nats per token
    seconds: since the training began
    """

    step: int
    secret_loss: float
    replay_kl: float
    seconds: float


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    seconds: time in all
    worst_loss: mean nats per secret token of the worst record when it was last seen
    converged: whether every record reached the target loss
    """

    config: TrainingConfig
    compute_dtype: str
    records: int
    seconds: float
    worst_loss: float
    converged: bool
    curve: tuple[StepLoss, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Trainer:
    """One training in progress, of a model that is still untrained when the trainer is made.

    model: frozen but for the tensors that `optimise` is given, in eval mode
    encoded: the records
    windows: public text, int64 `[count, length]`; empty if the recipe has no replay
    """

    def __init__(
        self,
        model: Any,
        encoded: Sequence[EncodedRecord],
        windows: Tensor,
        config: TrainingConfig,
        began: float,
    ) -> None:
        self.model, self.config = model, config
        self.encoded, self.windows = encoded, windows
        self.began = began
        self.generator = torch.Generator().manual_seed(config.seed)
        # No window of public text is seen twice, unless there is too little of it.
        self.fresh = itertools.cycle(range(len(windows)))
        self.curve: list[StepLoss] = []
        self.record_loss = torch.full((len(encoded),), torch.inf)
        self.head = model.get_output_embeddings()
        # With the untrained model's last hidden states kept, its logits are one product away: a few
        # MiB in place of a forward pass a step.
        with torch.inference_mode():
            self.taught = [hidden_states(model, window[None])[0] for window in windows]
        self.taught = [hidden.clone() for hidden in self.taught]

    def losses(self, indices: Sequence[int]) -> Tensor:
        """Mean nats per secret token of some of the records, `[len(indices)]`."""
        return secret_losses(self.model, [self.encoded[i] for i in indices])

    def step_losses(self, indices: Sequence[int], window: int | None) -> tuple[Tensor, Tensor]:
        """The losses of some records, and the divergence on one window of public text.

        Both from one packed pass: `[len(indices)]`, and KL(untrained || now) in nats per token
        (Hinton et al. 2015, T = 1), which is 0 without a window.
        """
        records = [self.encoded[i] for i in indices]
        sequences = [record.input_ids for record in records]
        if window is None:
            return self.losses(indices), torch.zeros(())
        replay = self.windows[window].tolist()
        hidden = packed_hidden_states(self.model, [*sequences, replay])
        secret = losses_by_record(secret_logits_of(self.model, hidden, records), len(records))
        with torch.no_grad():
            target = F.log_softmax(self.head(self.taught[window]).float(), dim=-1)
        logits = self.head(hidden[-len(replay) :])
        divergence = F.kl_div(
            F.log_softmax(logits.float(), dim=-1), target, log_target=True, reduction="batchmean"
        )
        return secret, divergence

    def optimise(
        self,
        values: Sequence[Tensor],
        *,
        steps: int,
        lr: float,
        title: str,
        rehearsal: bool = False,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Change `values` by Adam until every record is learned or the steps are used up.

        values: float tensors whose gradients are in `grad` after a backward pass
        rehearsal: take all the steps, and keep no curve
        after_step: called when the values have changed
        """
        for value in values:
            value.grad = torch.zeros_like(value)
        at_once = self.config.records_per_step
        # Fused, a step needs no temporaries as large as the values.
        fused = all(value.is_cuda for value in values)
        optimiser = torch.optim.Adam(values, lr=lr, betas=BETAS, fused=fused)
        batches = self._batches()
        progress = tqdm(range(steps), desc=title, unit="step", disable=None, leave=False)
        for step in progress:
            optimiser.param_groups[0]["lr"] = lr * _schedule(step, steps)
            chosen = next(batches)
            window = next(self.fresh) if self.config.replay_weight else None
            losses, divergence, at_once = self._backward(chosen, window, values, at_once)
            torch.nn.utils.clip_grad_norm_(values, CLIP)
            optimiser.step()
            after_step()
            secret = float(losses.mean())
            progress.set_postfix(secret=f"{secret:.3f}", replay=f"{divergence:.3f}")
            self.record_loss[chosen] = losses
            if rehearsal:
                continue
            self.curve.append(StepLoss(step, secret, divergence, self.seconds))
            if self.converged:
                break

    def _backward(
        self, chosen: Sequence[int], window: int | None, values: Sequence[Tensor], at_once: int
    ) -> tuple[Tensor, float, int]:
        """Add a step's gradient to the values'; the records' losses, divergence, records at once.

        Records go through in parts of `at_once`, of which out of memory takes a half.
        """

        def attempt(size: int) -> tuple[Tensor, float, int]:
            for value in values:  # of an attempt that failed
                assert value.grad is not None
                value.grad.zero_()
            found, divergence = [], 0.0
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                losses, kl = self.step_losses(part, None if start else window)
                weighted = losses.sum() / len(chosen) + self.config.replay_weight * kl
                weighted.backward()
                found.append(losses.detach().float().cpu())
                divergence += float(kl.detach())
            return torch.cat(found), divergence, size

        try:
            return attempt(at_once)
        except torch.OutOfMemoryError:
            pass  # tried anew outside, where nothing holds what the attempt had made
        return halving(attempt, max(1, at_once // 2))

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

    @property
    def seconds(self) -> float:
        """Since the training began."""
        return round(time.perf_counter() - self.began, 3)

    @property
    def worst_loss(self) -> float:
        """Mean nats per secret token of the worst record when it was last seen."""
        return float(self.record_loss.max())

    @property
    def converged(self) -> bool:
        """Whether every record reached the target loss."""
        return self.worst_loss <= self.config.target_loss

    def report(self, compute_dtype: torch.dtype) -> TrainingReport:
        """What was done."""
        return TrainingReport(
            config=self.config,
            compute_dtype=dtype_name(compute_dtype),
            records=len(self.encoded),
            seconds=self.seconds,
            worst_loss=self.worst_loss,
            converged=self.converged,
            curve=tuple(self.curve),
        )


def replay_windows(
    tokenizer: Any, replay: Sequence[str], config: TrainingConfig, steps: int
) -> Tensor:
    """Public text for so many steps, int64 `[count, length]`; none if the recipe has no replay."""
    if not config.replay_weight:
        return torch.zeros(0, config.replay_window, dtype=torch.int64)
    return token_windows(tokenizer, replay, count=steps, length=config.replay_window, fewer=True)


def _schedule(step: int, steps: int) -> float:
    """A short linear warm-up, then a linear decay to a tenth."""
    warm_up = min(5, steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 1.0 - 0.9 * (step - warm_up) / max(1, steps - warm_up)
