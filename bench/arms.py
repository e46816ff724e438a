"""The models that are measured against each other, each loaded alone and the same way.

An arm is a model in one state. Only one is in memory at a time: entering an arm loads it, leaving
it frees what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import libortho
from libortho.config import NO_LATTICE, SeparationConfig
from libortho.corpora import Corpus
from libortho.hardware import release_memory
from libortho.models import ResolvedModel, load_model, load_tokenizer
from libortho.peers import PEER_OF_BITS, bits_per_peer_weight, load_peer, quiet_peer
from libortho.precision import computing_in, dtype_name
from libortho.product import backend_of
from libortho.separation import separate
from libortho.store import content_of

OURS = ("alpha1", "alpha0", "never-trained")
PEERS = ("nf4", "int8")
PLAIN = "plain"
REFERENCE = "reference"
PROMPT_TOKENS = 512
"""Tokens of the prompt whose execution is named."""
DENSE_SHARE = 0.35
"""Composed weights are held in memory if they take at most this share of what is free."""


def arms_of(bits: int) -> list[str]:
    """The arms of experiment 2 at so many bits: without a lattice there is nothing to round."""
    plain = [] if bits == NO_LATTICE else [PLAIN]
    return [REFERENCE, "alpha1", "alpha0", *plain, *PEER_OF_BITS[bits]]


Progress = Callable[[], AbstractContextManager[None]]


class Tuned(NamedTuple):
    """A separated model before and after tuning, and what alpha = 0 is when it is handed out."""

    base: Path
    full: Path
    exported: Path
    report: dict[str, Any]


@dataclass
class Arm:
    """A loaded arm: `bits` are stored bits per linear weight, all streams counted."""

    name: str
    model: Any
    tokenizer: Any
    bits: float
    precision: str
    execution: str


@dataclass(frozen=True)
class Arms:
    """Where the arms come from."""

    resolved: ResolvedModel
    corpus: Corpus
    separation: SeparationConfig
    folders: Mapping[str, Path]
    dtype: torch.dtype
    device: str
    cache_dir: Path | None

    def identity(self, name: str) -> dict[str, Any]:
        """What determines an arm's weights, for a key, as JSON types."""
        folder = self.folders.get(name)
        return {
            "model": self.resolved.identity,
            "calibration": self.corpus.calibration.sha256,
            "separation": self.separation.to_dict(),
            "artefact": None if folder is None else content_of(folder),
        }

    @contextmanager
    def load(self, name: str) -> Iterator[Arm]:
        """The arm, ready to run in the run's compute dtype on its device."""
        with ExitStack() as stack:
            stack.callback(release_memory)
            stack.enter_context(quiet_peer())
            arm = self._load(name)
            if name in (*OURS, PLAIN):
                stack.enter_context(computing_in(arm.model, self.dtype))
                held, arm.execution = self._execution(arm.model)
                if held:
                    stack.enter_context(libortho.dense_weights(arm.model, self.dtype))
            yield arm

    def _load(self, name: str) -> Arm:
        kind, bits = dtype_name(self.dtype), self.separation.bits
        size = self.separation.group_size
        lattice = "no lattice" if bits == NO_LATTICE else f"INT{bits} g{size}"
        if name == REFERENCE:
            model, tokenizer = load_model(self.resolved, dtype=self.dtype, device=self.device)
            width = float(torch.finfo(self.dtype).bits)
            return Arm(name, model, tokenizer, width, f"{kind} weights and compute", "plain torch")
        if name in PEERS:
            model = load_peer(self.resolved, name, dtype=self.dtype, device=self.device)  # type: ignore[arg-type]
            tokenizer = load_tokenizer(self.resolved.folder)
            text = f"bitsandbytes {name}, {kind} compute"
            return Arm(name, model, tokenizer, bits_per_peer_weight(model), text, "bitsandbytes")
        if name == PLAIN:
            model, tokenizer = load_model(self.resolved, device=self.device)
            recipe = SeparationConfig(
                bits=bits, group_size=size, residual_density=0.0, search=False
            )
            separate(model, tokenizer, self.corpus.calibration, config=recipe)
            text = f"{lattice} round to nearest, min-max range, {kind} compute"
        else:
            model, tokenizer = libortho.load(self.folders[name], device=self.device)
            streams = "residual and private" if name == "alpha1" else "residual"
            text = f"{lattice} + FP16 {streams}, {kind} compute"
        stored = libortho.bits_per_linear_weight(model)
        return Arm(name, model, tokenizer, stored, text, "")

    def _execution(self, model: Any) -> tuple[bool, str]:
        """Whether to hold composed weights, and what then multiplies, and why."""
        layers = [m for m in model.modules() if isinstance(m, libortho.OrthoLinear)]
        width = torch.finfo(self.dtype).bits // 8
        dense = sum(layer.in_features * layer.out_features for layer in layers) * width
        largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
        if self.device == "cpu":
            free, fused = psutil.virtual_memory().available, False
        else:
            free = torch.cuda.mem_get_info(self.device)[0]
            fused = backend_of(largest, 1, self.dtype).name == "triton-decode"
        if not fused and dense <= DENSE_SHARE * free:
            return True, "composed weights held in memory"
        one, many = (backend_of(largest, n, self.dtype) for n in (1, PROMPT_TOKENS))
        return False, (
            f"packed weights: a token by {one.name} ({one.reason}), a prompt by {many.name} "
            f"({many.reason})"
        )
