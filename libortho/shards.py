"""A checkpoint's tensors, read one at a time from its safetensors files.

Knows files and names. The files are mapped, not loaded: what is read lies in the page cache, and
nothing is held here. Doesn't know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import weight_files
from .errors import ModelLoadError


class Shards:
    """The tensors of a checkpoint's folder by name; `check_plain` must have passed it.

    Raises `ModelLoadError` for a file that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(
                    f"{path} can't be read: {error}. Copy or download the checkpoint again."
                ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise `ModelLoadError` unless all of these are there, in these shapes."""
        missing = sorted(set(expected) - set(self._files))
        if missing:
            raise ModelLoadError(
                f"{self.folder} lacks {len(missing)} of the model's tensors, {missing[0]} for one. "
                "The checkpoint is incomplete, or names them as an older transformers did."
            )
        for name, tensor in expected.items():
            found = list(self._files[name].get_slice(name).get_shape())
            if found != list(tensor.shape):
                raise ModelLoadError(
                    f"{self.folder}: {name} has the shape {found} and config.json asks for "
                    f"{list(tensor.shape)}. They belong to different models."
                )

    def read(self, name: str, dtype: torch.dtype, device: str | torch.device) -> Tensor:
        """One tensor, in a dtype and on a device."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.to(device).to(dtype)
