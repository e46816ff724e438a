"""Building Triton kernels in other processes, before they are needed.

Compiling takes seconds a kernel and a GPU's time is dear. The processes never touch the card, which
would disturb what is measured on it: they are told which one to build for, and leave their outcome
in Triton's cache, where the process that measures finds it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.kernel_cases import DTYPES, Case, Operands, Stream
from libortho import stream
from libortho.kernels.compose import _compose_kernel, compose_arguments
from libortho.kernels.decode import _decode_kernel, kernel_arguments
from libortho.kernels.overlap import OVERLAPPED
from libortho.lattice import Lattice, groups_per_row


class _UnseenCard:
    """What Triton asks of a driver before a launch, for a card that is somewhere else."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def unreal_operands(case: Case) -> Operands:
    """A case's tensors without memory: shapes and dtypes only."""

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def entries(slots: int) -> Stream:
        both = empty(slots, rows, dtype=torch.uint16), empty(slots, rows)
        return stream.paired(*both) if case.paired else both

    rows, columns, dtype = case.out_features, case.in_features, DTYPES[case.dtype]
    groups = groups_per_row(columns, case.group_size)
    packed = empty(rows, -(-columns * case.bits // 8), dtype=torch.uint8)
    scales, zeros = empty(rows, groups), empty(rows, groups)
    return Operands(
        empty(case.tokens, columns, dtype=dtype),
        Lattice(packed, scales, zeros, case.bits, case.group_size, columns),
        entries(case.residual_slots),
        entries(case.private_slots),
        empty(dtype=torch.float32),
        empty(rows, dtype=dtype) if case.has_bias else None,
    )


def build(case: Case) -> Any:
    """A case's kernel, compiled for the active driver's card and cached, not launched."""
    operands, dtype = unreal_operands(case), DTYPES[case.dtype]
    if case.config is None:
        shape = (case.out_features, case.in_features)
        weight = torch.empty(shape, dtype=dtype, device="meta")
        grid, arguments = compose_arguments(*operands[1:5], weight)
        return _compose_kernel.warmup(grid=grid, **arguments)
    y = torch.empty((case.tokens, case.out_features), dtype=dtype, device="meta")
    grid, arguments = kernel_arguments(*operands, y, case.config)
    overlapping = OVERLAPPED if case.overlap else {}
    return _decode_kernel.warmup(grid=grid, **arguments | overlapping)


def aim_at(capability: int) -> None:
    """Make Triton build for a compute capability (90 for 9.0) in this process, card or no card."""
    triton.runtime.driver.set_active(_UnseenCard(capability))


def _build_quietly(case: Case) -> str | None:
    try:
        build(case)
    except Exception as error:  # the process that measures decides what to make of it
        return f"{type(error).__name__}: {error}"[:500]
    return None


class Compiler:
    """A pool of processes that build kernels in the order in which they are submitted."""

    def __init__(self, processes: int, capability: int) -> None:
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=aim_at,
            initargs=(capability,),
        )
        self._futures: dict[Case, Future[str | None]] = {}

    def submit(self, cases: Iterable[Case]) -> None:
        for case in cases:
            if case not in self._futures:
                self._futures[case] = self._pool.submit(_build_quietly, case)

    def problem(self, case: Case, timeout_s: float) -> str | None:
        """Wait for a case's kernel; None once it is built, else what went wrong."""
        self.submit([case])
        try:
            return self._futures[case].result(timeout=max(0.1, timeout_s))
        except TimeoutError:
            return "not built in time"

    def counts(self) -> dict[str, int]:
        done = sum(f.done() and not f.cancelled() for f in self._futures.values())
        return {"submitted": len(self._futures), "done": done}

    def close(self) -> None:
        """Drop what is not begun yet."""
        self._pool.shutdown(wait=False, cancel_futures=True)
