"""Which code multiplies by a separated weight, and why.

Knows what this machine has and what a call asks for: device, dtype, tokens, the lattice's shape.
Every choice has its reason in words. Doesn't know layers; a weight held dense never comes here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lattice import Lattice, dequantize
from ..precision import dtype_name
from . import int4pack
from .configs import MAX_TOKENS, Shape, word_layout

Name = Literal["triton-decode", "triton-compose", "int4pack", "dequantize"]

WORTH_MEASURING = 1 << 18
"""Weights of a matrix below which the CPU's candidates are not tried: each takes microseconds."""
FEW_TOKENS = 16
"""Tokens up to which PyTorch's INT4 product is taken: the streams are gathered beside it, which
costs tokens * k * out; beyond, they are added to a dense weight once."""
_REPEATS = 3
"""Timings of a candidate, of which the least counts: the rest is other processes' time."""


class Backend(NamedTuple):
    """What computes a product, and why it and no other.

    triton-decode: one fused launch; triton-compose: the dense weight by one launch, then a matrix
    product; int4pack: PyTorch's INT4 product and gathers for the streams; dequantize: the dense
    weight by PyTorch's operators, then a matrix product.
    """

    name: Name
    reason: str


def choose(lattice: Lattice, dtype: torch.dtype, tokens: int) -> Backend:
    """The backend for `tokens` inputs of `dtype` on the lattice's device; on a CPU it may measure.

    Deterministic on a GPU. On a CPU candidates are timed once for a shape, dtype and number of
    tokens (rounded up to a power of two), and the outcome stays for the process.
    """
    device, shape = lattice.packed.device, Shape.of(lattice)
    if device.type == "cuda":
        return _on_cuda(shape, dtype, tokens, device)
    if device.type == "cpu":
        return _on_cpu(lattice, shape, dtype, tokens)
    return Backend("dequantize", f"no kernel is made for {device.type}")


@functools.cache
def composer(shape: Shape, device: torch.device) -> Backend:
    """What makes the dense weight: `triton-compose` or `dequantize`, and why."""
    if device.type != "cuda":
        return Backend("dequantize", f"no kernel is made for {device.type}")
    no_triton = why_no_triton(device)
    if no_triton is not None:
        return Backend("dequantize", no_triton)
    if word_layout(shape, 1) is None:
        return Backend("dequantize", f"groups of {shape.group_size} don't consist of whole bytes")
    return Backend("triton-compose", "one launch writes it")


@functools.cache
def _on_cuda(shape: Shape, dtype: torch.dtype, tokens: int, device: torch.device) -> Backend:
    no_triton = why_no_triton(device)
    if no_triton is None:
        if tokens > MAX_TOKENS:
            what = f"{tokens} tokens are more than the decode kernel's {MAX_TOKENS}"
        elif dtype not in (torch.float16, torch.bfloat16):
            what = f"the decode kernel is for float16 and bfloat16, not {dtype_name(dtype)}"
        elif word_layout(shape, 1) is None:
            what = "the decode kernel needs groups of whole bytes"
        else:
            return Backend(
                "triton-decode", f"{tokens} of at most {MAX_TOKENS} tokens in {dtype_name(dtype)}"
            )
        made_by = composer(shape, device)
        return Backend(made_by.name, f"{what}; the dense weight: {made_by.reason}")
    if tokens > FEW_TOKENS:
        return Backend("dequantize", f"{no_triton}; {tokens} tokens are worth a dense product")
    refusal = int4pack.why_not(shape, device, dtype)
    if refusal is None:
        return Backend("int4pack", no_triton)
    return Backend("dequantize", f"{no_triton}; {refusal}")


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """Why Triton can't be used on a CUDA device, or None if it can: a small product is tried."""
    try:
        from . import probe  # noqa: PLC0415 - imports Triton
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return probe.failure(device)


# --- on a CPU ---------------------------------------------------------------------------------

_timed: dict[tuple[Shape, torch.dtype, int, int], Backend] = {}


def _on_cpu(lattice: Lattice, shape: Shape, dtype: torch.dtype, tokens: int) -> Backend:
    refusal = int4pack.why_not(shape, lattice.packed.device, dtype)
    if refusal is not None:
        return Backend("dequantize", refusal)
    if tokens > FEW_TOKENS:
        return Backend("dequantize", f"{tokens} tokens are worth a dense product")
    if shape.out_features * shape.in_features < WORTH_MEASURING:
        return Backend("dequantize", f"fewer than {WORTH_MEASURING} weights: nothing to gain")
    bucket = 1 << (tokens - 1).bit_length()
    key = shape, dtype, bucket, torch.get_num_threads()
    if key not in _timed:
        _timed[key] = _fastest_on_cpu(lattice, dtype, bucket)
    return _timed[key]


def _fastest_on_cpu(lattice: Lattice, dtype: torch.dtype, tokens: int) -> Backend:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, lattice.in_features, generator=generator).to(dtype)
    candidates: dict[Name, Callable[[], Tensor]] = {
        "int4pack": lambda: int4pack.multiply(x, lattice),
        "dequantize": lambda: F.linear(x, dequantize(lattice, dtype)),
    }
    took = {name: _least_ms(call) for name, call in candidates.items()}
    name = min(took, key=took.__getitem__)
    timings = ", ".join(f"{other} {ms:.2f} ms" for other, ms in took.items())
    return Backend(
        name, f"measured at {tokens} tokens, {torch.get_num_threads()} threads: {timings}"
    )


def _least_ms(call: Callable[[], Tensor]) -> float:
    call()  # repacks, and fills the caches
    took = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return 1e3 * min(took)
