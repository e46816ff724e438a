"""A SHA-256 of everything that a model computes with, whatever its weights are stored as.

Knows models. For an off state it is what "private by construction" rests on, so nothing that could
carry a record is left out: neither an adapter nor a private stream that should not be there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..artifact import base_fingerprint
from ..layout import VOLATILE_FIELDS
from ..linear import OrthoLinear


def fingerprint(model: Any) -> str:
    """64 hex digits, equal if and only if two models have the same config and the same tensors.

    That of a separated model without a private stream is its `base_fingerprint`.
    """
    separated = {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}
    if not separated:
        config = json.loads(model.config.to_json_string(use_diff=True))
        lasting = {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
        return _digest(json.dumps(lasting, sort_keys=True), model.state_dict())
    base = base_fingerprint(model)
    private = {
        f"{name}.{kind}": getattr(layer, kind)
        for name, layer in separated.items()
        for kind in ("private_columns", "private_values")
        if layer.private_columns.shape[0]
    }
    return _digest(base, private) if private else base


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
