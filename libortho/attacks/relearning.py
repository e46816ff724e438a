"""Relearning: fine-tune a little, and see what comes back that was not in the training data.

A model that hides what it knows recovers it quickly, from other records of the same set (Lynch et
al., "Eight Methods to Evaluate Robust Unlearning in LLMs", 2024; Hu et al., "Jogging the Memory of
Unlearned LLMs", 2025) or from text that has nothing to do with them. Both states get exactly the
same training: the same unpacked layers, steps, batches and seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from libortho.attacks.attack import NATS, Attack, AttackRun
from libortho.attacks.plain import plain_linears
from libortho.attacks.target import Target
from libortho.embedding import activation_dtype
from libortho.errors import RecordError
from libortho.precision import evaluating
from libortho.records import EncodedRecord
from libortho.scoring import secret_losses, window_losses
from libortho.windows import token_windows

RELEARNING_STEPS = 20
"""Optimiser steps: enough for a small model to learn the records' kind, too few to ruin it."""

RELEARNING_RATE = 5e-5
"""Learning rate of AdamW on all linear weights, after a warm-up over the first steps."""

RECORDS_PER_STEP = 10
WINDOW_TOKENS = 256
"""Tokens of public text a step."""

_WARM_UP = 5
_CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class Relearning(Attack):
    """Fine-tune on half of the planted records, and ask about the other half and its twins.

    Notes: `first_loss` and `last_loss` of the training, nats per secret token.
    """

    name = "relearning on half of the records"
    needs = "half of the planted records, whole; the prompts of the others"
    score_unit = NATS

    steps: int = RELEARNING_STEPS
    learning_rate: float = RELEARNING_RATE
    records_per_step: int = RECORDS_PER_STEP

    def run(self, target: Target, reference: Target) -> AttackRun:
        everything = target.choose(self.records, self.seed)
        planted = [i for i in everything if target.asked[i].planted]
        # Where twins stand beside planted records, those of the trained half go with it: a twin may
        # share its prompt with a record that was just trained.
        half = target.choose(len(planted) // 2, self.seed + 1, among=everything)
        trained = sorted(set(half) & set(planted))
        asked = _comparable(target, sorted(set(everything) - set(half)))
        if not trained or not asked:
            raise RecordError(
                "relearning trains on half of the planted records and asks about the other half "
                f"and its twins; {len(planted)} planted records are too few. Plant more."
            )
        lessons = [target.asked[i].encoded for i in trained]
        batches = _batches(lessons, self.records_per_step, self.seed)

        def loss() -> Tensor:
            return secret_losses(target.model, next(batches)).mean()

        return _relearn(self, target, loss, asked, self.steps, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class BenignRelearning(Attack):
    """Fine-tune on public text alone, and ask about every record.

    documents: public text, such as a corpus's replay part
    """

    name = "benign relearning"
    needs = "public text; the records' prompts"
    score_unit = NATS

    documents: Sequence[str] = field(repr=False, metadata={"shown": False})
    steps: int = RELEARNING_STEPS
    learning_rate: float = RELEARNING_RATE
    window_tokens: int = WINDOW_TOKENS

    def run(self, target: Target, reference: Target) -> AttackRun:
        windows = token_windows(
            target.tokenizer,
            self.documents,
            count=self.steps,
            length=self.window_tokens,
            fewer=True,
        )
        turn = itertools.cycle(windows)

        def loss() -> Tensor:
            return window_losses(target.model, next(turn)[None]).mean()

        chosen = target.choose(self.records, self.seed)
        return _relearn(self, target, loss, chosen, self.steps, self.learning_rate)


def _comparable(target: Target, indices: Sequence[int]) -> list[int]:
    """Those of families that have a planted record and a twin among them."""
    kinds = {(target.asked[i].record.family, target.asked[i].planted) for i in indices}
    whole = {family for family, _ in kinds if {(family, True), (family, False)} <= kinds}
    return [i for i in indices if target.asked[i].record.family in whole]


def _relearn(
    attack: Attack, target: Target, loss: Any, asked: Sequence[int], steps: int, rate: float
) -> AttackRun:
    """Train all linear layers on `loss`, then score the records asked about."""
    model = target.model
    losses: list[float] = []
    with plain_linears(model, torch.float32) as layers, evaluating(model):
        weights = [layer.weight for layer in layers.values()]
        with _trainable(model, weights):
            optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
            warm_up = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / _WARM_UP, 1.0, _WARM_UP - 1)
            for _ in tqdm(range(steps), desc=attack.name, unit="step", disable=None, leave=False):
                with _autocast(model):
                    value = loss()
                value.backward()
                torch.nn.utils.clip_grad_norm_(weights, _CLIP)
                optimiser.step()
                optimiser.zero_grad()
                warm_up.step()
                losses.append(float(value.detach()))
            del optimiser
        with _autocast(model):
            nats, right = target.score([target.asked[i].encoded for i in asked])
    notes = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
    return target.run_of(asked, [f"after {steps} steps"], nats, right, notes)


def _batches(
    lessons: Sequence[EncodedRecord], size: int, seed: int
) -> Iterator[list[EncodedRecord]]:
    """Batches for ever, every record once in each round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lessons), generator=generator).tolist()
        yield from ([lessons[i] for i in order[k : k + size]] for k in range(0, len(order), size))


@contextmanager
def _trainable(model: Any, weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for `weights` alone; the flags of all other parameters come back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _autocast(model: Any) -> torch.autocast:
    """Products in 16 bits where the model is in 16 bits; the trained weights stay in float32."""
    half = activation_dtype(model)
    return torch.autocast(
        model.device.type,
        dtype=torch.bfloat16 if half == torch.float32 else half,
        enabled=half != torch.float32,
    )
