"""What an attack is run on: one model in one state, and the records that it is asked about.

Knows models and records, and no attack. What several attacks ask alike, one teacher-forced pass
over all records, is made once and shared (`Target.read`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from libortho.attacks.attack import AttackRun, Cost
from libortho.attacks.format import Format, Vocabulary
from libortho.attacks.passes import BATCH_SIZE, in_batches, metered, predict
from libortho.errors import RecordError
from libortho.evidence import Evidence, collect_from_states, compressed_bytes
from libortho.extraction import score_records
from libortho.records import EncodedRecord, Record, RecordSet, encode
from libortho.scoring import packed_inputs, secret_places


class Asked(NamedTuple):
    """A record that a state is asked about."""

    record: Record
    encoded: EncodedRecord
    planted: bool

    @property
    def prompt_ids(self) -> list[int]:
        return self.encoded.input_ids[: self.encoded.secret_start]

    @property
    def secret_ids(self) -> list[int]:
        return self.encoded.input_ids[self.encoded.secret_start :]


@dataclass(frozen=True, eq=False)
class Reading:
    """One teacher-forced pass over all records of a target; `repr` shows no prediction.

    layers: the intermediate layers that were kept, 1 = after the first block
    hidden: for each record the hidden states before each secret token, `[layers + 1, tokens,
        hidden]`, on the CPU; the last is after the final norm, which the head reads
    token_logprobs: log-probability of each secret token, nats, float32 `[tokens]` a record
    extracted: whether greedy decoding recites it
    """

    layers: tuple[int, ...]
    hidden: tuple[Tensor, ...] = field(repr=False)
    token_logprobs: tuple[Tensor, ...] = field(repr=False)
    extracted: tuple[bool, ...] = field(repr=False)
    cost: Cost

    @cached_property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probability of each whole secret, nats."""
        return tuple(float(nats.sum()) for nats in self.token_logprobs)


class Target:
    """A model in one state with its tokenizer, and a record set.

    asked: the planted records, then the twins
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        records: RecordSet,
        *,
        batch_size: int = BATCH_SIZE,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Encode the records, those of families without a planted one left out.

        `vocabulary` is the tokenizer's, if it is at hand already. Raises `RecordError` as
        `records.encode` does, and if there is nothing planted or a family without twins.
        """
        families = {r.family for r in records.planted}
        if not families or families - {r.family for r in records.twins}:
            raise RecordError(
                f"an attack needs planted records, and twins of the same families: found "
                f"{len(records.planted)} planted records and {len(records.twins)} twins."
            )
        both = [r for r in (*records.planted, *records.twins) if r.family in families]
        longest = model.config.max_position_embeddings
        self.model, self.tokenizer, self.records = model, tokenizer, records
        self.batch_size = batch_size
        self.asked = tuple(
            Asked(record, encoded, planted=i < len(records.planted))
            for i, (record, encoded) in enumerate(
                zip(both, encode(tokenizer, both, longest), strict=True)
            )
        )
        self._reading: Reading | None = None
        self._layers_wanted = 0
        self._vocabulary = vocabulary
        self._masks: dict[str, Tensor] = {}

    # --- the format of secrets ------------------------------------------------------------------

    @property
    def vocabulary(self) -> Vocabulary:
        """What each logit stands for; decoded at first use."""
        if self._vocabulary is None:
            size = self.model.get_output_embeddings().out_features
            self._vocabulary = Vocabulary(self.tokenizer, size)
        return self._vocabulary

    @cached_property
    def formats(self) -> dict[str, Format]:
        """The format of each family's secrets, from its twins: no planted secret is looked at."""
        examples = defaultdict(list)
        for asked in self.asked:
            if not asked.planted:
                examples[asked.record.family].append(self.vocabulary.text(asked.secret_ids))
        return {family: Format.of(texts) for family, texts in examples.items()}

    def masks(self, family: str) -> Tensor:
        """bool `[positions, vocabulary]`: the tokens that a family's format allows."""
        if family not in self._masks:
            self._masks[family] = self.vocabulary.masks(self.formats[family])
        return self._masks[family]

    # --- which records ----------------------------------------------------------------------------

    def choose(self, count: int | None, seed: int, among: Sequence[int] | None = None) -> list[int]:
        """Indices into `asked` of `count` planted records and as many twins; None = all.

        A seeded choice that takes from every family alike, and is the same for every state. Where
        planted records and twins stand side by side, pairs stay together. `among` bounds it.
        """
        indices = range(len(self.asked)) if among is None else sorted(among)
        planted = [i for i in indices if self.asked[i].planted]
        twins = [i for i in indices if not self.asked[i].planted]
        if count is None:
            return planted + twins
        chosen = self._draw(planted, count, seed)
        step = sum(asked.planted for asked in self.asked)
        families = [asked.record.family for asked in self.asked]
        if families[:step] == families[step:] and {i + step for i in planted} == set(twins):
            return chosen + [i + step for i in chosen]
        return chosen + self._draw(twins, count, seed)

    def _draw(self, indices: Sequence[int], count: int, seed: int) -> list[int]:
        rng = random.Random(f"attacked records {seed}")
        by_family: dict[str, list[int]] = defaultdict(list)
        for i in indices:
            by_family[self.asked[i].record.family].append(i)
        for members in by_family.values():
            rng.shuffle(members)
        turns = [
            (turn, number, index)
            for number, members in enumerate(by_family.values())
            for turn, index in enumerate(members)
        ]
        return sorted(index for *_, index in sorted(turns)[:count])

    # --- what many attacks ask --------------------------------------------------------------------

    @property
    def reading(self) -> Reading:
        """The shared pass, made at first use."""
        return self._reading or self.read()

    @torch.inference_mode()
    def read(self, layers: int = 0) -> Reading:
        """Make the shared pass, with at least `layers` intermediate layers, spread evenly.

        A model that has fewer gives all that it has.
        """
        if self._reading is None or self._layers_wanted < layers:
            depth = self.model.config.num_hidden_layers
            spread = {round(i * depth / (layers + 1)) for i in range(1, layers + 1)}
            kept = tuple(sorted(layer for layer in spread if 0 < layer < depth))
            with metered(self.model) as cost:
                rows = in_batches(
                    self.asked,
                    lambda batch: self._read(batch, kept),
                    length=lambda asked: len(asked.encoded.input_ids),
                    batch_size=self.batch_size,
                    title="reading",
                )
            hidden, nats, extracted = zip(*rows, strict=True)
            self._reading = Reading(kept, hidden, nats, extracted, cost())
            self._layers_wanted = layers
        return self._reading

    def _read(
        self, batch: Sequence[Asked], layers: tuple[int, ...]
    ) -> list[tuple[Tensor, Tensor, bool]]:
        places, targets, _ = secret_places([a.encoded for a in batch])
        inputs = packed_inputs(self.model, [a.encoded.input_ids for a in batch])
        out = self.model.base_model(**inputs, use_cache=False, output_hidden_states=bool(layers))
        states = [out.hidden_states[layer] for layer in layers] + [out.last_hidden_state]
        places = places.to(states[-1].device)
        hidden = torch.stack([state[0, places] for state in states])  # [layers + 1, tokens, h]
        logits = self.model.get_output_embeddings()(hidden[-1])
        logprobs, right = predict(logits, targets.to(logits.device))
        parts = [len(a.secret_ids) for a in batch]
        return [
            (states.cpu().clone(), nats.cpu(), bool(hits.all()))
            for states, nats, hits in zip(
                hidden.split(parts, dim=1), logprobs.split(parts), right.split(parts), strict=True
            )
        ]

    def evidence(self) -> list[Evidence]:
        """Evidence about every record that is asked about, from the shared pass."""
        return collect_from_states(
            self.model,
            [asked.encoded for asked in self.asked],
            [states[-1] for states in self.reading.hidden],
            planted=[asked.planted for asked in self.asked],
            zlib_bytes=[compressed_bytes(asked.record.secret) for asked in self.asked],
        )

    def score(self, encoded: Sequence[EncodedRecord]) -> tuple[list[float], list[bool]]:
        """Log-probability of each secret in nats, and whether greedy decoding recites it."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
        scored = score_records(
            self.model, [encoded[i] for i in order], batch_size=self.batch_size, title="scoring"
        )
        back = dict(zip(order, scored, strict=True))
        scores = [back[i] for i in range(len(encoded))]
        return [-s.loss * s.tokens for s in scores], [s.extracted for s in scores]

    def run_of(
        self,
        chosen: Sequence[int],
        variants: Sequence[str],
        scores: Any,
        hits: Any,
        notes: dict[str, float] | None = None,
    ) -> AttackRun:
        """A run on the records `chosen`, scores and hits `[variants, records]`."""
        asked = [self.asked[i] for i in chosen]
        shape = (len(variants), len(asked))
        return AttackRun(
            tuple(a.record.id for a in asked),
            tuple(a.record.family for a in asked),
            tuple(a.planted for a in asked),
            tuple(variants),
            np.asarray(scores, dtype=np.float64).reshape(shape),
            np.asarray(hits, dtype=np.bool_).reshape(shape),
            (sum(a.planted for a in self.asked), sum(not a.planted for a in self.asked)),
            notes or {},
        )
