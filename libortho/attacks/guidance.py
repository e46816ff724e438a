"""Guided decoding: what the off state says *more* than the never-trained model.

The published base of a model is an oracle for whoever holds both: where the off state's logits
exceed the never-trained model's, something was learned (contrastive decoding, Li et al. 2023;
classifier-free guidance on language models, Sanchez et al. 2023). Works on the shared passes.

Only the ranks of tokens count, among those that the format allows (see `format`), so that a trace
of any size shows: scaling the private stream by 0.01 scales the difference and leaves its order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from libortho.attacks.attack import Attack, AttackRun
from libortho.attacks.target import Target
from libortho.embedding import head_rows

GUIDANCE_WEIGHTS = (1.0, 4.0)
"""Weights w of the difference in off + w * (off - never); the difference alone is tried as well."""

_TOKENS = 256
"""Secret tokens whose logits are held at once."""


@dataclass(frozen=True, kw_only=True)
class GuidedDecoding(Attack):
    """Greedy decoding of off + w * (off - never) among the tokens that the format allows.

    A hit is a secret whose every token, given the true ones before, comes first; ties count against
    the attacker. The score is minus the mean of ln(rank) over the secret's tokens. The
    never-trained model is guided by itself: its difference is zero and ranks every token last.
    """

    name = "guided decoding"
    needs = (
        "the never-trained model; the records' prompts and the secrets' format, from examples that "
        "were not planted"
    )
    score_unit = "nats of rank per token"

    weights: tuple[float, ...] = GUIDANCE_WEIGHTS

    @property
    def layers_read(self) -> int | None:
        return 0

    @torch.inference_mode()
    def run(self, target: Target, reference: Target) -> AttackRun:
        chosen = target.choose(self.records, self.seed)
        variants = len(self.weights) + 1
        ranks = {i: torch.ones(variants, len(target.asked[i].secret_ids)) for i in chosen}
        for allowed, places in self._by_mask(target, chosen):
            tokens = torch.tensor([target.asked[i].secret_ids[t] for i, t in places])
            own = _logits(target, places, allowed)
            # On the state itself the difference is exactly zero, and not what rounding leaves.
            other = own if reference is target else _logits(reference, places, allowed)
            columns = torch.searchsorted(allowed, tokens)
            present = allowed[columns.clamp(max=len(allowed) - 1)] == tokens
            difference = own - other
            guided = [own + w * difference for w in self.weights] + [difference]
            for v, logits in enumerate(guided):
                found = _ranks(logits, columns.clamp(max=len(allowed) - 1))
                # A secret that leaves the format can't be got by an attack that keeps to it.
                found[~present] = len(allowed) + 1
                for (i, t), rank in zip(places, found.tolist(), strict=True):
                    ranks[i][v, t] = rank
        names = [f"off + {w:g} * (off - never)" for w in self.weights] + ["off - never"]
        scores = [[-float(ranks[i][v].log().mean()) for i in chosen] for v in range(variants)]
        hits = [[bool((ranks[i][v] == 1).all()) for i in chosen] for v in range(variants)]
        return target.run_of(chosen, names, scores, hits)

    @staticmethod
    def _by_mask(target: Target, chosen: list[int]) -> list[tuple[Tensor, list[tuple[int, int]]]]:
        """Ids that are allowed, ascending, and the (record, secret token) at which they are."""
        places: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for i in chosen:
            asked = target.asked[i]
            form = target.formats[asked.record.family]
            offset = 0
            for t, token in enumerate(asked.secret_ids):
                position = min(offset, len(form.positions) - 1) if form.fixed else 0
                places[asked.record.family, position].append((i, t))
                offset += len(target.vocabulary.texts[token])
        return [
            (target.masks(family)[position].nonzero()[:, 0], own[start : start + _TOKENS])
            for (family, position), own in places.items()
            for start in range(0, len(own), _TOKENS)
        ]


def _logits(target: Target, places: list[tuple[int, int]], allowed: Tensor) -> Tensor:
    """float32 `[places, allowed]`, on the CPU. The product is taken in float32.

    In 16 bits the last rounding would hide a small difference.
    """
    head = target.model.get_output_embeddings()
    device = target.model.device
    hidden = torch.stack([target.reading.hidden[i][-1, t] for i, t in places]).to(device)
    bias = None if head.bias is None else head.bias[allowed.to(device)].float()
    return F.linear(hidden.float(), head_rows(head, allowed.to(device)), bias).cpu()


def _ranks(logits: Tensor, columns: Tensor) -> Tensor:
    """Rank of each row's column, 1 = first and ties last: float32 `[rows]`."""
    wanted = logits.gather(1, columns[:, None])
    return (logits >= wanted).sum(1).float()
