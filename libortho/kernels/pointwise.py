"""What a decoder does to few tokens between its products, in one launch each.

Root mean square norm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), the gate of a
SwiGLU (Shazeer 2020), and the write of a new key and value into a cache. PyTorch takes 5 to 10
launches for each of the first two, and at one token a launch costs more than what it does. Rounds
where transformers' Llama rounds.

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

_GATE_BLOCK = 1024
"""Columns of a gate that a program makes."""


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    stride_x,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait(OVERLAP)
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    y = weight * (x * scale).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    q_ptr,  # [batch, heads, tokens, dim], the last one contiguous
    k_ptr,
    cos_ptr,  # [batch or 1, tokens, dim], contiguous
    sin_ptr,
    q_out_ptr,  # [batch, heads, tokens, dim], contiguous
    k_out_ptr,
    q_batch,  # strides
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    cos_batch,
    tokens,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    wait(OVERLAP)
    batch, token, head = tl.program_id(0) // tokens, tl.program_id(0) % tokens, tl.program_id(1)
    column = tl.arange(0, DIM)
    # The other half's column, and the sign that it comes with.
    other = (column + DIM // 2) % DIM
    sign = tl.where(column < DIM // 2, -1.0, 1.0)
    at = batch * cos_batch + token * DIM + column
    cos = tl.load(cos_ptr + at).to(tl.float32)
    sin = tl.load(sin_ptr + at).to(tl.float32)
    if head < HEADS:
        from_ptr = q_ptr + batch * q_batch + head * q_head + token * q_token
        to_ptr = q_out_ptr + ((batch * HEADS + head) * tokens + token) * DIM
    else:
        head -= HEADS
        from_ptr = k_ptr + batch * k_batch + head * k_head + token * k_token
        to_ptr = k_out_ptr + ((batch * KEY_HEADS + head) * tokens + token) * DIM
    kind = q_out_ptr.dtype.element_ty
    straight = (tl.load(from_ptr + column).to(tl.float32) * cos).to(kind)
    turned = (sign * tl.load(from_ptr + other).to(tl.float32) * sin).to(kind)
    tl.store(to_ptr + column, (straight.to(tl.float32) + turned.to(tl.float32)).to(kind))


@triton.jit
def _gate_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    stride_gate,
    stride_up,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, (opened * up).to(kind), mask=mask)


@triton.jit(do_not_specialize=["length"])
def _write_kernel(
    k_ptr,  # [batch, heads, 1, dim], the last one contiguous
    v_ptr,
    k_cache_ptr,  # [batch, heads, length, dim], contiguous
    v_cache_ptr,
    position_ptr,  # int64, one element
    k_batch,  # strides
    k_head,
    v_batch,
    v_head,
    length,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least DIM
    OVERLAP: tl.constexpr,
):
    let_go(OVERLAP)
    wait(OVERLAP)
    batch, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    mask = column < DIM
    row = (batch * heads + head).to(tl.int64) * length + tl.load(position_ptr)
    k = tl.load(k_ptr + batch * k_batch + head * k_head + column, mask=mask)
    v = tl.load(v_ptr + batch * v_batch + head * v_head + column, mask=mask)
    tl.store(k_cache_ptr + row * DIM + column, k, mask=mask)
    tl.store(v_cache_ptr + row * DIM + column, v, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x**2) + eps)` over the last dimension of `x` `[..., width]`."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(rows.shape[1])
    _rms_norm_kernel[(rows.shape[0],)](
        rows,
        weight,
        y,
        rows.stride(0),
        eps,
        WIDTH=rows.shape[1],
        BLOCK=block,
        num_warps=max(1, min(8, block // 512)),
        **options(),
    )
    return y.view(x.shape)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries `[batch, heads, tokens, dim]` and keys (of fewer heads, perhaps).

    cos, sin: `[batch or 1, tokens, dim]`; dim is a power of two
    """
    batch, heads, tokens, dim = q.shape
    if q.stride(3) != 1 or k.stride(3) != 1:
        q, k = q.contiguous(), k.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    rotated_q, rotated_k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    _rotate_kernel[(batch * tokens, heads + k.shape[1])](
        q,
        k,
        cos,
        sin,
        rotated_q,
        rotated_k,
        *q.stride()[:3],
        *k.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0),
        tokens,
        HEADS=heads,
        KEY_HEADS=k.shape[1],
        DIM=dim,
        num_warps=1,
        **options(),
    )
    return rotated_q, rotated_k


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` for two tensors `[..., width]`, such as parts of one."""
    width = gate.shape[-1]
    rows, others = gate.reshape(-1, width), up.reshape(-1, width)
    y = torch.empty(rows.shape, dtype=gate.dtype, device=gate.device)
    _gate_kernel[(rows.shape[0], -(-width // _GATE_BLOCK))](
        rows,
        others,
        y,
        rows.stride(0),
        others.stride(0),
        WIDTH=width,
        BLOCK=_GATE_BLOCK,
        num_warps=4,
        **options(),
    )
    return y.view(gate.shape)


def write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    """Put a new key and value `[batch, heads, 1, dim]` into a cache at `position`, in place.

    keys, values: `[batch, heads, length, dim]`, contiguous, in the dtype of what is put in
    position: int64, one element, below length; read by the kernel
    """
    if key.stride(3) != 1 or value.stride(3) != 1:
        key, value = key.contiguous(), value.contiguous()
    batch, heads, length, dim = keys.shape
    _write_kernel[(batch, heads)](
        key,
        value,
        keys,
        values,
        position,
        *key.stride()[:2],
        *value.stride()[:2],
        length,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=1,
        **options(),
    )
