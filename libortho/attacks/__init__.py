"""Attacks on what is handed out: each against the never-trained model under the same attack.

    results = run_attacks(off_model, never_model, tokenizer, records)

An attack is a frozen record of its budget (`Sampling(draws=32)`); `run_attacks` takes any number of
them. The dose curve stands beside them: it needs the private stream, and is no attack.
"""

from .attack import Attack, AttackRun, Cost
from .comparison import AttackResult, Rate, VariantResult, compare_runs
from .dose import DosePoint, dose_curve
from .guidance import GuidedDecoding
from .lens import LogitLens
from .prompts import ParaphrasedPrompts, PromptLengths
from .relearning import BenignRelearning, Relearning
from .requantization import Requantization
from .sampling import Sampling
from .search import ConstrainedSearch
from .suite import (
    attack_targets,
    default_attacks,
    layers_read,
    relearning_attacks,
    run_attacks,
    run_one,
    targets_of,
)
from .target import Target

__all__ = [
    "Attack",
    "AttackResult",
    "AttackRun",
    "BenignRelearning",
    "ConstrainedSearch",
    "Cost",
    "DosePoint",
    "GuidedDecoding",
    "LogitLens",
    "ParaphrasedPrompts",
    "PromptLengths",
    "Rate",
    "Relearning",
    "Requantization",
    "Sampling",
    "Target",
    "VariantResult",
    "attack_targets",
    "compare_runs",
    "default_attacks",
    "dose_curve",
    "layers_read",
    "relearning_attacks",
    "run_attacks",
    "run_one",
    "targets_of",
]
