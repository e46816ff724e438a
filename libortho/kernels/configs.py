"""How a decode launch is cut up, for which shapes, on which cards.

Knows shapes and cards by compute capability; no Triton, no tensors, no measuring (`autotune`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..lattice import PER_ROW, Lattice

MAX_TOKENS = 8
"""Tokens up to which the decode kernel is offered; each costs registers, and a product a weight."""
WARP = 32
WORD_BYTES = 4
_WARPS_PER_MULTIPROCESSOR = 14
"""Warps that should find work on each multiprocessor, so that loads overlap arithmetic. A quarter
of the 48 to 64 that fit: at 16 bytes for each row a thread has in flight, it is enough."""


@dataclass(frozen=True)
class Shape:
    """A layer's weight, as far as a launch depends on it."""

    out_features: int
    in_features: int
    bits: int
    group_size: int

    @classmethod
    def of(cls, lattice: Lattice) -> Shape:
        out_features = lattice.packed.shape[0]
        return cls(out_features, lattice.in_features, lattice.bits, lattice.group_size)


@dataclass(frozen=True)
class DecodeConfig:
    """How a launch is cut up.

    rows: output rows of a program, a power of two
    warps: warps of a program; a step covers the columns of its `32 * warps` threads
    words: 4-byte words of a row that a thread reads at once: 1, 2 or 4
    prefetch: read the next step's words before this step's arithmetic; if not, the overlap is left
        to the other programs. Not by Triton's pipelining: its copies of `x` would go past the L1
        cache, in which a multiprocessor's programs share it
    """

    rows: int
    warps: int
    words: int
    prefetch: bool


class Chosen(NamedTuple):
    """A config, and where it comes from in words."""

    config: DecodeConfig
    source: str


MEASURED: dict[tuple[int, int], dict[tuple[int, int, int], DecodeConfig]] = {
    # compute capability: {(out_features, in_features, tokens): config} at 4 bits
    (8, 9): {},
    (9, 0): {
        (4096, 4096, 1): DecodeConfig(rows=8, warps=4, words=4, prefetch=False),
        (1024, 4096, 1): DecodeConfig(rows=2, warps=2, words=4, prefetch=True),
        (14336, 4096, 1): DecodeConfig(rows=4, warps=2, words=4, prefetch=False),
        (4096, 14336, 1): DecodeConfig(rows=8, warps=4, words=4, prefetch=False),
        (3072, 3072, 1): DecodeConfig(rows=8, warps=4, words=4, prefetch=False),
        (1024, 3072, 1): DecodeConfig(rows=2, warps=2, words=4, prefetch=True),
        (8192, 3072, 1): DecodeConfig(rows=4, warps=1, words=4, prefetch=True),
        (3072, 8192, 1): DecodeConfig(rows=4, warps=4, words=4, prefetch=True),
        (6144, 4096, 1): DecodeConfig(rows=4, warps=2, words=4, prefetch=True),
        (28672, 4096, 1): DecodeConfig(rows=4, warps=2, words=4, prefetch=False),
        (5120, 3072, 1): DecodeConfig(rows=4, warps=1, words=4, prefetch=True),
        (16384, 3072, 1): DecodeConfig(rows=4, warps=1, words=4, prefetch=False),
        (4096, 4096, 8): DecodeConfig(rows=4, warps=1, words=2, prefetch=True),
        (1024, 4096, 8): DecodeConfig(rows=2, warps=2, words=2, prefetch=True),
        (14336, 4096, 8): DecodeConfig(rows=4, warps=2, words=2, prefetch=True),
        (4096, 14336, 8): DecodeConfig(rows=4, warps=2, words=2, prefetch=True),
        (4096, 4096, 4): DecodeConfig(rows=4, warps=1, words=2, prefetch=True),
        (1024, 4096, 4): DecodeConfig(rows=4, warps=4, words=2, prefetch=True),
        (14336, 4096, 4): DecodeConfig(rows=4, warps=1, words=2, prefetch=True),
        (4096, 14336, 4): DecodeConfig(rows=8, warps=2, words=2, prefetch=True),
        (4096, 4096, 2): DecodeConfig(rows=4, warps=1, words=4, prefetch=True),
        (1024, 4096, 2): DecodeConfig(rows=4, warps=4, words=4, prefetch=False),
        (14336, 4096, 2): DecodeConfig(rows=8, warps=4, words=4, prefetch=False),
        (4096, 14336, 2): DecodeConfig(rows=8, warps=2, words=4, prefetch=True),
    },
}
"""Winners of `bench/gpu_kernels.py`; where nothing was measured yet, `reasoned` speaks."""


def word_layout(shape: Shape, words: int) -> tuple[int, int] | None:
    """(words a thread reads at once, bytes of a word) that a shape allows; None if there is none.

    words: of 4 bytes, at most

    A thread's columns must not straddle groups, and words of 4 bytes need rows of whole words;
    other rows are read by the byte, which is slower.
    """
    width = -(-shape.in_features * shape.bits // 8)
    group = shape.in_features if shape.group_size == PER_ROW else shape.group_size
    sizes = (WORD_BYTES, 1) if width % WORD_BYTES == 0 else (1,)
    for size in sizes:
        count = words * WORD_BYTES // size
        while count:
            columns = count * size * 8 // shape.bits
            if group >= shape.in_features or group % columns == 0:
                return count, size
            count //= 2
    return None


def reasoned(shape: Shape, tokens: int, multiprocessors: int) -> DecodeConfig:
    """A config by counting instructions and bytes, for shapes that were never measured.

    Sums over `x` are made once for a program's rows, so rows should be many, as long as enough
    programs are left to fill the card. A thread's share of `x` stays in registers, so more tokens
    leave room for fewer words. Steps should cover the columns with little left over.
    """
    words = 4 if tokens <= 2 else 2
    columns = WARP * words * WORD_BYTES * 8 // shape.bits

    def covered(warps: int) -> int:
        step = columns * warps
        return -(-shape.in_features // step) * step

    most = (4, 2, 1) if tokens == 1 else (2, 1)
    warps = min(most, key=lambda n: (covered(n), -n))
    enough = _WARPS_PER_MULTIPROCESSOR * multiprocessors
    fills = (r for r in (8, 4) if -(-shape.out_features // r) * warps >= enough)
    rows = next(fills, 2)
    if tokens > 2:
        rows = min(rows, 4)
    return DecodeConfig(rows, warps, words, prefetch=covered(warps) > columns * warps)


def default_config(
    shape: Shape, tokens: int, capability: tuple[int, int], multiprocessors: int
) -> Chosen:
    """The measured config of this very shape and card if there is one, else the reasoned one."""
    bucket = 1 << (tokens - 1).bit_length()
    if shape.bits == 4:
        key = (shape.out_features, shape.in_features, bucket)
        measured = MEASURED.get(capability, {}).get(key)
        if measured is not None:
            card = f"compute capability {capability[0]}.{capability[1]}"
            return Chosen(measured, f"measured on {card}")
    return Chosen(reasoned(shape, bucket, multiprocessors), "reasoned, not measured")
