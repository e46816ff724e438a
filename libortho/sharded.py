"""`separate_shards`: a checkpoint on disk becomes an artefact on disk, block by block.

Knows a model's outline, its shards and public text. At any time one block's weights are on the
device, beside the activations of the calibration text, and what is done is written and forgotten:
neither the device nor the host ever holds the model. Sees no private record.

The model's own forward pass leads through the blocks, once, with all windows together. A block is
filled from the shards when its turn comes, run on each window by itself as `separate` runs it, and
separated. So the outcome is that of `separate`, bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import artifact, layout, stream
from .calibration import diagonal_of, listening
from .config import NO_LATTICE, SeparationConfig
from .embedding import PackedEmbedding, PackedHead, empty_embeddings
from .errors import ArtifactError, ModelLoadError, SeparationError
from .files import atomic_folder
from .linear import OrthoLinear
from .models import (
    ResolvedModel,
    linear_layers,
    load_model,
    outline_model,
    replace_module,
    resolve_model,
)
from .separation import (
    calibration_windows,
    check_finite,
    check_width,
    separate,
    separated_layer,
)
from .shards import Shards
from .switch import bits_per_linear_weight, bits_per_weight
from .tensorfile import TensorFile


@dataclass(frozen=True)
class SeparationReport:
    """What a separation from disk to disk made, and how long it took.

    streamed: the model was never whole in memory
    bits_per_linear_weight: stored bits over weights of the separated layers, base and residual
    bits_per_weight: the same with embedding and head
    """

    folder: Path
    base_fingerprint: str
    bits_per_linear_weight: float
    bits_per_weight: float
    seconds: float
    streamed: bool


def separate_shards(
    model: str | Path | ResolvedModel,
    out: str | Path,
    calibration: Sequence[str],
    *,
    config: SeparationConfig | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> SeparationReport:
    """Separate the checkpoint called `model` into the folder `out`, which must not exist.

    model: as in `load_model`
    calibration: public documents, as in `separate`
    device: where blocks are run and separated

    The folder appears whole or not at all. Raises what `load_model`, `separate` and `save` do, and
    `SeparationError` for an architecture whose blocks can't be told apart (`why_not_streamed`).
    """
    began = time.perf_counter()
    out = Path(out)
    config = config or SeparationConfig()
    if out.exists():
        raise ArtifactError(f"{out} exists already. Choose another folder, or remove it first.")
    resolved = model if isinstance(model, ResolvedModel) else resolve_model(model, cache_dir)
    skeleton, tokenizer = outline_model(resolved)
    reason = why_not_streamed(skeleton)
    if reason is not None:
        raise SeparationError(f"{reason} Load it with load_model and call separate instead.")
    for name, layer in linear_layers(skeleton).items():
        check_width(layer, name)
    shards = _checked_shards(resolved, skeleton)
    windows = calibration_windows(tokenizer, calibration, config)
    outline = separated_outline(skeleton, config)
    with atomic_folder(out) as unfinished:
        path = unfinished / artifact.BASE_FILE
        with TensorFile(path, artifact.base_state(outline), {"format": "pt"}) as file:
            _Walk(skeleton, shards, file, config, torch.device(device)).run(windows)
        tensors = layout.read_tensors(path)
        fingerprint = artifact.describe(unfinished, outline, tensors, config, tokenizer)
        del tensors
    return _report(out, fingerprint, outline, began, streamed=True)


def separate_checkpoint(
    model: str | Path | ResolvedModel,
    out: str | Path,
    calibration: Sequence[str],
    *,
    config: SeparationConfig | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> SeparationReport:
    """As `separate_shards`, and in memory for an architecture that can't be streamed."""
    resolved = model if isinstance(model, ResolvedModel) else resolve_model(model, cache_dir)
    if why_not_streamed(outline_model(resolved)[0]) is None:
        return separate_shards(resolved, out, calibration, config=config, device=device)
    began = time.perf_counter()
    whole, tokenizer = load_model(resolved, device=device)
    separate(whole, tokenizer, calibration, config=config)
    artifact.save(whole, out)
    return _report(Path(out), artifact.base_fingerprint(whole), whole, began, streamed=False)


def _report(
    folder: Path, fingerprint: str, model: Any, began: float, *, streamed: bool
) -> SeparationReport:
    return SeparationReport(
        folder,
        fingerprint,
        bits_per_linear_weight(model),
        bits_per_weight(model),
        time.perf_counter() - began,
        streamed,
    )


def why_not_streamed(model: Any) -> str | None:
    """Why a model can't be taken block by block, or None if it can."""
    kind = type(model).__name__
    if not isinstance(_blocks(model), nn.ModuleList):
        return f"{kind} keeps its blocks in no list called `layers`, so they can't be streamed."
    prefix = f"{_name_of(model, _blocks(model))}."
    outside = [name for name in linear_layers(model) if not name.startswith(prefix)]
    if outside:
        return f"{kind} has linear layers outside of its blocks ({outside[0]})."
    return None


def separated_outline(model: Any, config: SeparationConfig) -> Any:
    """What separation makes of a model's outline: modules, shapes and dtypes on the meta device."""
    outline = copy.deepcopy(model)
    for name, linear in linear_layers(outline).items():
        slots = 0
        if config.bits != NO_LATTICE:
            slots = stream.slots_per_row(linear.in_features, config.residual_density)
        layer = OrthoLinear(
            linear.in_features,
            linear.out_features,
            bits=config.bits,
            group_size=config.group_size,
            residual_slots=slots,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )
        replace_module(outline, name, layer)
    if config.head_bits != NO_LATTICE:
        empty_embeddings(outline, model.dtype)
    return outline


class _Walk:
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
        self.blocks = _blocks(model)
        for module in model.modules():  # buffers that no checkpoint holds: rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @torch.inference_mode()
    def run(self, windows: Tensor | None) -> None:
        """Write every tensor. windows: int64 `[count, length]`, or None to weigh nothing."""
        model, place = self.model, _name_of(self.model, self.blocks)
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
            check_finite(layer.weight, f"{inner}.weight")
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
        name = _name_of(self.model, embedding)
        packed = None
        if self.config.head_bits != NO_LATTICE:
            check_finite(embedding.weight, "the embedding")
            packed = PackedEmbedding.from_embedding(embedding)
        self._write(name, packed or embedding)
        embedding.to("meta")
        del packed
        if head is None:
            return
        name = _name_of(self.model, head)
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
        done = [*blocks, *(_name_of(self.model, module) for module in pair if module is not None)]
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
        name = _name_of(self.model, module) if name is None else name
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


def _checked_shards(resolved: ResolvedModel, model: Any) -> Shards:
    shards = Shards(resolved.folder)
    shards.check(artifact.base_state(model))
    if model.config.tie_word_embeddings:
        modules = model.get_input_embeddings(), model.get_output_embeddings()
        names = [f"{_name_of(model, module)}.weight" for module in modules if module is not None]
        there = [shards.read(n, resolved.dtype_on_disk, "cpu") for n in names if n in shards]
        if len(there) == 2 and not torch.equal(*there):
            raise ModelLoadError(
                f"{resolved.folder}: config.json ties {names[0]} and {names[1]}, and the files "
                "hold different ones. Set tie_word_embeddings to false, or convert the checkpoint "
                "again."
            )
    return shards


def _blocks(model: Any) -> Any:
    return getattr(model.base_model, "layers", None)


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
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
