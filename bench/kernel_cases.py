"""Cases for the kernels on a GPU: shapes, random operands and float64 references.

Knows how to make a layer's tensors of a given shape without a model.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from libortho import stream
from libortho.kernels.configs import DecodeConfig, Shape, word_layout
from libortho.lattice import PER_ROW, Lattice, groups_per_row, unpack
from libortho.linear import OrthoLinear

Stream = tuple[Tensor, Tensor]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPES = {
    "8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
    },
    "3B": {
        "q, o": (3072, 3072),
        "k, v": (1024, 3072),
        "gate, up": (8192, 3072),
        "down": (3072, 8192),
    },
    "fused": {
        "8B q, k, v": (6144, 4096),
        "8B gate and up": (28672, 4096),
        "3B q, k, v": (5120, 3072),
        "3B gate and up": (16384, 3072),
    },
}
"""(out_features, in_features); fused ones are what `libortho.fusion` lays together."""
DENSITY = 0.005
"""Share of a row's entries in each of the two streams."""


@dataclass(frozen=True)
class Case:
    """A product, or with `config` None a dense weight; slots are entries of a row.

    overlap: whether its launch overlaps with others (`libortho.kernels.overlap`)
    paired: whether a stream's values lie beside their columns, as in a fused model
    """

    out_features: int
    in_features: int
    tokens: int = 1
    bits: int = 4
    group_size: int = 128
    residual_slots: int = 0
    private_slots: int = 0
    dtype: str = "float16"
    has_bias: bool = False
    config: DecodeConfig | None = None
    overlap: bool = False
    paired: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(self.out_features, self.in_features, self.bits, self.group_size)

    @property
    def bytes_read(self) -> int:
        """The fewest bytes that a decode launch reads: base, streams and x, each once."""
        rows = self.out_features
        base = rows * -(-self.in_features * self.bits // 8)
        base += rows * groups_per_row(self.in_features, self.group_size) * 4
        entries = rows * (self.residual_slots + self.private_slots) * 4
        return base + entries + self.tokens * self.in_features * 2

    def with_streams(self, density: float) -> Case:
        slots = stream.slots_per_row(self.in_features, density)
        return dataclasses.replace(self, residual_slots=slots, private_slots=slots)


class Operands(NamedTuple):
    """The arguments of `decode` but for the config, with `x` in front as there."""

    x: Tensor
    lattice: Lattice
    residual: Stream
    private: Stream
    alpha: Tensor
    bias: Tensor | None


def make_operands(case: Case, seed: int, *, alpha: float = 1.0, device: str = "cuda") -> Operands:
    """Random tensors of a case's shapes, drawn on the device; weights have a size of about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    on = {"device": device, "generator": generator}
    rows, columns = case.out_features, case.in_features
    half = 2 ** (case.bits - 1)
    groups = groups_per_row(columns, case.group_size)
    packed = torch.randint(0, 256, (rows, -(-columns * case.bits // 8)), dtype=torch.uint8, **on)
    scales = (torch.rand(rows, groups, **on) + 0.5).mul_(2 / half).half()
    zeros = torch.randn(rows, groups, **on).mul_(0.2).half()
    lattice = Lattice(packed, scales, zeros, case.bits, case.group_size, columns)

    def entries(slots: int) -> Stream:
        # One column in each of `slots` equal parts of the row: random, ascending, distinct.
        width = max(1, columns // max(1, slots))
        within = torch.randint(0, width, (slots, rows), **on)
        at = within + width * torch.arange(slots, device=device)[:, None]
        both = at.to(torch.uint16), torch.randn(slots, rows, **on).half()
        return stream.paired(*both) if case.paired else both

    dtype = DTYPES[case.dtype]
    return Operands(
        torch.randn(case.tokens, columns, **on).to(dtype),
        lattice,
        entries(case.residual_slots),
        entries(case.private_slots),
        torch.tensor(alpha, device=device),
        torch.randn(rows, **on).to(dtype) if case.has_bias else None,
    )


def random_layer(case: Case, seed: int, *, device: str = "cuda") -> OrthoLinear:
    """An `OrthoLinear` of a case's shape with random contents."""
    _, lattice, residual, private, alpha, bias = make_operands(case, seed, device=device)
    layer = OrthoLinear(
        case.in_features,
        case.out_features,
        bits=case.bits,
        group_size=case.group_size,
        bias=case.has_bias,
        device="meta",
    )
    layer.packed, layer.scales, layer.zeros = lattice.packed, lattice.scales, lattice.zeros
    layer.residual_columns, layer.residual_values = residual
    layer.private_columns, layer.private_values = private
    layer.alpha = alpha
    if bias is not None:
        layer.bias = bias
    return layer


def reference_weight(lattice: Lattice, residual: Stream, private: Stream, alpha: Tensor) -> Tensor:
    """base + residual + alpha * private, float64 `[out, in]`."""
    q = unpack(lattice.packed, lattice.bits, lattice.in_features).double()
    size = lattice.in_features if lattice.group_size == PER_ROW else lattice.group_size
    group = torch.arange(lattice.in_features, device=q.device) // size
    scale, zero = lattice.scales.double()[:, group], lattice.zeros.double()[:, group]
    weight = scale * (q - 2 ** (lattice.bits - 1)) + zero
    stream.scatter_add(weight, residual[0], residual[1].double())
    if float(alpha):
        stream.scatter_add(weight, private[0], private[1].double(), float(alpha))
    return weight


def relative_error(y: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """||y - expected|| over ||expected||, or over `scale` if that is more; inf for NaN."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y.double() - expected).norm()) / max(float(expected.norm()), scale)


def random_cases(count: int, seed: int) -> list[Case]:
    """Products of odd and even shapes, all formats, and configs that fit them."""
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        columns = rng.choice([1, 31, 64, 96, 129, 256, 640, 1000, 1024, 2047, 2048, 4096, 4100])
        tokens = rng.choice([1, 1, 2, 3, 4, 5, 8])
        bits = rng.choice([4, 4, 4, 8])
        shape = Shape(
            rng.choice([1, 7, 64, 257, 1024]), columns, bits, rng.choice([32, 64, 128, -1])
        )
        config = DecodeConfig(
            rows=rng.choice([1, 2, 4, 8, 16] if tokens <= 2 else [1, 2, 4]),
            warps=rng.choice([1, 2, 4]),
            words=rng.choice([4, 2, 1] if tokens <= 2 else [2, 1]),
            prefetch=rng.random() < 0.5,
        )
        if word_layout(shape, config.words) is None:
            continue
        cases.append(
            Case(
                shape.out_features,
                columns,
                tokens,
                bits,
                shape.group_size,
                residual_slots=rng.choice([0, 1, columns // 200, columns // 3]),
                private_slots=rng.choice([0, 1, columns // 100, columns // 3]),
                dtype=rng.choice(["float16", "bfloat16"]),
                has_bias=rng.random() < 0.3,
                paired=rng.random() < 0.5,
                config=config,
            )
        )
    return cases
