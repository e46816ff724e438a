"""`TwoStates`: a model with an on state and an off state, whatever method made it.

Knows how to open a state, to free it again, and what to compare it with. It does not know how the
states were made: each method is a module of its own that returns a `TwoStates`.

Nothing is loaded until a state is opened, and everything is freed when it is left, so that at most
as many models are in memory as states are open at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ConfigError
from ..hardware import free_bytes, release_memory
from ..linear import OrthoLinear
from ..models import linear_layers
from ..peers import bits_per_peer_weight, dequantized_weights, is_peer, quiet_peer
from ..precision import computing_in, evaluating
from ..switch import bits_per_linear_weight, dense_weights
from .fingerprint import fingerprint

StateName = Literal["on", "off", "never"]
Loader = Callable[[], Any]
"""Gives a model as it is stored, in eval mode on the run's device."""
Dial = Callable[[Any, float], AbstractContextManager[Any]]
"""Runs the on state's model at another alpha inside a block."""

DENSE_SHARE = 0.35
"""Unpacked weights are held in memory if they take at most this share of what is free."""


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of the off state as it is handed out, and of one made now without the records."""

    off: str
    without_records: str

    @property
    def equal(self) -> bool:
        """Whether the off state is private by construction."""
        return self.off == self.without_records


@dataclass(frozen=True)
class TwoStates:
    """What an audit needs of a method.

    name: the method's, as in results
    promise: what the method itself can promise about its off state, in words
    tokenizer: for all states
    compute_dtype: of activations and unpacked weights in all states
    on_loader, off_loader: the model that knows the records, and what is handed out in its place
    never_loader: the off state of a model that never saw the records, by the same method; None if
        there is none, for a pair of checkpoints from outside
    remake_loader: the off state made anew from public inputs alone, nothing read from the cache;
        None if it can't be
    dial: how alpha is set between the states; None if the method has only the two
    promises_equality: whether off is meant to be, byte for byte, what would have been made without
        the records; then a difference alone is reason enough for doubt
    off_artifact: the folder that the off state is read back from; None if it is the public
        checkpoint, quantised when it is loaded
    report: how the states were made: losses, choices, seconds. JSON types, and no record's text
    """

    name: str
    promise: str
    tokenizer: Any
    compute_dtype: torch.dtype
    on_loader: Loader = field(repr=False)
    off_loader: Loader = field(repr=False)
    never_loader: Loader | None = field(default=None, repr=False)
    remake_loader: Loader | None = field(default=None, repr=False)
    dial: Dial | None = field(default=None, repr=False)
    promises_equality: bool = False
    off_artifact: Path | None = None
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def on(self) -> AbstractContextManager[Any]:
        """The model that knows the records, ready to compute."""
        return self.opened("on")

    def off(self) -> AbstractContextManager[Any]:
        """The model that is handed out, read back from where it is stored."""
        return self.opened("off")

    def never(self) -> AbstractContextManager[Any]:
        """The control: what the off state would be had there been no records.

        Raises `ConfigError` if there is none (`never_loader`).
        """
        return self.opened("never")

    @contextmanager
    def opened(self, state: StateName) -> Iterator[Any]:
        """A state by its name: a transformers model, freed when the block is left."""
        with ExitStack() as stack:
            stack.callback(release_memory)
            stack.enter_context(quiet_peer())
            model = self._loader(state)()
            stack.enter_context(running(model, self.compute_dtype))
            yield model
            del model

    @contextmanager
    def at(self, alpha: float) -> Iterator[Any]:
        """The on state's model with what it learned scaled by `alpha`; 1 is the on state itself.

        Raises `ConfigError` if the method has no dial.
        """
        if self.dial is None:
            raise ConfigError(
                f"{self.name} is either on or off: there is no alpha between the two. Leave the "
                "dose curve out for it."
            )
        with self.on() as model, self.dial(model, alpha):
            yield model

    def bits_per_linear_weight(self, state: StateName) -> float:
        """Stored bits over weights of the linear layers, side information included."""
        with quiet_peer():
            model = self._loader(state)()
        try:
            return stored_bits(model)
        finally:
            del model
            release_memory()

    def fingerprints(self) -> Fingerprints | None:
        """Computed now, one state after the other; None if there is nothing to compare with."""
        if self.remake_loader is None:
            return None
        prints = []
        for loader in (self.off_loader, self.remake_loader):
            with quiet_peer():
                prints.append(fingerprint(loader()))
            release_memory()
        return Fingerprints(*prints)

    def _loader(self, state: StateName) -> Loader:
        loader = {"on": self.on_loader, "off": self.off_loader, "never": self.never_loader}[state]
        if loader is None:
            raise ConfigError(
                f"{self.name} has no never-trained control. Name the public model that both "
                "checkpoints started from."
            )
        return loader


def stored_bits(model: Any) -> float:
    """Stored bits per linear weight of a model as it was loaded, side information included."""
    if is_peer(model):
        return bits_per_peer_weight(model)
    if any(isinstance(module, OrthoLinear) for module in model.modules()):
        return bits_per_linear_weight(model)
    layers = linear_layers(model).values()
    bits = sum(8 * la.weight.numel() * la.weight.element_size() for la in layers)
    return bits / sum(la.weight.numel() for la in layers)


@contextmanager
def running(model: Any, dtype: torch.dtype) -> Iterator[Any]:
    """Run a model of any storage in `dtype`, its unpacked weights held where they fit."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if is_peer(model):
            # Its own parameters were loaded in `dtype`, and an adapter's stay as they are.
            if _fits(model, dtype):
                stack.enter_context(dequantized_weights(model, dtype))
        else:
            stack.enter_context(computing_in(model, dtype))
            packed = any(isinstance(module, OrthoLinear) for module in model.modules())
            if packed and _fits(model, dtype):
                stack.enter_context(dense_weights(model, dtype))
        yield model


def _fits(model: Any, dtype: torch.dtype) -> bool:
    """Whether the weights of all linear layers, unpacked, leave enough memory for the rest."""
    width = torch.finfo(dtype).bits // 8
    packed = (m for m in model.modules() if hasattr(m, "in_features") and not list(m.children()))
    dense = sum(m.in_features * m.out_features for m in packed) * width
    return bool(dense <= DENSE_SHARE * free_bytes(model.device))
