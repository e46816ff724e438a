"""Decode configs that were measured on this very card, kept on disk.

Knows how to time a launch, and the file of its outcomes in libortho's cache folder. Nothing is
timed unless it is asked for, by `tune` or by LIBORTHO_AUTOTUNE=1 at a shape's first use: a user's
first token must not wait for it. Without it the defaults of `configs` hold.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FetchError
from ..fetch import cache_folder
from ..files import atomic_write_text
from ..lattice import Lattice
from .configs import Chosen, DecodeConfig, Shape, default_config, word_layout

VARIABLE = "LIBORTHO_AUTOTUNE"
"""Environment variable: 1 to measure each shape at its first use."""


log = logging.getLogger(__name__)
_chosen: dict[tuple[Shape, int, torch.device], Chosen] = {}


def config_for(
    lattice: Lattice,
    x: Tensor,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
) -> DecodeConfig:
    """The config for a launch with these operands: see `chosen`; may measure if that is wanted."""
    tokens = x.shape[0]
    key = _key(lattice, tokens)
    if key not in _chosen:
        wanted = os.environ.get(VARIABLE) == "1" and not torch.cuda.is_current_stream_capturing()
        if wanted and _remembered(key) is None:
            tune(lattice, x, residual, private, alpha)
        _chosen[key] = chosen(lattice, tokens)
    return _chosen[key].config


def chosen(lattice: Lattice, tokens: int) -> Chosen:
    """The config for a lattice and a number of tokens on its device, and where it comes from."""
    key = _key(lattice, tokens)
    shape, bucket, device = key
    remembered = _remembered(key)
    if remembered is not None:
        return Chosen(remembered, "measured on this card")
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return default_config(shape, bucket, capability, properties.multi_processor_count)


def candidates(shape: Shape, tokens: int) -> list[DecodeConfig]:
    """Configs worth timing: they fill a card, and their registers and steps make sense."""
    few = shape.out_features <= 2048
    all_words = {1: (4,), 2: (4,)}.get(tokens, (2, 1))
    found = []
    for rows, warps, words in itertools.product(
        (2, 4, 8) if few else (4, 8, 16), (1, 2, 4), all_words
    ):
        layout = word_layout(shape, words)
        if layout is None or rows * tokens > 64:
            continue
        columns = layout[0] * layout[1] * 8 // shape.bits * 32 * warps
        steps = -(-shape.in_features // columns)
        wasteful = steps * columns > 1.4 * shape.in_features and warps > 1
        if wasteful or (rows == 16 and steps > 1):  # 16 rows of two steps don't fit in registers
            continue
        ahead = (False,) if steps == 1 else (True,) if tokens > 1 else (False, True)
        found += [DecodeConfig(rows, warps, words, flag) for flag in ahead]
    return found


def tune(
    lattice: Lattice,
    x: Tensor,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
) -> tuple[DecodeConfig, float]:
    """Time all candidates on these operands; keep, and return, the fastest and its microseconds.

    Operands as in `decode`, on a CUDA device. Takes seconds for each candidate, for compiling.
    """
    from triton.testing import do_bench  # noqa: PLC0415 - not everywhere

    from .decode import decode  # noqa: PLC0415 - imports Triton

    key = _key(lattice, x.shape[0])
    took: dict[DecodeConfig, float] = {}
    for config in candidates(key[0], key[1]):
        try:
            took[config] = 1e3 * do_bench(
                functools.partial(decode, x, lattice, residual, private, alpha, None, config),
                return_mode="median",
            )
        except Exception as error:  # too many registers, say: this one is out
            log.info("%s is out: %s", config, error)
    best = min(took, key=took.__getitem__)
    _remember(key, best, took[best])
    return best, took[best]


def _key(lattice: Lattice, tokens: int) -> tuple[Shape, int, torch.device]:
    return Shape.of(lattice), 1 << (tokens - 1).bit_length(), lattice.packed.device


# --- the file -----------------------------------------------------------------------------------


def _name(key: tuple[Shape, int, torch.device]) -> str:
    shape, tokens, _ = key
    return (
        f"{shape.out_features}x{shape.in_features} int{shape.bits} g{shape.group_size} "
        f"{tokens} tokens"
    )


def _file(device: torch.device) -> Path | None:
    """The file for this card and compiler, or None where no cache folder can be used."""
    from triton import __version__  # noqa: PLC0415 - not everywhere

    card = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    try:
        return cache_folder() / "kernels" / f"decode-{card}-triton-{__version__}.json"
    except (FetchError, ImportError) as error:
        log.warning("decode configs are not kept: %s", error)
        return None


@functools.cache
def _content(device: torch.device) -> dict[str, dict[str, object]]:
    """What the file holds; an unreadable one counts as empty, since it can be measured again."""
    path = _file(device)
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is not read: %s", path, error)
        return {}


def _remembered(key: tuple[Shape, int, torch.device]) -> DecodeConfig | None:
    entry = _content(key[2]).get(_name(key))
    try:
        return None if entry is None else DecodeConfig(**entry["config"])  # type: ignore[arg-type]
    except (KeyError, TypeError):
        return None


def _remember(key: tuple[Shape, int, torch.device], config: DecodeConfig, us: float) -> None:
    content = _content(key[2])
    content[_name(key)] = {"config": dataclasses.asdict(config), "microseconds": round(us, 2)}
    _chosen.pop(key, None)
    path = _file(key[2])
    if path is not None:
        atomic_write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
