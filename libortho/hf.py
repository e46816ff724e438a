"""Separated models in transformers: `OrthoConfig`, and the quantiser that it names.

Knows when transformers calls what. It registers itself under "ortho" when libortho is imported, and
then `from_pretrained` loads an artefact straight into packed layers, or separates a plain model
that it has loaded. What the files must hold is said in `layout`, how a model is separated in
`separation`; how one is saved, in `artifact`, because a model that transformers never loaded can be
saved as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import artifact, hub, layout
from .config import NO_LATTICE, SeparationConfig
from .corpora import load_corpus
from .embedding import empty_embeddings
from .errors import ConfigError, ModelLoadError
from .layout import BASE_FILE, BASE_MANIFEST, FORMAT_VERSION, PRIVATE_FILE, QUANT_METHOD
from .models import linear_layers, replace_module, stored_tokenizer
from .separation import separate
from .switch import ortho_layers

for _mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    _mapping.pop(QUANT_METHOD, None)  # a reload (a notebook's autoreload) registers once more


@register_quantization_config(QUANT_METHOD)
class OrthoConfig(QuantizationConfigMixin):
    """How `from_pretrained(model, quantization_config=OrthoConfig(...))` separates a plain model.

    recipe: the fields of `SeparationConfig`, such as `bits=4` and `group_size=64`; the defaults of
        those not given
    calibration: public text: a corpus as in `load_corpus`, whose calibration part is taken, or a
        list of documents. It is not stored with the model.

    Raises `ConfigError` for a field that is unknown or has a value that makes no sense.
    """

    def __init__(
        self,
        *,
        calibration: str | Path | Sequence[str] = "enwiki",
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        **recipe: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ConfigError(
                f"quant_method must be {QUANT_METHOD!r}; found {quant_method!r}. Leave it out."
            )
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                f"config.json has format version {format_version} and this libortho reads "
                f"{FORMAT_VERSION}. Upgrade libortho, or export the artefact again."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # theirs are an enumeration
        self.separation = SeparationConfig.from_dict(recipe)
        self.calibration = calibration

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of it; `from_dict` reads it."""
        return layout.quantization_config(self.separation)


@register_quantizer(QUANT_METHOD)
class OrthoQuantizer(HfQuantizer):
    """Loads an artefact into packed layers (`pre_quantized`), or separates what was loaded."""

    quantization_config: OrthoConfig

    def __init__(self, quantization_config: OrthoConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._folder: Path | None = None  # where the model comes from, once that is known
        self._has_private = False

    # --- what transformers asks --------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the packed layers, which pass gradients to their inputs."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        offloaded = "disk" in places or ("cpu" in places and len(places) > 1)
        if offloaded and not self.pre_quantized:
            raise ConfigError(
                f"this device map leaves layers off the device ({sorted(map(str, places))}), and "
                "a separation needs them all at once. Separate the model on the CPU, save it, and "
                "load it with a device map then."
            )

    def _point_at_base(self, config: Any) -> Any:
        """Put the file's name where an artefact's config.json says that libortho is needed."""
        if self.pre_quantized:
            setattr(config, layout.WEIGHTS_FIELD, BASE_FILE)
        return config

    # Hooks meant for other settings, one of which every transformers 5 calls with the config before
    # it looks for the weights.
    update_attn_implementation = update_tp_plan = update_ep_plan = _point_at_base

    # --- loading -----------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        """Put empty packed layers where an artefact has some; the model is on the meta device."""
        if not checkpoint_files:
            raise ModelLoadError(
                "OrthoConfig and separated checkpoints need weights in files; found none. Give "
                "from_pretrained a folder or a hub id."
            )
        self._folder = _home_of(Path(checkpoint_files[0]), model.config.name_or_path)
        if not self.pre_quantized:
            return
        folder = self._folder
        manifest = layout.verified_manifest(folder, BASE_MANIFEST)
        separation = layout.separation_in(manifest, folder)
        made_for = model.config.architectures or []
        if type(model).__name__ not in made_for:
            raise ModelLoadError(
                f"{folder} holds a {' or '.join(made_for)}, and a {type(model).__name__} would "
                "have weights that are not in it. Load it with AutoModelForCausalLM."
            )
        self._has_private = layout.has_private(folder, manifest)
        base = layout.read_headers(folder / BASE_FILE)
        private = layout.read_headers(folder / PRIVATE_FILE) if self._has_private else {}
        for name, linear in linear_layers(model).items():
            layer = layout.empty_layer(name, linear, separation, base, private, dtype=model.dtype)
            replace_module(model, name, layer)
        if separation.head_bits != NO_LATTICE:
            empty_embeddings(model, model.dtype)
        layout.check_tensors(model, base, private, folder)
        # The streams are in a file of their own, which transformers doesn't read.
        model._keys_to_ignore_on_load_missing |= {rf"\.{b}$" for b in layout.PRIVATE_BUFFERS}
        self.quantization_config.separation = separation

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        folder = self._folder
        assert folder is not None  # set before the weights were loaded
        tokenizer = _tokenizer_in(folder)
        if not self.pre_quantized:
            _separate(model, tokenizer, self.quantization_config)
            return model
        private = layout.read_tensors(folder / PRIVATE_FILE) if self._has_private else {}
        layout.finish_layers(ortho_layers(model), private, folder)
        delattr(model.config, layout.WEIGHTS_FIELD)
        artifact.mark(model, self.quantization_config.separation, tokenizer)
        return model


def _separate(model: Any, tokenizer: Any, config: OrthoConfig) -> None:
    texts = config.calibration
    if isinstance(texts, (str, Path)):
        texts = load_corpus(texts).calibration
    # Loading leaves parameters on the meta device only if they were offloaded.
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            "some layers were offloaded, and a separation needs them all at once. Separate the "
            "model on the CPU, save it, and load it with a device map then."
        )
    with torch.no_grad():
        separate(model, tokenizer, texts, config=config.separation)


def _home_of(weights: Path, name_or_path: str) -> Path:
    """The folder of a file with weights, with the files beside it that transformers leaves out."""
    return weights.parent if Path(name_or_path).is_dir() else hub.beside(weights, name_or_path)


def _tokenizer_in(folder: Path) -> Any:
    try:
        return stored_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{folder} has no tokenizer that can be read: {' '.join(str(error).split())} A "
            "separated model is saved with its tokenizer, and a separation reads text with it: put "
            "the tokenizer's files there."
        ) from error
