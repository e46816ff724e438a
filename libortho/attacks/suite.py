"""All attacks on an off state and on the never-trained model, and what they amount to.

Knows how to run attacks in an order that shares work. What one does is its own module's, how two
runs are compared `comparison`'s, and which results make a leak is for the caller to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from libortho.attacks.attack import Attack, AttackRun, Cost
from libortho.attacks.comparison import LEVEL, AttackResult, compare_runs
from libortho.attacks.guidance import GuidedDecoding
from libortho.attacks.lens import LogitLens
from libortho.attacks.passes import BATCH_SIZE, metered
from libortho.attacks.permutation import RESAMPLES
from libortho.attacks.prompts import ParaphrasedPrompts, PromptLengths
from libortho.attacks.relearning import BenignRelearning, Relearning
from libortho.attacks.requantization import Requantization
from libortho.attacks.sampling import Sampling
from libortho.attacks.search import ConstrainedSearch
from libortho.attacks.target import Target
from libortho.linear import OrthoLinear
from libortho.records import RecordSet
from libortho.switch import dense_weights


def default_attacks(seed: int = 0) -> tuple[Attack, ...]:
    """Every attack that doesn't train, at its default budget."""
    return (
        LogitLens(seed=seed),
        GuidedDecoding(seed=seed),
        PromptLengths(seed=seed),
        ParaphrasedPrompts(seed=seed),
        Sampling(seed=seed),
        ConstrainedSearch(seed=seed),
        Requantization(seed=seed),
    )


def relearning_attacks(public_text: Sequence[str], seed: int = 0) -> tuple[Attack, ...]:
    """The attacks that train, each on both states; `public_text` is for the benign one."""
    return Relearning(seed=seed), BenignRelearning(documents=public_text, seed=seed)


def run_attacks(
    off_model: Any,
    never_model: Any,
    tokenizer: Any,
    records: RecordSet,
    *,
    attacks: Sequence[Attack] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    batch_size: int = BATCH_SIZE,
) -> tuple[AttackResult, ...]:
    """Attack the off state and, in the same way, the never-trained model.

    Models run in the precision that they are in, and are left as they were. A separated one holds
    its composed weights in memory while it is attacked, one model at a time.

    Args:
        off_model: a causal language model in the state that is handed out; best as it was read back
            from disk.
        never_model: the model that never saw the records, at the same bits.
        tokenizer: of both.
        records: planted records and twins.
        attacks: which; `default_attacks()` if None.
        level: error rate of each attack's `beats_never`, not corrected for their number.
        resamples: of the permutation tests.
        batch_size: sequences a forward pass, to begin with; out of memory halves it.

    Raises:
        RecordError: there is nothing planted, a family lacks twins, or a record is too long.
        SeparationError: a model lacks the layers that an attack works on.
        ValueError: a model emits values that are not finite.
    """
    off, never = targets_of(off_model, never_model, tokenizer, records, batch_size=batch_size)
    made = default_attacks() if attacks is None else attacks
    return attack_targets(off, never, made, level=level, resamples=resamples)


def targets_of(
    off_model: Any,
    never_model: Any,
    tokenizer: Any,
    records: RecordSet,
    *,
    batch_size: int = BATCH_SIZE,
) -> tuple[Target, Target]:
    """The two models as targets that share a vocabulary. Raises `RecordError` as `Target` does."""
    never = Target(never_model, tokenizer, records, batch_size=batch_size)
    off = Target(off_model, tokenizer, records, batch_size=batch_size, vocabulary=never.vocabulary)
    return off, never


def layers_read(attacks: Sequence[Attack]) -> int:
    """Intermediate layers that the shared pass must keep for all of these attacks."""
    return max((a.layers_read for a in attacks if a.layers_read is not None), default=0)


def attack_targets(
    off: Target,
    never: Target,
    attacks: Sequence[Attack],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[AttackResult, ...]:
    """`run_attacks` on targets that were made before; passes that they have read count as read."""
    runs: dict[str, list[AttackRun]] = {}
    bar = tqdm(total=2 * len(attacks), desc="attacks", unit="run", disable=None, leave=False)
    with bar:
        # The never-trained model goes first: its shared pass guides the other's decoding.
        for state, target in (("never", never), ("off", off)):
            runs[state] = []
            with held(target.model):
                if any(a.layers_read is not None for a in attacks):
                    target.read(layers_read(attacks))
                for attack in attacks:
                    bar.set_postfix_str(f"{attack.name}, {state}")
                    runs[state].append(run_one(attack, target, never))
                    bar.update()
    return tuple(
        compare_runs(attack, off_run, never_run, level=level, resamples=resamples)
        for attack, off_run, never_run in zip(attacks, runs["off"], runs["never"], strict=True)
    )


def run_one(attack: Attack, target: Target, reference: Target) -> AttackRun:
    """One attack on one state, with its cost; a shared pass counts for each that uses it."""
    shared = Cost(0, 0.0)
    if attack.layers_read is not None:
        shared = target.read(attack.layers_read).cost
    with metered(target.model) as cost:
        run = attack.run(target, reference)
    return replace(run, cost=cost() + shared)


@contextmanager
def held(model: Any) -> Iterator[None]:
    """A separated model with its composed weights in memory; any other as it is."""
    if any(isinstance(module, OrthoLinear) for module in model.modules()):
        with dense_weights(model, model.dtype):
            yield
    else:
        yield
