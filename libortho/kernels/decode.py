"""The decode kernel: `x @ (base + residual + alpha * private).T + bias` in one launch, few tokens.

Knows Triton and the layouts of `lattice` and `stream`; imports on a machine without CUDA, for the
interpreter. Doesn't know layers, nor which kernel is right for a call (`dispatch`).

Decoding is bound by reading the weights once, so everything else has to fit under that time. A
program owns a few output rows and all of their columns. No partial result leaves it, hence no
atomics: the same inputs give the same bits, whatever else runs.

A thread reads 16 bytes of a row at once and takes 4-bit integers as floats f = 2**11 + q or
2**7 + q (`fields`). What is too much comes off the sum, once for a thread's columns and not once
for each weight:

    sum (q - 8) * x = sum f * x  -  (2**11 + 8) * sum_odd x  -  (2**7 + 8) * sum_even x

Products and sums are float32; what the offset loses of it, a factor of 450, leaves 5e-5 at worst,
a tenth of what rounding the result to float16 costs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are Triton's, and typed by it.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lattice import PER_ROW, Lattice
from ..stream import is_paired
from .configs import WARP, DecodeConfig, Shape, word_layout
from .fields import UNIT, tag, tagged
from .overlap import let_go, options, wait

MAX_BLOCKS = 8
"""Entries of a stream that a thread fetches before it multiplies; longer streams go round again."""


@triton.jit
def _read_words(words_ptr, row, word, WIDTH: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr):
    at = tl.max_contiguous(row.to(tl.int64) * WIDTH + word, [1, 1, 1, WORDS, 1])
    mask = (row < OUT) & (word < WIDTH)
    return tl.load(words_ptr + at, mask=mask, other=0, eviction_policy="evict_first").to(tl.int32)


@triton.jit
def _read_entries(
    columns_ptr,
    values_ptr,
    entry,  # of the program's ROWS * SLOTS
    first,  # its first row
    slots,  # of which any are heard
    OUT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Columns int32 and values of a program's entries; 0 where there is none."""
    if PAIRED:  # a program's entries lie together, column and value in the halves of a word
        at = first * SLOTS + entry
        mask = entry < ROWS * slots
        if OUT % ROWS != 0:
            mask &= at < OUT * SLOTS
        pairs = tl.load(columns_ptr.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
        columns = pairs & 0xFFFF
        values = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        row = first + entry % ROWS
        at = entry // ROWS * OUT + row
        mask = (entry // ROWS < slots) & (row < OUT)
        columns = tl.load(columns_ptr + at, mask=mask, other=0).to(tl.int32)
        values = tl.load(values_ptr + at, mask=mask, other=0.0)
    return columns, values


@triton.jit
def _read_blocks(
    columns_ptr,
    values_ptr,
    first,
    slots,
    OUT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """A stream's first entries, in blocks of one for each thread: tuples, which are not joined."""
    columns = ()
    values = ()
    for block in tl.static_range(BLOCKS):
        entry = block * CHUNKS + tl.arange(0, CHUNKS)
        c, v = _read_entries(columns_ptr, values_ptr, entry, first, slots, OUT, SLOTS, ROWS, PAIRED)
        # Triton knows no stars.
        columns = columns + (c,)  # type: ignore[assignment]  # noqa: RUF005
        values = values + (v,)  # type: ignore[assignment]  # noqa: RUF005
    return columns, values


@triton.jit
def _products(x_ptr, stride_x, columns, values, token, tokens):
    """Products of entries with x: float32 [entries, tokens]."""
    at = token[None, :] * stride_x + columns[:, None]
    x = tl.load(x_ptr + at, mask=(token < tokens)[None, :], other=0.0)
    return x.to(tl.float32) * values.to(tl.float32)[:, None]


@triton.jit
def _per_row(products, entry, SLOTS: tl.constexpr, ROWS: tl.constexpr, PAIRED: tl.constexpr):
    """Products [entries, tokens] where their rows are: [entries, tokens, rows], 0 elsewhere."""
    row = entry // SLOTS if PAIRED else entry % ROWS
    its_row = tl.arange(0, ROWS)[None, None, :]
    return tl.where(row[:, None, None] == its_row, products[:, :, None], 0.0)


@triton.jit
def _step_sums(
    x_ptr,
    stride_x,
    scales_ptr,
    zeros_ptr,
    words,
    step,
    unit,
    row,
    token,
    token_mask,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """The base's products with x over a step's columns: float32 [chunks, tokens, rows, 1, 1]."""
    VALUES: tl.constexpr = 8 * BYTES // BITS
    GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
    chunk = (step * CHUNKS + tl.arange(0, CHUNKS))[:, None, None, None, None]
    value = tl.arange(0, VALUES)[None, None, None, None, :]
    even = value % 2 == 0
    word = chunk * WORDS + tl.arange(0, WORDS)[None, None, None, :, None]
    column = word * VALUES + value
    x = tl.load(x_ptr + (token * stride_x + column), mask=token_mask & (column < IN), other=0.0).to(
        tl.float32
    )
    group = chunk * (WORDS * VALUES) // GROUP
    at_group = tl.max_contiguous(row * GROUPS + group, [1, 1, 1, 1, 1])
    group_mask = (row < OUT) & (group < GROUPS)
    scale = tl.load(scales_ptr + at_group, mask=group_mask, other=0.0).to(tl.float32)
    zero = tl.load(zeros_ptr + at_group, mask=group_mask, other=0.0).to(tl.float32)

    f = tagged(words, value, unit, BITS)
    if BITS == 8:  # its tags are too large to be left for later
        f -= tag(value, BITS)
    product = tl.sum(tl.sum(f * x, 4, keep_dims=True), 3, keep_dims=True)
    # -0.0 is what adds nothing: the compiler drops it, as it may not drop 0.0.
    x_even = tl.sum(tl.sum(tl.where(even, x, -0.0), 4, keep_dims=True), 3, keep_dims=True)
    x_odd = tl.sum(tl.sum(tl.where(even, -0.0, x), 4, keep_dims=True), 3, keep_dims=True)
    if BITS == 4:
        product -= (128.0 + 8.0) * x_even + (2048.0 + 8.0) * x_odd  # the tags
    return product * scale + (x_even + x_odd) * zero


@triton.jit
def _steps(
    first,
    last,
    accumulator,
    ahead,  # the first step's words, if they were read already
    words_ptr,
    scales_ptr,
    zeros_ptr,
    x_ptr,
    stride_x,
    unit,
    row,
    token,
    token_mask,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    BYTES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Add steps `first` to `last` to the accumulator."""
    COLUMNS: tl.constexpr = CHUNKS * WORDS * 8 * BYTES // BITS
    WIDTH: tl.constexpr = (IN * BITS + 7) // 8 // BYTES
    word = tl.arange(0, CHUNKS)[:, None, None, None, None] * WORDS
    word += tl.arange(0, WORDS)[None, None, None, :, None]
    for step in range(first, last):
        w = ahead
        if PREFETCH:
            next_word = word + (step + 1) * CHUNKS * WORDS
            ahead = _read_words(words_ptr, row, next_word, WIDTH, OUT, WORDS)
        elif IN > COLUMNS:  # more steps than one
            w = _read_words(words_ptr, row, word + step * CHUNKS * WORDS, WIDTH, OUT, WORDS)
        accumulator += _step_sums(
            x_ptr,
            stride_x,
            scales_ptr,
            zeros_ptr,
            w,
            step,
            unit,
            row,
            token,
            token_mask,
            IN,
            OUT,
            BITS,
            GROUP,
            CHUNKS,
            WORDS,
            BYTES,
        )
    return accumulator


@triton.jit
def _stream_sums(
    sums,  # float32 [chunks, tokens, rows]
    x_ptr,
    stride_x,
    columns_ptr,
    values_ptr,
    columns,  # the first blocks', read already
    values,
    first,
    slots,  # of which any are heard
    factor,
    tokens,
    OUT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Add a stream's products with x."""
    token = tl.arange(0, TOKENS)
    thread = tl.arange(0, CHUNKS)
    for block in tl.static_range(BLOCKS):
        products = _products(x_ptr, stride_x, columns[block], values[block], token, tokens)
        sums += _per_row(factor * products, block * CHUNKS + thread, SLOTS, ROWS, PAIRED)
    for start in range(BLOCKS * CHUNKS, ROWS * SLOTS, CHUNKS):
        entry = start + thread
        c, v = _read_entries(columns_ptr, values_ptr, entry, first, slots, OUT, SLOTS, ROWS, PAIRED)
        products = _products(x_ptr, stride_x, c, v, token, tokens)
        sums += _per_row(factor * products, entry, SLOTS, ROWS, PAIRED)
    return sums


@triton.jit
def _both_sums(
    sums,
    x_ptr,
    stride_x,
    columns_r,
    values_r,
    columns_p,
    values_p,
    alpha,
    tokens,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Add two streams' products whose entries are of the same rows, and were all read."""
    token = tl.arange(0, TOKENS)
    for block in tl.static_range(BLOCKS):
        products = _products(x_ptr, stride_x, columns_r[block], values_r[block], token, tokens)
        products += alpha * _products(
            x_ptr, stride_x, columns_p[block], values_p[block], token, tokens
        )
        entry = block * CHUNKS + tl.arange(0, CHUNKS)
        sums += _per_row(products, entry, SLOTS, ROWS, PAIRED)
    return sums


@triton.jit(do_not_specialize=["tokens", "unit"])
def _decode_kernel(
    x_ptr,  # [tokens, in], columns contiguous
    packed_ptr,  # uint8 [out, ceil(in * bits / 8)]
    scales_ptr,  # float16 [out, groups]
    zeros_ptr,
    residual_columns_ptr,  # uint16 [residual slots, out]
    residual_values_ptr,
    private_columns_ptr,  # uint16 [private slots, out]
    private_values_ptr,
    alpha_ptr,  # float32, one element
    bias_ptr,  # [out]
    y_ptr,  # [tokens, out]
    stride_x,
    tokens,
    unit,  # fields.UNIT
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    RESIDUAL: tl.constexpr,  # slots
    PRIVATE: tl.constexpr,
    RESIDUAL_BLOCKS: tl.constexpr,  # entries that a thread reads at once
    PRIVATE_BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,  # at least `tokens`, a power of two
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,  # threads of a program: each has one chunk of the columns
    WORDS: tl.constexpr,
    BYTES: tl.constexpr,  # of a word
    PREFETCH: tl.constexpr,
    PAIRED: tl.constexpr,  # whether a stream's value lies beside its column (stream.paired)
    OVERLAP: tl.constexpr,
):
    CHUNK: tl.constexpr = WORDS * 8 * BYTES // BITS  # columns
    STEPS: tl.constexpr = (IN + CHUNKS * CHUNK - 1) // (CHUNKS * CHUNK)
    WIDTH: tl.constexpr = (IN * BITS + 7) // 8 // BYTES  # words of a row
    # Whether one loop does for both streams.
    ALIKE: tl.constexpr = RESIDUAL == PRIVATE and ROWS * RESIDUAL <= RESIDUAL_BLOCKS * CHUNKS

    let_go(OVERLAP)
    first = tl.program_id(0) * ROWS
    alpha = tl.load(alpha_ptr)

    # Dimensions of the base: chunk, token, row, word, value. Loads that lie along the last two and
    # threads that lie along the first are what makes a thread's chunk its own in all tensors, so
    # that nothing but the final sum crosses threads.
    row = (first + tl.arange(0, ROWS))[None, None, :, None, None]
    token = tl.arange(0, TOKENS)[None, :, None, None, None]
    token_mask = token < tokens
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) if BYTES == 4 else packed_ptr
    accumulator = tl.zeros([CHUNKS, TOKENS, ROWS, 1, 1], tl.float32)
    word = tl.arange(0, CHUNKS)[:, None, None, None, None] * WORDS
    word += tl.arange(0, WORDS)[None, None, None, :, None]
    ahead = _read_words(words_ptr, row, word, WIDTH, OUT, WORDS)
    if PREFETCH:
        second = _read_words(words_ptr, row, word + CHUNKS * WORDS, WIDTH, OUT, WORDS)

    # The streams' entries are asked for long before they are needed, but after the first words:
    # whether private ones are asked for at all has to wait for alpha.
    if RESIDUAL > 0:
        columns_r, values_r = _read_blocks(
            residual_columns_ptr,
            residual_values_ptr,
            first,
            RESIDUAL,
            OUT,
            RESIDUAL,
            ROWS,
            CHUNKS,
            RESIDUAL_BLOCKS,
            PAIRED,
        )
    if PRIVATE > 0:
        # At alpha = 0 no byte of the stream is read, so that no NaN in it can be heard.
        spoken = tl.where(alpha != 0.0, PRIVATE, 0)
        columns_p, values_p = _read_blocks(
            private_columns_ptr,
            private_values_ptr,
            first,
            spoken,
            OUT,
            PRIVATE,
            ROWS,
            CHUNKS,
            PRIVATE_BLOCKS,
            PAIRED,
        )

    # Up to here only weights were read.
    wait(OVERLAP)
    if PREFETCH:
        accumulator += _step_sums(
            x_ptr,
            stride_x,
            scales_ptr,
            zeros_ptr,
            ahead,
            0,
            unit,
            row,
            token,
            token_mask,
            IN,
            OUT,
            BITS,
            GROUP,
            CHUNKS,
            WORDS,
            BYTES,
        )
        ahead = second
    accumulator = _steps(
        1 if PREFETCH else 0,
        STEPS,
        accumulator,
        ahead,
        words_ptr,
        scales_ptr,
        zeros_ptr,
        x_ptr,
        stride_x,
        unit,
        row,
        token,
        token_mask,
        IN,
        OUT,
        BITS,
        GROUP,
        CHUNKS,
        WORDS,
        BYTES,
        PREFETCH,
    )
    if RESIDUAL + PRIVATE > 0:
        # A thread has the products of its own entries, whichever rows' they are, as it has
        # those of its own words: all that crosses threads is the sum below.
        sums = tl.reshape(accumulator, [CHUNKS, TOKENS, ROWS])
        if ALIKE:
            sums = _both_sums(
                sums,
                x_ptr,
                stride_x,
                columns_r,
                values_r,
                columns_p,
                values_p,
                alpha,
                tokens,
                RESIDUAL,
                ROWS,
                CHUNKS,
                TOKENS,
                RESIDUAL_BLOCKS,
                PAIRED,
            )
        else:
            if RESIDUAL > 0:
                sums = _stream_sums(
                    sums,
                    x_ptr,
                    stride_x,
                    residual_columns_ptr,
                    residual_values_ptr,
                    columns_r,
                    values_r,
                    first,
                    RESIDUAL,
                    1.0,
                    tokens,
                    OUT,
                    RESIDUAL,
                    ROWS,
                    CHUNKS,
                    TOKENS,
                    RESIDUAL_BLOCKS,
                    PAIRED,
                )
            if PRIVATE > 0:
                sums = _stream_sums(
                    sums,
                    x_ptr,
                    stride_x,
                    private_columns_ptr,
                    private_values_ptr,
                    columns_p,
                    values_p,
                    first,
                    spoken,
                    alpha,
                    tokens,
                    OUT,
                    PRIVATE,
                    ROWS,
                    CHUNKS,
                    TOKENS,
                    PRIVATE_BLOCKS,
                    PAIRED,
                )
        accumulator = tl.reshape(sums, [CHUNKS, TOKENS, ROWS, 1, 1])
    y = tl.sum(tl.reshape(accumulator, [CHUNKS, TOKENS, ROWS]), 0)  # [tokens, rows]

    out = (first + tl.arange(0, ROWS))[None, :]
    t = tl.arange(0, TOKENS)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)
    tl.store(y_ptr + (t * OUT + out), y.to(y_ptr.dtype.element_ty), mask=(t < tokens) & (out < OUT))


def kernel_arguments(
    x: Tensor,
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: DecodeConfig,
) -> tuple[tuple[int], dict[str, object]]:
    """The grid and all arguments of a launch, by name."""
    layout = word_layout(Shape.of(lattice), config.words)
    assert layout is not None, "the dispatcher offers no such lattice"
    words, size = layout
    tokens, out_features = y.shape
    slots = residual[0].shape[0], private[0].shape[0]
    blocks = [min(MAX_BLOCKS, -(-s * config.rows // (WARP * config.warps))) for s in slots]
    per_row = lattice.group_size == PER_ROW
    arguments: dict[str, object] = {
        "x_ptr": x,
        "packed_ptr": lattice.packed,
        "scales_ptr": lattice.scales,
        "zeros_ptr": lattice.zeros,
        "residual_columns_ptr": residual[0],
        "residual_values_ptr": residual[1],
        "private_columns_ptr": private[0],
        "private_values_ptr": private[1],
        "alpha_ptr": alpha,
        "bias_ptr": y if bias is None else bias,  # not read
        "y_ptr": y,
        # With one token nothing is skipped, and a stride of 1, say, would be compiled for.
        "stride_x": x.stride(0) if tokens > 1 else lattice.in_features,
        "tokens": tokens,
        "unit": UNIT,
        "IN": lattice.in_features,
        "OUT": out_features,
        "BITS": lattice.bits,
        "GROUP": lattice.in_features if per_row else lattice.group_size,
        "RESIDUAL": slots[0],
        "PRIVATE": slots[1],
        "RESIDUAL_BLOCKS": blocks[0],
        "PRIVATE_BLOCKS": blocks[1],
        "HAS_BIAS": bias is not None,
        "TOKENS": triton.next_power_of_2(tokens),
        "ROWS": config.rows,
        "CHUNKS": WARP * config.warps,
        "WORDS": words,
        "BYTES": size,
        "PREFETCH": config.prefetch,
        "PAIRED": _paired(residual, private),
        "num_warps": config.warps,
        **options(),
    }
    return (-(-out_features // config.rows),), arguments


def _paired(*streams: tuple[Tensor, Tensor]) -> bool:
    there = [part for part in streams if part[0].shape[0]]
    return bool(there) and all(is_paired(*part) for part in there)


def decode(
    x: Tensor,
    lattice: Lattice,
    residual: tuple[Tensor, Tensor],
    private: tuple[Tensor, Tensor],
    alpha: Tensor,
    bias: Tensor | None,
    config: DecodeConfig,
) -> Tensor:
    """`x @ (base + residual + alpha * private).T + bias`, in the dtype of `x`, summed in float32.

    x: floating point `[tokens, in]`, 1 to `configs.MAX_TOKENS` tokens, of any strides
    residual, private: (columns uint16, values) `[k, out]`, best as `stream.paired` lays them; k may
        be 0
    alpha: float32, one element, read by the kernel: a captured graph follows it; at 0 the private
        stream is not read
    bias: `[out]` or None

    Returns `[tokens, out]`, contiguous.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not _paired(residual, private):
        residual = residual[0].contiguous(), residual[1].contiguous()
        private = private[0].contiguous(), private[1].contiguous()
    y = torch.empty(x.shape[0], lattice.packed.shape[0], dtype=x.dtype, device=x.device)
    grid, arguments = kernel_arguments(x, lattice, residual, private, alpha, bias, y, config)
    _decode_kernel[grid](**arguments)
    return y
