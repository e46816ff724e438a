"""The sparse streams: a fixed number of entries per output row, in ELL format.

Knows tensors only. A stream is a pair

    columns  uint16  [k, out]    sorted along k
    values   float16 [k, out]

which stands for the matrix `S[o, columns[j, o]] = values[j, o]`: 4 bytes an entry, no row pointers,
the same work for every row. `out` is the fast dimension, so that neighbouring rows are read
together. For decoding the two may be views of one tensor in which each value lies beside its column
and a row's entries beside each other (`paired`): one read instead of two, all of it asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ShapeError

MAX_COLUMNS = 1 << 16
"""Columns are 16-bit indices."""
BITS_PER_ENTRY = 32
"""16 for the column and 16 for the value."""
_SORTED_AT_ONCE = 1 << 22
"""Scores that are sorted together: sorting takes about forty bytes for each."""


def slots_per_row(in_features: int, density: float) -> int:
    """Entries a row gets at a density in [0, 1]; at least one unless the density is 0."""
    if not 0.0 <= density <= 1.0:
        raise ShapeError(f"density must be in [0, 1]; found {density}.")
    if in_features > MAX_COLUMNS:
        raise ShapeError(
            f"a stream addresses at most {MAX_COLUMNS} input features with its 16-bit columns; "
            f"found {in_features}. Leave this layer out of the separation."
        )
    return 0 if density == 0 else max(1, round(in_features * density))


def select(scores: Tensor, k: int) -> Tensor:
    """Columns uint16 `[k, out]` of the k highest scores in each row of `[out, in]`.

    Equal scores are settled by the lowest column, so that the choice is a function of the scores
    alone and not of how a library sorts.
    """
    if scores.dim() != 2 or not 0 <= k <= scores.shape[1]:
        raise ShapeError(
            f"select needs scores [out, in] and 0 <= k <= in; found {tuple(scores.shape)}, k = {k}."
        )
    if k == 0:
        return torch.zeros(0, scores.shape[0], dtype=torch.uint16, device=scores.device)
    rows = max(1, _SORTED_AT_ONCE // scores.shape[1])
    parts = []
    for part in scores.split(rows):
        order = torch.sort(part, dim=1, descending=True, stable=True).indices[:, :k]
        parts.append(order.sort(dim=1).values.t().to(torch.int32))
    # Only now, because not every operator of PyTorch takes uint16.
    return torch.cat(parts, dim=1).contiguous().to(torch.uint16)


def paired(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same stream as it lies best for decoding: views `[k, out]` of `(column, value)` pairs.

    In memory pairs are `[out, k]`, so that strides are `(2, 2 * k)`: what a few rows have lies
    together.

    Values that are not float16 (masters in tuning) stay where they are, and so do no entries.
    """
    if values.dtype != torch.float16 or not values.numel() or is_paired(columns, values):
        return columns, values
    parts = [part.detach().view(torch.int16).t() for part in (columns, values)]
    both = torch.stack(parts, -1).transpose(0, 1)
    return both.view(torch.uint16)[..., 0], both.view(torch.float16)[..., 1]


def is_paired(columns: Tensor, values: Tensor) -> bool:
    """Whether two tensors lie in memory as `paired` lays them."""
    strides = (2, 2 * columns.shape[0])
    return (
        values.dtype == torch.float16
        and columns.stride() == values.stride() == strides
        and values.storage_offset() == columns.storage_offset() + 1
        and values.untyped_storage().data_ptr() == columns.untyped_storage().data_ptr()
    )


def gather(matrix: Tensor, columns: Tensor) -> Tensor:
    """The entries of a matrix `[out, in]` at a stream's slots, `[k, out]`."""
    return matrix.gather(1, columns.t().long()).t().contiguous()


def mask(columns: Tensor, in_features: int) -> Tensor:
    """Bool `[out, in]`, true at a stream's slots."""
    empty = torch.zeros(columns.shape[1], in_features, dtype=torch.bool, device=columns.device)
    return empty.scatter_(1, columns.t().long(), True)


def scatter_add(matrix: Tensor, columns: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """Add `scale` times a stream to a matrix `[out, in]` in place and return it."""
    return matrix.scatter_add_(1, columns.t().long(), (values.t() * scale).to(matrix.dtype))


def scatter(matrix: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Overwrite a matrix `[out, in]` at a stream's slots in place and return it."""
    return matrix.scatter_(1, columns.t().long(), values.t().to(matrix.dtype))


def multiply(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`x @ S.T` for `x` of shape `[..., in]`, giving `[..., out]`, summed in float32.

    The cost is tokens * k * out gathers: right for decoding. For many tokens it is cheaper to add
    the stream to the dense weight (`scatter_add`) and multiply once.
    """
    picked = x[..., columns.long()].float()  # [..., k, out]
    return (picked * values.float()).sum(-2).to(x.dtype)


def check(columns: Tensor, values: Tensor, in_features: int, out_features: int, name: str) -> None:
    """Raise `ShapeError` unless a stream read from outside is well-formed."""
    if columns.shape != values.shape or columns.dim() != 2 or columns.shape[1] != out_features:
        raise ShapeError(
            f"{name}: columns and values must both be [k, {out_features}]; found "
            f"{tuple(columns.shape)} and {tuple(values.shape)}."
        )
    if columns.dtype != torch.uint16 or not values.is_floating_point():
        raise ShapeError(
            f"{name}: columns must be uint16 and values floating point; found {columns.dtype} and "
            f"{values.dtype}."
        )
    wide = columns.long()
    if wide.numel() and int(wide.max()) >= in_features:
        raise ShapeError(f"{name}: column {int(wide.max())} lies outside 0 .. {in_features - 1}.")
    if bool((wide[1:] <= wide[:-1]).any()):
        raise ShapeError(f"{name}: the columns of a row must be distinct and ascending.")
