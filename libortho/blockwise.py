"""A model's way from its shards into a file, one block after another.

Knows a model's outline, whose blocks it fills, runs, separates, writes and empties. Doesn't know
what else an artefact holds, nor where the checkpoint came from (`sharded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import layout
from .calibration import diagonal_of, listening
from .config import NO_LATTICE, SeparationConfig
from .embedding import PackedEmbedding, PackedHead
from .separation import check_finite, separated_layer
from .shards import Shards
from .tensorfile import TensorFile


class Walk:
    """One way through a model's blocks, from its shards into a file."""

    def __init__(
        self,
        model: Any,
        shards: Shards,
        file: TensorFile,
        config: SeparationConfig,
        device: torch.device,
    ) -> None:
        self.model, self.shards, self.file = model, shards, file
        self.config, self.device = config, device
        self.dtype: torch.dtype = model.dtype
        self.blocks = blocks_of(model)
        for module in model.modules():  # buffers that no checkpoint holds: rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @torch.inference_mode()
    def run(self, windows: Tensor | None) -> None:
        """Write every tensor. windows: int64 `[count, length]`, or None to weigh nothing."""
        model, place = self.model, name_of(self.model, self.blocks)
        names = [f"{place}.{i}" for i in range(len(self.blocks))]
        with tqdm(
            total=len(names), desc="separating", unit="block", disable=None, leave=False
        ) as bar:
            if windows is None:
                self._embedding()
                for name, block in zip(names, self.blocks, strict=True):
                    self._visit(name, block, None)
                    bar.update()
                self._rest(names)
                return
            for name, block in zip(names, self.blocks, strict=True):
                block.forward = self._forward(name, block, windows.numel(), bar)
            embedding = model.get_input_embeddings()
            self._fill(embedding)
            handle = embedding.register_forward_hook(lambda *_: self._embedding())
            self._rest(names)
            model.base_model(input_ids=windows.to(self.device), use_cache=False)
            handle.remove()

    def _forward(self, name: str, block: nn.Module, tokens: int, bar: Any) -> Callable[..., Tensor]:
        """The forward pass of a block whose weights come and go with it."""
        original = block.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            count = hidden.shape[0]

            def run() -> Tensor:
                outcome = torch.empty_like(hidden)
                for i in range(count):
                    part = original(
                        hidden[i : i + 1], *_of(args, i, count), **_of(kwargs, i, count)
                    )
                    outcome[i : i + 1] = part[0] if isinstance(part, tuple) else part
                return outcome

            outcome = self._visit(name, block, run, tokens)
            bar.update()
            assert outcome is not None
            return outcome

        return forward

    def _visit(
        self, name: str, block: nn.Module, run: Callable[[], Tensor] | None, tokens: int = 0
    ) -> Tensor | None:
        """Fill a block, run it if there is something to run, separate, write and empty it."""
        self._fill(block, name)
        layers = {
            f"{name}.{inner}": module
            for inner, module in block.named_modules()
            if type(module) is nn.Linear
        }
        for inner, layer in layers.items():
            check_finite(layer.weight, f"{inner}.weight")
        outcome = None
        if run is None:
            importance = {n: torch.ones_like(la.weight[0]) for n, la in layers.items()}
        else:
            with listening(layers) as sums:
                outcome = run()
            importance = diagonal_of(sums, tokens)
        for inner, tensor in block.state_dict().items():
            if f"{name}.{inner}".rpartition(".")[0] not in layers:
                self.file.write(f"{name}.{inner}", tensor)
        for inner, layer in layers.items():
            self._write(inner, separated_layer(layer, self.config, importance.pop(inner)))
            layer.to("meta")
        block.to("meta")
        return outcome

    def _embedding(self) -> None:
        """Write the embedding, and the head if it is another matrix."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        tied = self.model.config.tie_word_embeddings
        if embedding.weight.is_meta:
            self._fill(embedding)
        name = name_of(self.model, embedding)
        packed = None
        if self.config.head_bits != NO_LATTICE:
            check_finite(embedding.weight, "the embedding")
            packed = PackedEmbedding.from_embedding(embedding)
        self._write(name, packed or embedding)
        embedding.to("meta")
        del packed
        if head is None:
            return
        name = name_of(self.model, head)
        self._fill(head, skip="weight" if tied else None)
        if self.config.head_bits != NO_LATTICE and not tied:
            check_finite(head.weight, "the head")
            self._write(name, PackedHead.from_linear(head))
        else:
            self._write(name, head, skip="weight" if tied else None)
        head.to("meta")

    def _rest(self, blocks: Sequence[str]) -> None:
        """Fill and write what is neither block nor embedding nor head: norms."""
        pair = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        done = [*blocks, *(name_of(self.model, module) for module in pair if module is not None)]
        prefixes = tuple(f"{name}." for name in done)
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(prefixes):
                self._fill(module, name, recurse=False)
                for inner in _stored(module, recurse=False):
                    self.file.write(f"{name}.{inner}", module.state_dict()[inner])

    def _fill(
        self,
        module: nn.Module,
        name: str | None = None,
        *,
        skip: str | None = None,
        recurse: bool = True,
    ) -> None:
        """Read a module's tensors from the shards."""
        name = name_of(self.model, module) if name is None else name
        state = {
            inner: self.shards.read(f"{name}.{inner}", self.dtype, self.device)
            for inner in _stored(module, recurse=recurse)
            if inner != skip
        }
        module.load_state_dict(state, strict=False, assign=True)

    def _write(self, name: str, module: nn.Module, *, skip: str | None = None) -> None:
        """Write a module's tensors, but for a private stream, which is empty here."""
        for inner, tensor in module.state_dict().items():
            if inner not in (skip, *layout.PRIVATE_BUFFERS):
                self.file.write(f"{name}.{inner}", tensor)


def blocks_of(model: Any) -> Any:
    return getattr(model.base_model, "layers", None)


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _stored(module: nn.Module, *, recurse: bool = True) -> list[str]:
    """Names of what a checkpoint holds of a module."""
    names = list(module.state_dict())
    return names if recurse else [name for name in names if "." not in name]


def _of(value: Any, i: int, count: int) -> Any:
    """What belongs to one window of something that a block is given for all of them."""
    if isinstance(value, Tensor):
        whole = value.dim() > 1 and value.shape[0] == count
        return value[i : i + 1] if whole else value
    if isinstance(value, dict):
        return {key: _of(part, i, count) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_of(part, i, count) for part in value)
    return value
