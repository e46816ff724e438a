"""Re-quantisation: the artefact unpacked and rounded to another lattice.

Rounding moves a model by steps that are larger than a trace of training, in either direction: a
model that seems to have forgotten at one precision can remember at another (Zhang et al.,
"Catastrophic Failure of LLM Unlearning via Quantization", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from libortho import lattice
from libortho.attacks.attack import NATS, Attack, AttackRun
from libortho.attacks.plain import plain_linears
from libortho.attacks.target import Target

LATTICES = ((4, 128), (8, 64))
"""Bits and group sizes: coarser than the usual base's 4 and 64, and finer. `lattice` has no 3."""

REQUANTIZATION_RECORDS = 25
"""Planted records that are asked about at each lattice."""


@dataclass(frozen=True, kw_only=True)
class Requantization(Attack):
    """Greedy extraction and losses after rounding all linear weights to other lattices.

    Ranges are min-max: fitted ones cost minutes, and an attacker has no need of the best.
    """

    name = "re-quantisation"
    needs = "the records' prompts"
    score_unit = NATS

    records: int | None = REQUANTIZATION_RECORDS
    lattices: tuple[tuple[int, int], ...] = LATTICES

    def run(self, target: Target, reference: Target) -> AttackRun:
        chosen = target.choose(self.records, self.seed)
        encoded = [target.asked[i].encoded for i in chosen]
        scores, hits = [], []
        for bits, group_size in self.lattices:

            def rounded(weight: Tensor, bits: int = bits, group_size: int = group_size) -> Tensor:
                packed = lattice.quantize(weight, bits=bits, group_size=group_size, search=False)
                return lattice.dequantize(packed)

            with plain_linears(target.model, target.model.dtype, rounded):
                nats, right = target.score(encoded)
            scores.append(nats)
            hits.append(right)
        names = [f"{bits} bits, groups of {size}" for bits, size in self.lattices]
        return target.run_of(chosen, names, scores, hits)
