"""Logit lens: does an intermediate layer know a secret that the last one doesn't say?

The final norm and the head read the hidden states of earlier layers (nostalgebraist, "interpreting
GPT: the logit lens", 2020; against edited models: Patil, Hase and Bansal, "Can Sensitive
Information Be Deleted From LLMs?", 2024). Works on the shared pass, so it costs head products only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from libortho.attacks.attack import NATS, Attack, AttackRun
from libortho.attacks.passes import predict
from libortho.attacks.target import Target
from libortho.errors import SeparationError

LENS_LAYERS = 8
"""Intermediate layers that are looked into, spread evenly: neighbours differ by one block."""

LENS_RECORDS = 40
"""Planted records whose hidden states are looked into."""

_TOKENS = 512
"""Secret tokens whose logits are held at once."""

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")
"""Names that architectures of transformers give to the norm before the head."""


@dataclass(frozen=True, kw_only=True)
class LogitLens(Attack):
    """Log-probability of each secret by the head on every kept layer; the last is the real one."""

    name = "logit lens"
    needs = "the records' prompts; candidates for the secrets, or a whole secret at the argmax"
    score_unit = NATS

    records: int | None = LENS_RECORDS
    layers: int = LENS_LAYERS

    @property
    def layers_read(self) -> int | None:
        return self.layers

    @torch.inference_mode()
    def run(self, target: Target, reference: Target) -> AttackRun:
        chosen = target.choose(self.records, self.seed)
        reading = target.read(self.layers)
        norm, head = final_norm(target.model), target.model.get_output_embeddings()
        secrets = [target.asked[i].secret_ids for i in chosen]
        targets = torch.tensor([token for ids in secrets for token in ids])
        hidden = torch.cat([reading.hidden[i] for i in chosen], dim=1)  # [layers + 1, tokens, h]
        parts = [len(ids) for ids in secrets]
        scores, hits = [], []
        for states in hidden[:-1]:
            logprobs, right = [], []
            for part, wanted in zip(states.split(_TOKENS), targets.split(_TOKENS), strict=True):
                logits = head(norm(part.to(target.model.device)))
                nats, hit = predict(logits, wanted.to(logits.device))
                logprobs.append(nats.cpu())
                right.append(hit.cpu())
            scores.append([float(t.sum()) for t in torch.cat(logprobs).split(parts)])
            hits.append([bool(t.all()) for t in torch.cat(right).split(parts)])
        scores.append([reading.logprobs[i] for i in chosen])
        hits.append([reading.extracted[i] for i in chosen])
        names = [f"layer {layer}" for layer in reading.layers]
        return target.run_of(chosen, [*names, "last layer"], scores, hits)


def final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the head. Raises `SeparationError` if it isn't found."""
    body = model.base_model
    for name in _FINAL_NORMS:
        norm = getattr(body, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise SeparationError(
        f"{type(body).__name__} has no final norm under the names {', '.join(_FINAL_NORMS)}, so "
        "the logit lens has nothing to read with. Leave this attack out for this model."
    )
