"""Attention of one new token for each sequence to a cache: split over the keys, then joined.

The keys of a head that queries share are read once for all of them, and never where the mask says
that there are none (flash-decoding: Dao et al. 2023; grouped queries: Ainslie et al. 2023). PyTorch
would repeat keys and values for every query head first, because it is given a mask.

Knows Triton and tensors; imports on a machine without CUDA, for the interpreter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are Triton's, and typed by it.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import let_go, options, wait

_BLOCK = 64
"""Keys that a program holds at once."""
_MAX_SPLITS = 64
"""Programs for a head at most; with more keys than that times `_BLOCK` they go round again."""
_LEAST_ROWS = 16
"""Rows of a tensor core's product: so many queries are multiplied, though fewer are there."""


@triton.jit(do_not_specialize=["length", "mask_batch"])
def _split_kernel(
    q_ptr,  # [batch, heads, 1, dim], contiguous
    k_ptr,  # [batch, key heads, length, dim], contiguous
    v_ptr,
    mask_ptr,  # uint8 [batch or 1, 1, 1, length], contiguous
    sums_ptr,  # float32 [batch, heads, splits, dim], written
    logs_ptr,  # float32 [batch, heads, splits], written: log of the sum of exponentials
    scale,
    length,
    mask_batch,  # stride
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # queries that share a key head
    ROWS: tl.constexpr,  # at least GROUP
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    wait(OVERLAP)
    batch = tl.program_id(0) // KEY_HEADS
    split, splits = tl.program_id(1), tl.num_programs(1)
    row, column, key = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
    head = tl.program_id(0) * GROUP + row  # of all batches
    q = tl.load(q_ptr + head[:, None] * DIM + column[None, :], mask=row[:, None] < GROUP, other=0.0)
    first = tl.program_id(0).to(tl.int64) * length
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for turn in range(ROUNDS):
        at = (split * ROUNDS + turn) * BLOCK + key
        seen = tl.load(mask_ptr + batch * mask_batch + at, mask=at < length, other=0) != 0
        entry = (first + at)[:, None] * DIM + column[None, :]
        k = tl.load(k_ptr + entry, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)).to(tl.float32) * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        now = tl.maximum(most, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - now[:, None]), 0.0)
        v = tl.load(v_ptr + entry, mask=seen[:, None], other=0.0)
        fade = tl.exp(most - now)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v).to(tl.float32)
        total = total * fade + tl.sum(weights, 1)
        most = now
    part = head * splits + split
    live = row < GROUP
    # Where a part has no key its sum is 0, and its logarithm says that it counts for nothing.
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(sums_ptr + part[:, None] * DIM + column[None, :], sums, mask=live[:, None])
    tl.store(logs_ptr + part, tl.where(total > 0, most + tl.log(total), -1e30), mask=live)


@triton.jit
def _join_kernel(
    sums_ptr,
    logs_ptr,
    y_ptr,  # [batch, 1, heads, dim], contiguous
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two, at least SPLITS
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    wait(OVERLAP)
    head = tl.program_id(0)
    split, column = tl.arange(0, PADDED), tl.arange(0, DIM)
    there = split < SPLITS
    logs = tl.load(logs_ptr + head * SPLITS + split, mask=there, other=-1e30)
    weights = tl.exp(logs - tl.max(logs, 0))
    at = (head * SPLITS + split)[:, None] * DIM + column[None, :]
    sums = tl.load(sums_ptr + at, mask=there[:, None], other=0.0)
    y = tl.sum(sums * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(y_ptr + head * DIM + column, y.to(y_ptr.dtype.element_ty))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query for each sequence and head, `[batch, 1, heads, dim]`.

    q: float16 or bfloat16 `[batch, heads, 1, dim]`, dim a power of two from 16 to 256
    k, v: `[batch, key heads, length, dim]`, contiguous; key heads divide heads
    mask: bool `[batch or 1, 1, 1, length]`, true at keys that are there; one at least in each

    Sums are float32. Keys and values that the mask leaves out are not read, whatever is there.
    """
    batch, heads, _, dim = q.shape
    key_heads, length = k.shape[1:3]
    blocks = -(-length // _BLOCK)
    rounds = -(-blocks // _MAX_SPLITS)
    splits = -(-blocks // rounds)
    group = heads // key_heads
    sums = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    logs = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    y = torch.empty(batch, 1, heads, dim, dtype=q.dtype, device=q.device)
    _split_kernel[(batch * key_heads, splits)](
        q.contiguous(),
        k,
        v,
        mask.contiguous().view(torch.uint8),
        sums,
        logs,
        scale,
        length,
        0 if mask.shape[0] == 1 else length,
        KEY_HEADS=key_heads,
        GROUP=group,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        BLOCK=_BLOCK,
        ROUNDS=rounds,
        num_warps=4,
        **options(),
    )
    _join_kernel[(batch * heads,)](
        sums,
        logs,
        y,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        DIM=dim,
        num_warps=1 if dim <= 64 else 2,
        **options(),
    )
    return y
