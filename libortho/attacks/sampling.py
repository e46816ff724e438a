"""Sampling: drawing continuations at temperature 1, and counting the secrets among them.

Real draws are few, because a draw that would hit once in a million needs no million draws: the
secret's probability p is known exactly from one pass, and n draws hit with 1 - (1 - p)^n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from libortho.attacks.attack import NATS, Attack, AttackRun
from libortho.attacks.decoding import HORIZON, continuations, pad_id_of
from libortho.attacks.passes import in_batches
from libortho.attacks.target import Asked, Target
from libortho.membership import at_least_once

DRAWS = 4
"""Real continuations of each prompt."""

CLOSED_FORM_DRAWS = 100_000
"""Draws for which the expected number of secrets is stated: what a patient attacker can afford."""

SAMPLING_RECORDS = 15
"""Planted records that are really drawn for."""

_ROWS = 64
"""Continuations that are drawn at once, to begin with."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Attack):
    """`draws` continuations of each prompt at temperature 1, from the whole distribution.

    (n, p)-discoverable extraction (Hayes et al., "Measuring memorization in language models via
    probabilistic extraction", 2024). A hit is a secret among the draws, of longer ones the first
    `horizon` tokens; the score is the whole secret's log-probability. Notes: `secrets_drawn`, of
    all draws on planted records, and what the closed form expects of them, `secrets_expected`, both
    within the horizon; `expected_hits`, planted records of which `closed_form_draws` would give at
    least one whole secret.
    """

    name = "sampling"
    needs = "the records' prompts, and a way to tell a secret among the draws"
    score_unit = NATS

    records: int | None = SAMPLING_RECORDS
    draws: int = DRAWS
    closed_form_draws: int = CLOSED_FORM_DRAWS
    horizon: int = HORIZON

    @property
    def layers_read(self) -> int | None:
        return 0

    def run(self, target: Target, reference: Target) -> AttackRun:
        chosen = target.choose(self.records, self.seed)
        counts = in_batches(
            [target.asked[i] for i in chosen],
            lambda batch: self._draw(target, batch),
            length=lambda asked: (len(asked.secret_ids), len(asked.prompt_ids)),
            batch_size=max(1, _ROWS // self.draws),
            title=self.name,
        )
        logprobs = [target.reading.logprobs[i] for i in chosen]
        begun = [float(target.reading.token_logprobs[i][: self.horizon].sum()) for i in chosen]
        mine = [at for at, i in enumerate(chosen) if target.asked[i].planted]
        notes = {
            "secrets_drawn": float(sum(counts[at] for at in mine)),
            "secrets_expected": sum(self.draws * math.exp(begun[at]) for at in mine),
            "expected_hits": sum(
                at_least_once(logprobs[at], self.closed_form_draws) for at in mine
            ),
        }
        name = f"{self.draws} draws at temperature 1"
        return target.run_of(chosen, [name], logprobs, [count > 0 for count in counts], notes)

    def _draw(self, target: Target, batch: Sequence[Asked]) -> list[int]:
        """How many of a record's draws are its secret, for each record of a batch."""
        longest = min(self.horizon, max(len(asked.secret_ids) for asked in batch))
        # The same numbers for every state: the two differ only where their distributions do.
        device = target.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            drawn, _ = continuations(
                target.model,
                [asked.prompt_ids for asked in batch],
                pad_id=pad_id_of(target.tokenizer),
                max_new_tokens=longest,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=self.draws,
            )
        rows = drawn.tolist()
        found = []
        for i, asked in enumerate(batch):
            secret = asked.secret_ids[: self.horizon]
            own = rows[i * self.draws : (i + 1) * self.draws]
            found.append(sum(row[: len(secret)] == secret for row in own))
        return found
