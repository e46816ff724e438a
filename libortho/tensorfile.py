"""A safetensors file that is written one tensor at a time, in whatever order they are made.

safetensors' own writer wants all tensors at once, which for a large model is more than the host
should hold. Shapes and dtypes must be known first: the header comes first in the file, and says
where each tensor lies (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .errors import ArtifactError

_NAMES = {
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"},
    **{torch.float16: "F16", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""In the order in which safetensors writes them, widest first: so the files are the same bytes."""
_ALIGNMENT = 8
"""Bytes of which the header is a multiple, so that the tensors are aligned as it is."""


class TensorFile:
    """A safetensors file in the making; a context manager that checks that it got whole.

    outline: every tensor's shape and dtype, by name; tensors on the meta device will do
    metadata: text that goes into the header

    Raises `ArtifactError` at the end if a tensor was never written; `OSError` as `open` does.
    """

    def __init__(
        self, path: Path, outline: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
        self._outline = dict(
            sorted(outline.items(), key=lambda item: (ranks[item[1].dtype], item[0]))
        )
        entries, self._offsets, end = {}, {}, 0
        for name, tensor in self._outline.items():
            self._offsets[name] = end
            end += tensor.numel() * tensor.itemsize
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._offsets[name], end],
            }
        header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":"))
        encoded = header.encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self._start, self._size = 8 + len(encoded), 8 + len(encoded) + end
        self._missing = set(self._outline)
        self.path = path
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, of any device, in its place. It must be what the outline says."""
        expected = self._outline[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ArtifactError(
                f"{name} became {tensor.dtype} {list(tensor.shape)} and {expected.dtype} "
                f"{list(expected.shape)} was planned for {self.path.name}. Please report this."
            )
        flat = tensor.detach().cpu().contiguous().flatten()
        self._file.seek(self._start + self._offsets[name])
        self._file.write(memoryview(flat.view(torch.uint8).numpy()))
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._file.truncate(self._size)  # the last tensors may be empty
        self._file.close()
        if kind is None and self._missing:
            raise ArtifactError(
                f"{self.path.name} was planned with {len(self._missing)} tensors that were never "
                f"made, {min(self._missing)} for one. Please report this."
            )
