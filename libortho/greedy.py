"""Greedy decoding that never waits: the token chosen goes back into the captured step on the card.

`generate` prepares each token's inputs on the host and looks at every token before it asks for the
next one; both take a good part of what a step takes. Here the host only says "again", and looks at
each token while the next one is made. For greedy search with a length and end tokens, and nothing
else asked for; whatever else there is, transformers' own loop does, on the same captured step.

Knows transformers' generation settings and a captured step's interface.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

_MASK_DIMS = 4
_KNOWN = (MaxLengthCriteria, EosTokenCriteria)
"""What may end a generation here."""


def is_greedy(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call of `generate` with these options asks for greedy search and nothing else."""
    given = options.get("generation_config") or model.generation_config
    if not isinstance(given, GenerationConfig) or options.get("assistant_model") is not None:
        return False
    config = copy.deepcopy(given)
    config.update(**{k: v for k, v in options.items() if k != "generation_config"})
    return bool(
        config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and not config.return_dict_in_generate
        and config.prefill_chunk_size is None
        and options.get("streamer") is None
        and options.get("custom_generate") is None
    )


class GreedyLoop:
    """The loop, as `generate(custom_generate=...)` calls it.

    captured: gives a step for a forward's inputs, or None (`decoding.CapturedForward.step_for`)
    """

    def __init__(self, captured: Any) -> None:
        self._captured = captured
        self._cache: StaticCache | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Token ids `[batch, prompt + new]`, as transformers' own greedy search gives them."""
        criteria = list(stopping_criteria)
        simple = not list(logits_processor) and all(type(c) in _KNOWN for c in criteria)
        if not simple or synced_gpus or stopping_criteria.max_length is None:
            return type(model)._sample(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                **model_kwargs,
            )
        self._captured.get_compiled_call()  # tensors that were replaced are noticed
        for name, value in model_kwargs.items():
            if isinstance(value, StaticCache):
                model_kwargs[name] = self._emptied(value, model, input_ids.shape[0])
        new = stopping_criteria.max_length - input_ids.shape[1]
        ends = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        stops = set(torch.cat([e.flatten() for e in ends]).tolist()) if ends else set()
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        token = outputs.logits[:, -1].float().argmax(-1, keepdim=True)
        made = [token]
        if new > 1:
            kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            inputs = model.prepare_inputs_for_generation(
                torch.cat([input_ids, token], 1), next_sequence_length=1, **kwargs
            )
            del outputs
            made += self._continued(model, inputs, new - 1, stops)
        return _finished(input_ids, torch.cat(made, 1), stops, generation_config)

    def _emptied(self, new: StaticCache, model: Any, batch: int) -> StaticCache:
        """The cache of an earlier call, which nobody has seen, if a new one would be like it.

        A second one would take the memory again, and be copied to where the captured step reads.
        """
        former, self._cache = self._cache, new
        fresh: list[Any] = new.layers
        layers: list[Any] = [] if former is None else former.layers
        if former is None or any(layer.is_initialized for layer in fresh):
            return new
        sizes = [layer.max_cache_len for layer in fresh]
        wanted = [(batch, size, model.dtype, model.device) for size in sizes]
        keys = [layer.keys for layer in layers if layer.is_initialized]
        if wanted != [(k.shape[0], k.shape[2], k.dtype, k.device) for k in keys]:
            return new
        former.reset()
        self._cache = former
        return former

    def _continued(
        self, model: Any, inputs: dict[str, Any], new: int, stops: set[int]
    ) -> list[Tensor]:
        """Up to `new` further tokens, `[batch, 1]` each; some beyond the end, perhaps."""
        step = self._captured.step_for(inputs)
        made: list[Tensor] = []
        watch = _Watch(inputs["input_ids"], stops)
        watch.look(inputs["input_ids"])
        for i in range(new):
            if step is not None and can_advance(inputs):
                step.again() if i else step.begin(inputs)
                token = step.token()
            else:
                outputs = model(**inputs, return_dict=True)
                token = outputs.logits[:, -1].float().argmax(-1, keepdim=True)
                inputs = advanced(inputs, token)
            made.append(token)
            if watch.look(token):  # at the token before this one
                break
        return made


class _Watch:
    """Whether every sequence has ended, told one token late so that the host need not wait."""

    def __init__(self, like: Tensor, stops: set[int]) -> None:
        self._stops = stops
        self._ended = [False] * like.shape[0]
        self._on_card = like.device.type == "cuda"
        self._seen = [
            torch.zeros(like.shape[0], dtype=like.dtype, pin_memory=self._on_card) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._on_card else []
        self._count = 0

    def look(self, token: Tensor) -> bool:
        """Ask for a token `[batch, 1]`, and say whether all had ended by the one before it."""
        if not self._stops:
            return False
        slot, before = self._count % 2, (self._count + 1) % 2
        self._seen[slot].copy_(token[:, 0], non_blocking=True)
        if self._on_card:
            self._copied[slot].record()
        self._count += 1
        if self._count == 1:
            return False
        if self._on_card:
            self._copied[before].synchronize()
        for i, value in enumerate(self._seen[before].tolist()):
            self._ended[i] |= value in self._stops
        return all(self._ended)


def can_advance(inputs: dict[str, Any]) -> bool:
    """Whether a step's inputs are of the kind that is known how to go on from."""
    mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == _MASK_DIMS
        and isinstance(position, Tensor)
        and set(tensors) == {"input_ids", "position_ids", "attention_mask"}
    )


def advanced(inputs: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """The next step's inputs, as `advance` makes them in place."""
    following = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    advance(following, token)
    return following


def advance(inputs: dict[str, Any], token: Tensor) -> None:
    """Make a step's inputs the next one's: its token, its position, and one key more to see."""
    inputs["input_ids"].copy_(token)
    inputs["position_ids"].add_(1)
    mask = inputs["attention_mask"]  # bool [batch, 1, 1, length], true up to the newest key
    mask[..., 1:].logical_or_(_newest(mask)[..., :-1])


def _newest(mask: Tensor) -> Tensor:
    """True at the last key that is seen."""
    at = torch.arange(mask.shape[-1], device=mask.device)
    return at == torch.where(mask, at, -1).amax(-1, keepdim=True)


def _finished(prompt: Tensor, made: Tensor, stops: set[int], config: Any) -> Tensor:
    """Prompt and tokens, padding after an end, and nothing after the last of the ends."""
    if stops:
        ends = torch.isin(made, torch.tensor(sorted(stops), device=made.device))
        after = ends.cumsum(1) - ends.long() > 0
        pad = config._pad_token_tensor
        made = made.masked_fill(after, 0 if pad is None else int(pad))
        made = made[:, : int((~after).sum(1).max())]
    return torch.cat([prompt, made], 1)
