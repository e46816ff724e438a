"""Whether Triton works on a card: a product small enough to be checked at first use.

Knows the decode kernel. Compilers, drivers and cards fit together or they don't, and a kernel that
compiles may still be wrong, so the outcome is compared with PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import stream
from ..lattice import dequantize, quantize
from .configs import DecodeConfig
from .decode import decode

_TOLERANCE = 2e-3
"""Largest relative error, four times what rounding to float16 leaves."""
_OUT, _IN = 16, 256


def failure(device: torch.device) -> str | None:
    """What went wrong with a small product on a CUDA device, or None."""
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing may wait now; a fault would show in the capture
    generator = torch.Generator().manual_seed(0)
    lattice = quantize(
        torch.randn(_OUT, _IN, generator=generator).to(device), group_size=64, search=False
    )
    columns = stream.select(torch.rand(_OUT, _IN, generator=generator), 3).to(device)
    values = torch.randn(3, _OUT, generator=generator).half().to(device)
    x = torch.randn(1, _IN, generator=generator).half().to(device)
    alpha = torch.ones((), device=device)
    weight = stream.scatter_add(dequantize(lattice), columns, values.float(), 2.0)
    expected = F.linear(x.float(), weight)
    config = DecodeConfig(rows=4, warps=1, words=4, prefetch=False)
    try:
        y = decode(x, lattice, (columns, values), (columns, values), alpha, None, config)
        error = float((y.float() - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as caught:  # Triton raises what its compiler, the linker or the driver raise
        first = str(caught).strip().splitlines() or [""]
        return f"Triton does not work on this card: {type(caught).__name__}: {first[0][:200]}"
    if not error <= _TOLERANCE:
        return f"Triton is off by {error:.1e} in a small product on this card"
    return None
