"""What every method is made from: a public model, public text, records, and the run's recipes.

Knows what goes in, and not one method. Whatever a method takes from here is part of the key under
which it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import SeparationConfig, TuningConfig
from ..corpora import Corpus
from ..models import ResolvedModel
from ..records import RecordSet


@dataclass(frozen=True)
class Ingredients:
    """The inputs that all methods share, so that they differ by the method alone.

    resolved: the public model, which never saw the records
    corpus: calibration chooses ranges, residuals and curvature; replay is trained with
    records: the planted ones are taught
    separation: bits, group size and residual of whatever is quantised by us
    tuning: how the private stream is trained, and the budget of every other training: steps,
        replay, batches, target and seed
    dense_lr, adapter_lr: peak learning rates of the others; what is right depends on what learns
    compute_dtype: of activations and unpacked weights
    cache_dir: where what was prepared is kept; None is the default
    """

    resolved: ResolvedModel
    corpus: Corpus
    records: RecordSet
    separation: SeparationConfig = field(default_factory=SeparationConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    dense_lr: float = 1e-4
    adapter_lr: float = 1e-3
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    cache_dir: str | Path | None = None

    @property
    def device_type(self) -> str:
        """Kinds of devices compute differently; cards of a kind are taken as equal."""
        return torch.device(self.device).type

    def equal_budget(self, lr: float) -> dict[str, Any]:
        """Fields of a `TrainingConfig` that give a method as much as tuning gives ours."""
        tuning = self.tuning
        return {
            "lr": lr,
            "steps": tuning.optimiser_steps,
            "replay_weight": tuning.replay_weight,
            "replay_window": tuning.replay_window,
            "records_per_step": tuning.records_per_step,
            "target_loss": tuning.target_loss,
            "seed": tuning.seed,
        }
