"""`OrthoLinear`: a linear layer that computes `(base + residual + alpha * private) @ x`.

Knows one layer: its packed base, its two sparse streams and alpha. It does not know how they were
made (`separate`, `tuning`), how it multiplies (`product`), nor which model it sits in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import product, stream
from .config import NO_LATTICE
from .errors import ShapeError
from .lattice import check_weight, dequantize, groups_per_row
from .split import split

if TYPE_CHECKING:
    from .fusion import Siblings

_STORED = ("scales", "zeros", "residual_values", "private_values", "alpha")
"""Buffers whose dtype is part of the format: `model.to(torch.bfloat16)` must not round them."""
LAID_TOGETHER = (
    *("packed", "scales", "zeros"),
    *("residual_columns", "residual_values", "private_columns", "private_values"),
)
"""Buffers that siblings (`fusion`) share: those along the rows first, then the streams."""


class OrthoLinear(nn.Module):
    """A separated linear layer.

    Buffers (`bits` 4 or 8): `packed`, `scales`, `zeros` as in `Lattice`; at 16 bits instead
    `weight` `[out, in]`. Streams: `residual_columns`, `residual_values`, `private_columns`,
    `private_values`, `[k, out]` each, k possibly 0. `bias` `[out]` or None.

    Outputs have the dtype of the input. Weights are composed in float32 and rounded to it, or not
    composed at all: `product.backend_of` says what a call is computed by.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    weight: Tensor
    bias: Tensor | None
    alpha: Tensor
    residual_columns: Tensor
    residual_values: Tensor
    private_columns: Tensor
    private_values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 64,
        residual_slots: int = 0,
        private_slots: int = 0,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty layer of a known format; the buffers are to be filled by a load."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size

        def buffer(name: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))

        if bits == NO_LATTICE:
            buffer("weight", (out_features, in_features), dtype)
        else:
            groups = groups_per_row(in_features, group_size)
            width = in_features if bits == 8 else -(-in_features // 2)
            buffer("packed", (out_features, width), torch.uint8)
            buffer("scales", (out_features, groups), torch.float16)
            buffer("zeros", (out_features, groups), torch.float16)
        for name, slots in (("residual", residual_slots), ("private", private_slots)):
            buffer(f"{name}_columns", (slots, out_features), torch.uint16)
            buffer(f"{name}_values", (slots, out_features), torch.float16)
        if bias:
            buffer("bias", (out_features,), dtype)
        else:
            self.bias = None
        # alpha's two copies: the device scalar is what products read, in a captured graph too; the
        # Python number can be asked for without waiting for the device.
        self._alpha = 1.0
        scalar = torch.ones((), dtype=torch.float32, device=device)
        self.register_buffer("alpha", scalar, persistent=False)
        self._held: Tensor | None = None  # the composed weight, if it is held (see `hold`)
        self._held_public: Tensor | None = None  # its entries at the private slots at alpha = 0
        self._observer: Callable[[Tensor], None] | None = None
        self._anchor: Tensor | None = None  # makes autograd visit a layer none of whose inputs ask
        self.siblings: Siblings | None = None  # layers multiplied with this one in one launch

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int,
        group_size: int,
        residual_density: float,
        importance: Tensor,
        search: bool = True,
    ) -> OrthoLinear:
        """Separate one layer into base and residual, as `split.split` does.

        importance: float `[in]`, diag(H) of the layer's inputs on public text
        """
        weight = linear.weight.detach()
        check_weight(weight)
        out_features, in_features = weight.shape
        slots = 0 if bits == NO_LATTICE else stream.slots_per_row(in_features, residual_density)
        layer = cls(
            in_features,
            out_features,
            bits=bits,
            group_size=group_size,
            residual_slots=slots,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            device=weight.device,
        )
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        if bits == NO_LATTICE:
            layer.weight = weight.clone()
            return layer
        lattice, columns, values = split(
            weight,
            bits=bits,
            group_size=group_size,
            slots=slots,
            importance=importance,
            search=search,
        )
        layer.packed, layer.scales, layer.zeros = lattice.packed, lattice.scales, lattice.zeros
        layer.residual_columns, layer.residual_values = columns, values
        return layer

    # --- weights -------------------------------------------------------------------------------

    def base_weight(self) -> Tensor:
        """The base alone, float32 `[out, in]`."""
        if self.bits == NO_LATTICE:
            return self.weight.float()
        return dequantize(product.lattice_of(self))

    @property
    def qweight(self) -> Tensor:
        """The packed base, under the name by which peft tells a packed layer's device."""
        return self.packed  # an AttributeError without a lattice: then there is a `weight`

    def public_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """base + residual, what alpha = 0 computes with, `[out, in]`."""
        return product.composed(self, dtype, private=False)

    def effective_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """base + residual + alpha * private at the present alpha, `[out, in]`."""
        return product.composed(self, dtype)

    def set_private(self, columns: Tensor, values: Tensor) -> None:
        """Replace the private stream: columns uint16 and values float, `[k, out]` both.

        Raises `ShapeError` for anything malformed; the layer is unchanged then.
        """
        stream.check(columns, values, self.in_features, self.out_features, "private stream")
        held_dtype = self.held_dtype
        self.release()
        self.private_columns, self.private_values = columns, values
        if held_dtype is not None:
            self.hold(held_dtype)

    # --- alpha ---------------------------------------------------------------------------------

    def set_alpha(self, value: float) -> None:
        """Scale the private stream, and its siblings', by any finite real number."""
        set_alphas([self], value)

    def get_alpha(self) -> float:
        """The present alpha."""
        return self._alpha

    def _private_speaks(self) -> bool:
        # Zero is a branch and not a factor: 0 * NaN would be NaN.
        return self._alpha != 0.0 and self.private_columns.shape[0] > 0

    # --- holding the composed weight ------------------------------------------------------------

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the composed weight in memory: as fast as a plain layer, and as large."""
        if self._held is not None and self._held.dtype == dtype:
            return
        public = self.public_weight()
        self._held_public = stream.gather(public, self.private_columns)
        self._held = public.to(dtype, copy=True)
        self.refresh()

    @property
    def held_dtype(self) -> torch.dtype | None:
        """The dtype of the held weight, or None if none is held."""
        return None if self._held is None else self._held.dtype

    def release(self) -> None:
        """Drop what `hold` keeps."""
        self._held = self._held_public = None

    def refresh(self) -> None:
        """Bring a held weight up to date with alpha and the private values, at the slots only."""
        if self._held is None or self._held_public is None or not self.private_columns.shape[0]:
            return
        entries = self._held_public
        if self._private_speaks():
            entries = entries + self._alpha * self.private_values.detach().float()
        stream.scatter(self._held, self.private_columns, entries)

    def observe(self, observer: Callable[[Tensor], None] | None) -> None:
        """Show the gradient of the effective weight, `[out, in]`, to `observer` in each backward.

        The gradient has the dtype of the activations and must not be kept. None ends it.
        """
        self._observer = observer
        self._anchor = None if observer is None else torch.zeros((), requires_grad=True)

    # --- computing ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape `[..., in]` to `[..., out]`, in the dtype of `x`."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"expected inputs of {self.in_features} features; found shape {tuple(x.shape)}."
            )
        if self.siblings is not None:
            y = self.siblings.take(self, x)
            if y is not None:
                return y
        return product.product(self, x)

    def __setattr__(self, name: str, value: Any) -> None:
        # What siblings share is no longer what this layer has.
        if name in LAID_TOGETHER and self.__dict__.get("siblings") is not None:
            self.__dict__["siblings"].part_ways()
        super().__setattr__(name, value)

    def composed(self, dtype: torch.dtype) -> Tensor:
        """The weight to multiply with now: the held one if there is one, else composed afresh."""
        if self._held is not None and self._held.dtype == dtype:
            return self._held
        return self.effective_weight(dtype)

    def storage_bits(self, *, private: bool = True) -> int:
        """Bits that the layer's weight takes in storage, all streams counted (not the bias)."""
        names = ["residual_columns", "residual_values"]
        names += ["weight"] if self.bits == NO_LATTICE else ["packed", "scales", "zeros"]
        if private:
            # A stream in tuning has float32 masters; what is stored is float16.
            names.append("private_columns")
        total = sum(8 * t.numel() * t.element_size() for t in (getattr(self, n) for n in names))
        return total + (16 * self.private_values.numel() if private else 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthoLinear:
        """Follow a move to another device, but keep the storage formats under a change of dtype."""
        self.release()
        before = {name: getattr(self, name) for name in _STORED if name in self._buffers}
        all_before = list(self._buffers.values())
        super()._apply(fn, recurse)
        moved = any(a is not b for a, b in zip(all_before, self._buffers.values(), strict=True))
        if moved and self.siblings is not None:
            self.siblings.part_ways()
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, residual={self.residual_columns.shape[0]}, "
            f"private={self.private_columns.shape[0]}, alpha={self._alpha}"
        )


def set_alphas(layers: Sequence[OrthoLinear], value: float) -> None:
    """Scale the private streams of layers on one device by any finite real number.

    Their scalars are written by a few launches together: one each would take longer than a token.
    """
    if not math.isfinite(value):
        raise ShapeError(f"alpha must be a finite real number; found {value}.")
    value = float(value)
    groups = [[layer] if layer.siblings is None else layer.siblings.parts for layer in layers]
    layers = list(dict.fromkeys(layer for group in groups for layer in group))
    # Past `nn.Module`'s own ways to attributes, which for a few hundred layers take a millisecond.
    scalars: list[Any] = [layer._buffers["alpha"] for layer in layers]
    torch._foreach_zero_(scalars)
    torch._foreach_add_(scalars, value)
    for layer in layers:
        layer.__dict__["_alpha"] = value
        if layer._held is not None:
            layer.refresh()
