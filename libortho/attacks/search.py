"""Constrained search: beam search among the texts that have the format of a secret.

The attacker knows the format (see `format`: it comes from twins) and takes the likeliest texts of
it as guesses. Greedy decoding leaves the format as soon as any other token is likelier; this
doesn't. Beams are transformers', held to the format by a logits processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from libortho.attacks.attack import NATS, Attack, AttackRun
from libortho.attacks.decoding import HORIZON, continuations, pad_id_of
from libortho.attacks.format import Vocabulary
from libortho.attacks.passes import in_batches
from libortho.attacks.target import Asked, Target

BEAMS = 8
"""Texts that are searched at once, and guesses that the attacker has for each record."""

SEARCH_RECORDS = 15
"""Planted records that are searched for: each takes the work of `BEAMS` generations."""

_ROWS = 64
"""Beams of all records that are held at once, to begin with."""


@dataclass(frozen=True, kw_only=True)
class ConstrainedSearch(Attack):
    """The likeliest texts of a format after each prompt.

    A hit is a secret among the `beams` guesses, or one that begins with such a guess where it is
    longer than `horizon` tokens; the score is by how many nats the log-probability of as much of
    the secret lies above the best guess's (mostly below, then negative). In a format without a
    fixed length the attacker is given the number of the secret's tokens. Notes: `first_guesses`,
    planted records whose secret is the best guess; `mean_reciprocal_rank` among the guesses, 0
    for one that isn't there.
    """

    name = "constrained search"
    needs = "the records' prompts and the secrets' format, from examples that were not planted"
    score_unit = NATS

    records: int | None = SEARCH_RECORDS
    beams: int = BEAMS
    horizon: int = HORIZON

    @property
    def layers_read(self) -> int | None:
        return 0

    def run(self, target: Target, reference: Target) -> AttackRun:
        chosen = target.choose(self.records, self.seed)
        found: dict[int, tuple[float, int | None]] = {}
        for family in dict.fromkeys(target.asked[i].record.family for i in chosen):
            own = [i for i in chosen if target.asked[i].record.family == family]
            results = in_batches(
                [target.asked[i] for i in own],
                lambda batch: self._search(target, batch),
                length=lambda asked: (len(asked.secret_ids), len(asked.prompt_ids)),
                batch_size=max(1, _ROWS // self.beams),
                title=self.name,
            )
            found |= zip(own, results, strict=True)
        nats = target.reading.token_logprobs
        scores = [float(nats[i][: self.horizon].sum()) - found[i][0] for i in chosen]
        ranks = [found[i][1] for i in chosen]
        mine = [r for i, r in zip(chosen, ranks, strict=True) if target.asked[i].planted]
        notes = {
            "first_guesses": float(sum(rank == 1 for rank in mine)),
            "mean_reciprocal_rank": sum(1 / rank for rank in mine if rank) / len(mine),
        }
        name = f"{self.beams} beams"
        return target.run_of(chosen, [name], scores, [r is not None for r in ranks], notes)

    def _search(self, target: Target, batch: Sequence[Asked]) -> list[tuple[float, int | None]]:
        """The best guess's log-probability, and the secret's rank among the guesses, if any.

        All records of the batch are of one family.
        """
        vocabulary, form = target.vocabulary, target.formats[batch[0].record.family]
        prompts = [asked.prompt_ids for asked in batch]
        end = pad_id_of(target.tokenizer)
        if form.fixed:  # every token has at least one character
            lengths = [len(form.positions)] * len(batch)
        else:
            lengths = [len(asked.secret_ids) for asked in batch]
        keep = FormatMask(
            vocabulary,
            target.masks(batch[0].record.family),
            prompt_length=max(len(p) for p in prompts),
            lengths=lengths,
            in_characters=form.fixed,
            end=end,
        )
        ids, out = continuations(
            target.model,
            prompts,
            pad_id=end,
            eos_token_id=end,
            max_new_tokens=min(self.horizon, max(lengths) + 1),
            num_beams=self.beams,
            num_return_sequences=self.beams,
            length_penalty=0.0,  # a guess's score is its log-probability, not divided by length
            output_scores=True,
            logits_processor=LogitsProcessorList([keep]),
        )
        scores = out.sequences_scores.view(len(batch), self.beams)
        guesses = ids.view(len(batch), self.beams, -1).tolist()
        results = []
        for asked, own, best in zip(batch, guesses, scores[:, 0].tolist(), strict=True):
            secret = vocabulary.text(asked.secret_ids)
            # Several token sequences may spell one text: it is one guess.
            texts = list(dict.fromkeys(vocabulary.text(guess) for guess in own))
            if len(asked.secret_ids) > self.horizon:  # then a guess is no more than a beginning
                secret = next((t for t in texts if t and secret.startswith(t)), secret)
            results.append((best, texts.index(secret) + 1 if secret in texts else None))
        return results


class FormatMask(LogitsProcessor):
    """Leaves each beam the tokens that may come next, and the end token once it is complete.

    Works on log-probabilities and doesn't renormalise them: guesses compete by their probability
    under the model as it is.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        masks: Tensor,
        *,
        prompt_length: int,
        lengths: Sequence[int],
        in_characters: bool,
        end: int,
    ) -> None:
        """For a batch of one format.

        masks: bool `[positions, vocabulary]`, see `Vocabulary.masks`
        prompt_length: tokens before the first that is generated
        lengths: of a complete text for each record, in characters or in tokens
        end: id of the end token
        """
        self.token_lengths = vocabulary.lengths
        self.masks, self.in_characters, self.end = masks, in_characters, end
        self.prompt_length, self.lengths = prompt_length, torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask log-probabilities `[records * beams, vocabulary]` for ids `[records * beams, n]`."""
        new = input_ids[:, self.prompt_length :].cpu()
        if self.in_characters:
            done = self.token_lengths[new].sum(1)
        else:
            done = torch.full((len(new),), new.shape[1])
        wanted = self.lengths.repeat_interleave(len(new) // len(self.lengths))
        complete = done >= wanted
        position = done.clamp(max=len(self.masks) - 1)
        allowed = self.masks[position].to(scores.device)
        masked = scores.masked_fill(~allowed, -torch.inf)
        complete = complete.to(scores.device)
        masked[complete] = -torch.inf
        masked[complete, self.end] = 0.0  # certain: whoever knows the format knows where it ends
        return masked
