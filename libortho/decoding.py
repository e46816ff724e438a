"""Decoding without the host: transformers' `generate`, its steps replayed as captured CUDA graphs.

A step of a large model is hundreds of launches, and launching them one by one takes longer than
running them. `generate` with a static cache asks the model for a compiled form of itself
(`get_compiled_call`); here that is the model's own forward, captured once. It takes a fraction of a
second and not the minute of a compiler, and gives the very results of the plain forward.

Knows transformers' caches and what a model is called with. Doesn't know what the model computes,
nor which layers it has: a model that libortho never saw is captured as well. What a separated
model's alpha is, a replay reads from the device.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache, GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer

from .errors import ConfigError
from .fusion import fuse_projections
from .greedy import GreedyLoop, advance, is_greedy
from .linear import OrthoLinear
from .shortcuts import cache_writer, in_few_launches

_WARM_UPS = 2
"""Forwards before a capture: kernels are compiled, and libraries take their workspaces."""
_KEPT = 2
"""Captured steps that are kept: each holds a cache of its own."""
_STATE = ("keys", "values", "cumulative_length")
"""Tensors of a static cache's layer."""
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
"""What a forward is given besides tensors and a cache, if a graph may hold it for good."""

log = logging.getLogger(__name__)


def accelerate_decoding(model: Any, *, max_cache_len: int | None = None, fuse: bool = True) -> Any:
    """Let `model.generate` decode by captured CUDA graphs; returns the model, changed in place.

    max_cache_len: tokens, prompt included, that the cache is made for from the first call on; a
        longer call makes a larger one, and captures again
    fuse: multiply q, k and v, and gate and up, of a separated model together (`fuse_projections`);
        not where memory is short: what is laid together leaves gaps, of Llama 3 8B 200 MiB

    From then on `generate` takes a static cache unless it is told otherwise, and everything else
    it is told stays as it was. alpha may be set at any time: set between two tokens, by a processor
    or a streamer, it holds for the very next one. Where there is no CUDA device, `generate` runs as
    before. `restore_decoding` undoes it. Raises `ConfigError` for a model that can't generate.
    """
    generates = isinstance(model, GenerationMixin)
    if not generates:
        raise ConfigError(
            f"a {type(model).__name__} has no `generate`, so there is no decoding to accelerate. "
            "Load the model with AutoModelForCausalLM."
        )
    if fuse and any(isinstance(module, OrthoLinear) for module in model.modules()):
        fuse_projections(model)
    captured = CapturedForward(model)
    model.get_compiled_call = captured.get_compiled_call
    model.generate = types.MethodType(_generate(captured, max_cache_len), model)
    return model


def restore_decoding(model: Any) -> None:
    """Undo `accelerate_decoding`, but for the projections: those are `unfuse_projections`'."""
    for name in ("get_compiled_call", "generate"):
        vars(model).pop(name, None)


def _generate(captured: CapturedForward, max_cache_len: int | None) -> Callable[..., Any]:
    loop = GreedyLoop(captured)

    def generate(model: Any, *args: Any, **options: Any) -> Any:
        config = options.get("generation_config")
        chosen = getattr(config, "cache_implementation", None)
        caches = ("past_key_values", "cache", "cache_implementation")
        own = chosen is not None or any(options.get(name) is not None for name in caches)
        if model.device.type == "cuda" and not own and options.get("use_cache", True):
            options["cache_implementation"] = "static"
            if max_cache_len is not None:
                options.setdefault("max_cache_len", max_cache_len)
            if is_greedy(model, options):
                options["custom_generate"] = loop
        return type(model).generate(model, *args, **options)

    return generate


class CapturedForward:
    """A model's forward for calls with a static cache: captured once for each kind of call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._steps: OrderedDict[tuple[Any, ...], _Step | None] = OrderedDict()
        self._tensors: list[int] = []

    def get_compiled_call(self, compile_config: object = None) -> Callable[..., Any]:
        """What `generate` asks for before it begins: what takes the place of `model(...)`."""
        tensors = _addresses(self.model)
        if tensors != self._tensors:  # a tensor was replaced: the graphs know the former one
            self._steps.clear()
            self._tensors = tensors
        return self

    def __call__(self, **inputs: Any) -> Any:
        """`model(**inputs)`."""
        step = self.step_for(inputs)
        return self.model(**inputs) if step is None else step(inputs)

    def step_for(self, inputs: dict[str, Any]) -> _Step | None:
        """The captured step for such inputs, captured now if need be; None if it can't be."""
        names = [name for name, value in inputs.items() if isinstance(value, Cache)]
        cache: Any = inputs[names[0]] if names else None
        leaves, structure = pytree.tree_flatten({k: v for k, v in inputs.items() if k not in names})
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        constant = all(isinstance(leaf, _CONSTANTS) for leaf in rest)
        if not _is_plain(cache) or not constant or not isinstance(inputs.get("input_ids"), Tensor):
            return None
        key = (
            *(str(structure), repr(rest), self.model.training),
            *((t.shape, t.dtype, t.device) for t in (*tensors, cache.layers[0].keys)),
        )
        if key not in self._steps:
            self._steps[key] = self._captured(inputs, names[0])
            while len(self._steps) > _KEPT:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _captured(self, inputs: dict[str, Any], cache_name: str) -> _Step | None:
        try:
            return _Step(self.model, inputs, cache_name)
        except RuntimeError as error:  # what waits for the device, say, can't be captured
            log.warning("decoding runs uncaptured: %s", " ".join(str(error).split())[:300])
            return None

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedForward:
        return type(self)(deepcopy(self.model, memo))


class _StepLayer(StaticLayer):
    """A static cache's layer in a captured step: where to write is said once for all layers."""

    keys: Tensor
    values: Tensor
    position: Tensor  # int64 [tokens]
    write: Callable[..., None] | None  # both at once, if that can be

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self.write is not None and key_states.dtype == self.keys.dtype:
            self.write(self.keys, self.values, key_states, value_states, self.position)
        else:
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values


class _Step:
    """A forward on inputs of fixed shapes, and the memory that it reads and writes."""

    def __init__(self, model: Any, inputs: dict[str, Any], cache_name: str) -> None:
        theirs = inputs[cache_name]
        self._cache_name = cache_name
        self._cache = copy(theirs)
        self._cache.layers = [copy(layer) for layer in theirs.layers]
        self._served: weakref.ref[Any] = weakref.ref(theirs)
        own = inputs | {cache_name: None}
        own = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, own)
        self._inputs = _tensors(own)
        self._named = own
        self._advance: Callable[[], Any] | None = None
        own[cache_name] = self._cache
        tokens = inputs["input_ids"].shape[1]
        new = torch.arange(tokens, device=model.device)
        position = torch.empty_like(new)
        write = cache_writer(model) if tokens == 1 else None
        for layer in self._cache.layers:
            layer.__class__, layer.position, layer.write = _StepLayer, position, write
        lengths = [layer.cumulative_length for layer in self._cache.layers]
        before = [length.clone() for length in lengths]

        def forward() -> Any:
            torch.add(new, lengths[0], out=position)
            result = model(**own)
            torch._foreach_add_(lengths, tokens)
            return result

        def rewind() -> None:
            # What a warm-up wrote into the cache lies beyond its length, and is written anew.
            torch._foreach_copy_(lengths, before)

        with in_few_launches(model) if tokens == 1 else nullcontext():
            self._replay, self._result = capture(forward, rewind)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        """What the forward returns."""
        self._run(inputs)
        # The next replay writes over the result, and callers may keep theirs.
        kept = {
            name: pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)
            for name, value in self._result.items()
            if name != self._cache_name
        }
        return type(self._result)(**kept, **{self._cache_name: inputs[self._cache_name]})

    def _run(self, inputs: dict[str, Any]) -> None:
        self._serve(inputs[self._cache_name])
        torch._foreach_copy_(self._inputs, _tensors(inputs | {self._cache_name: None}))
        self._replay()

    # --- greedily, without the host ---------------------------------------------------------

    def begin(self, inputs: dict[str, Any]) -> None:
        """Run the forward, choose its most likely token, and make the inputs the next step's."""
        if self._advance is None:
            before = [tensor.clone() for tensor in self._inputs]
            self._advance, _ = capture(
                self._choose, lambda: torch._foreach_copy_(self._inputs, before)
            )
        self._run(inputs)
        self._advance()

    def again(self) -> None:
        """The step after `begin`, or after `again`."""
        assert self._advance is not None  # begun
        self._replay()
        self._advance()

    def token(self) -> Tensor:
        """What was chosen last, `[batch, 1]`."""
        return self._named["input_ids"].clone()

    def _choose(self) -> dict[str, Tensor]:
        advance(self._named, self._result.logits[:, -1].float().argmax(-1, keepdim=True))
        return {}

    def _serve(self, cache: Any) -> None:
        """Move a caller's cache to where the graph reads and writes one."""
        pairs = list(zip(self._cache.layers, cache.layers, strict=True))
        if all(getattr(own, n) is getattr(theirs, n) for own, theirs in pairs for n in _STATE):
            return
        former = self._served()
        if former is not None and former is not cache:
            for layer in former.layers:
                for name in _STATE:
                    setattr(layer, name, getattr(layer, name).clone())
        for own, theirs in pairs:
            for name in _STATE:
                tensor = getattr(own, name)
                tensor.copy_(getattr(theirs, name))
                setattr(theirs, name, tensor)
        self._served = weakref.ref(cache)


def capture(
    forward: Callable[[], Any], rewind: Callable[[], None]
) -> tuple[Callable[[], Any], Any]:
    """What runs `forward` again as a CUDA graph, and the result that each run writes.

    rewind: undoes what a forward changes; it is called after every warm-up
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            try:
                forward()
            finally:
                rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on with their own work on the card.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = forward()
    return partial(_replay, graph, forward), result


def _replay(graph: torch.cuda.CUDAGraph, _reads: object) -> None:
    """`_reads` holds the tensors that the graph reads: without it their memory is given away."""
    graph.replay()


def _tensors(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _is_plain(cache: object) -> bool:
    """Whether every layer keeps all of its state in tensors: sliding windows, say, don't."""
    return isinstance(cache, StaticCache) and all(
        type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers
    )


def _addresses(model: Any) -> list[int]:
    """Where all that a forward reads lies."""
    found = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    layers = (module for module in model.modules() if isinstance(module, OrthoLinear))
    return found + [id(tensor) for layer in layers for tensor in (layer._held, layer.siblings)]
