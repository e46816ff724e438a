"""One weight matrix into base and residual.

Knows tensors only. Rows are independent of each other, so a large matrix is taken some rows at a
time: the temporaries are about forty bytes for each weight that is in hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import stream
from .lattice import Lattice, dequantize, quantize, row_parts


class Split(NamedTuple):
    """A matrix as `lattice` and, `[slots, out]` both, the residual's `columns` and `values`."""

    lattice: Lattice
    columns: Tensor
    values: Tensor


def split(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    slots: int,
    importance: Tensor,
    search: bool,
) -> Split:
    """Split a weight matrix `[out, in]` of floating point.

    slots: entries of a row that the residual corrects
    importance: float `[in]`, diag(H) of the layer's inputs on public text
    search: choose ranges by weighted error; the rest as in `lattice.quantize`

    The residual takes the entries of the largest `r**2 * diag(H)`, r being the base's error; the
    range is then fitted again without them, and they are held to float16's precision.
    """
    form = {"bits": bits, "group_size": group_size, "importance": importance, "search": search}
    parts = [
        _split_rows(weight[rows].float(), slots, importance.float(), form)
        for rows in row_parts(weight)
    ]
    lattices, columns, values = zip(*parts, strict=True)
    return Split(
        Lattice(
            torch.cat([part.packed for part in lattices]),
            torch.cat([part.scales for part in lattices]),
            torch.cat([part.zeros for part in lattices]),
            *(bits, group_size, weight.shape[1]),
        ),
        # Not every operator of PyTorch takes uint16.
        torch.cat([part.to(torch.int32) for part in columns], dim=1).to(torch.uint16),
        torch.cat(values, dim=1),
    )


def _split_rows(full: Tensor, slots: int, importance: Tensor, form: dict) -> Split:
    lattice = quantize(full, **form)
    if not slots:
        columns = torch.zeros(0, full.shape[0], dtype=torch.uint16, device=full.device)
        return Split(lattice, columns, columns.to(torch.float16))
    columns = stream.select((full - dequantize(lattice)).square() * importance, slots)
    if form["search"]:
        lattice = quantize(full, **form, excluded=stream.mask(columns, full.shape[1]))
    error = stream.gather(full - dequantize(lattice), columns)
    return Split(lattice, columns, error.to(torch.float16))
