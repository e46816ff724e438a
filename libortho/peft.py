"""LoRA adapters on separated models, by peft.

Knows how peft is told of a layer that is no `nn.Linear`. Imported by whoever wants it: libortho
itself does without.

    config = libortho.peft.for_separated(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

An adapter trained on private records is a private stream of its own: alpha doesn't switch it off,
and `base_fingerprint` doesn't see it. It lies on top of base, residual and private stream.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from .errors import ConfigError, SeparationError
from .linear import OrthoLinear

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base alone."""


class OrthoLora(Linear):
    """A LoRA adapter, unmerged, around an `OrthoLinear`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            # peft warns of every layer type that it doesn't know itself.
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            super().__init__(*args, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `SeparationError`: merging would change the base, which is public and packed."""
        raise SeparationError(
            "an adapter can't be merged into a separated layer: its base is packed, and its "
            "fingerprint would no longer be that of public weights. Keep the adapter beside it."
        )


def for_separated(config: LoraConfig) -> LoraConfig:
    """Let a LoRA config target separated layers as it targets linear ones; returns the config.

    To load a saved adapter, give `PeftModel.from_pretrained` the config as well:
    `config=for_separated(LoraConfig.from_pretrained(folder))`. Raises `ConfigError` for variants
    that read or change the base's weight (DoRA, and starts such as PiSSA's).
    """
    if config.use_dora or config.init_lora_weights not in STARTS:
        raise ConfigError(
            "a separated layer's base is packed and must not change, so its adapters are plain "
            f"LoRA that starts by one of {STARTS}; found init_lora_weights="
            f"{config.init_lora_weights!r}, use_dora={config.use_dora}."
        )
    mapping: dict[Any, Any] = {OrthoLinear: OrthoLora}
    config._register_custom_module(mapping)
    return config
