"""`PackedEmbedding` and `PackedHead`: the two matrices as large as the vocabulary, at 8 bits.

Knows one lattice a matrix, how rows are looked up in it and how logits are taken from it. They are
public and have no streams, so alpha means nothing to them. Where a model ties the two, the head
multiplies with the embedding's lattice and holds nothing itself.

The dense head of Llama 3 8B takes 1 GiB, so none is ever made: a few tokens are multiplied by a
kernel that reads the lattice, more of them with a part of the rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NO_LATTICE
from .errors import SeparationError
from .kernels import op
from .lattice import PER_ROW, Lattice, check_weight, dequantize, quantize
from .models import replace_module

BITS = 8
"""Bits of the lattice: at 4, logits lose what no residual of a sensible size brings back."""
GROUP_SIZE = PER_ROW
"""One scale and one zero point a row: at 8 bits smaller groups gain little and cost 3 to 6 %."""
_STORED = ("scales", "zeros")
"""Buffers whose dtype is part of the format: `model.to(torch.bfloat16)` must not round them."""


class _PackedRows(nn.Module):
    """A matrix `[rows, columns]` as a lattice: buffers `packed`, `scales`, `zeros`."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def _allocate(self, rows: int, columns: int, device: torch.device | str | None) -> None:
        self.register_buffer("packed", torch.zeros(rows, columns, dtype=torch.uint8, device=device))
        for name in _STORED:
            empty = torch.zeros(rows, 1, dtype=torch.float16, device=device)
            self.register_buffer(name, empty)

    def _fill(self, weight: Tensor) -> None:
        lattice = quantize(weight, bits=BITS, group_size=GROUP_SIZE, search=False)
        self.packed, self.scales, self.zeros = lattice.packed, lattice.scales, lattice.zeros

    @property
    def lattice(self) -> Lattice:
        """The matrix."""
        return Lattice(self.packed, self.scales, self.zeros, BITS, GROUP_SIZE, self.packed.shape[1])

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows `[len(indices), columns]`, by int64 indices `[n]` on the matrix's device."""
        whole = self.lattice
        some = replace(
            whole,
            packed=whole.packed.index_select(0, indices),
            scales=whole.scales.index_select(0, indices),
            zeros=whole.zeros.index_select(0, indices),
        )
        return dequantize(some, dtype)

    def storage_bits(self) -> int:
        """Bits that the module takes in storage; none for a head that is tied."""
        return sum(8 * t.numel() * t.element_size() for t in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow a move to another device, but keep the format under a change of dtype."""
        before = {name: getattr(self, name) for name in _STORED if name in self._buffers}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self


class PackedEmbedding(_PackedRows):
    """An embedding whose rows are unpacked as they are looked up.

    activation_dtype: what rows are rounded to; `.to(dtype)` and `computing_in` change it
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty embedding; the buffers are to be filled by a load."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.activation_dtype = dtype
        self._allocate(num_embeddings, embedding_dim, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> PackedEmbedding:
        """Pack an embedding; raises `ShapeError` for weights that no lattice can hold."""
        weight = embedding.weight.detach()
        check_weight(weight, "the embedding")
        packed = cls(*weight.shape, dtype=weight.dtype, device="meta")
        packed._fill(weight)
        return packed

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `[...]` to `[..., embedding_dim]` in `activation_dtype`."""
        return self.rows(ids.flatten(), self.activation_dtype).view(*ids.shape, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=self.activation_dtype, device=self.packed.device)
        self.activation_dtype = fn(probe).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={BITS}"


class PackedHead(_PackedRows):
    """An output head that multiplies by a lattice, its own or the embedding's that it is tied to.

    Outputs have the dtype of the input; sums are float32.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tied_to: PackedEmbedding | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty head, to be filled by a load; a tied one has nothing but a bias."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # A tuple, because a module's modules are registered, moved and saved as its own.
        self._tied_to = () if tied_to is None else (tied_to,)
        if tied_to is None:
            self._allocate(out_features, in_features, device)
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.bias = None
        self._held: Tensor | None = None

    @classmethod
    def from_linear(cls, head: nn.Linear, *, tied_to: PackedEmbedding | None = None) -> PackedHead:
        """Pack a head, or tie it; raises `ShapeError` for weights that no lattice can hold."""
        packed = cls(
            head.in_features,
            head.out_features,
            tied_to=tied_to,
            bias=head.bias is not None,
            dtype=head.weight.dtype,
            device="meta",
        )
        if tied_to is None:
            check_weight(head.weight.detach(), "the output head")
            packed._fill(head.weight.detach())
        if head.bias is not None:
            packed.bias = head.bias.detach().clone()
        return packed

    @property
    def lattice(self) -> Lattice:
        return self._tied_to[0].lattice if self._tied_to else super().lattice

    def forward(self, x: Tensor) -> Tensor:
        """`x` of shape `[..., in]` to logits `[..., out]`, in the dtype of `x`."""
        lattice = self.lattice
        x = x.to(lattice.packed.device)  # where a device map puts a tied pair in two places
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._held is not None and self._held.dtype == x.dtype:
            return F.linear(x, self._held, bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, lattice, bias)
        return _multiply(x, lattice, bias)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the dense matrix in memory, in `dtype`: as fast as a plain head, and as large."""
        if self.held_dtype != dtype:
            self._held = dequantize(self.lattice, dtype)

    @property
    def held_dtype(self) -> torch.dtype | None:
        """The dtype of the held matrix, or None if none is held."""
        return None if self._held is None else self._held.dtype

    def release(self) -> None:
        """Drop what `hold` keeps."""
        self._held = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.release()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        tied = ", tied to the embedding" if self._tied_to else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={BITS}{tied}"
        )


def _multiply(x: Tensor, lattice: Lattice, bias: Tensor | None) -> Tensor:
    tensors = lattice.packed, lattice.scales, lattice.zeros
    form = lattice.bits, lattice.group_size, lattice.in_features
    return op.lattice_product(x, *tensors, bias, *form)


class _Product(torch.autograd.Function):
    """A product whose backward unpacks the rows again, part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lattice: Lattice, bias: Tensor | None) -> Tensor:
        ctx.lattice = lattice
        return _multiply(x, lattice, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        parts = op.dense_parts(ctx.lattice, grad.dtype)
        products = (grad[..., rows] @ weight for rows, weight in parts)
        return functools.reduce(Tensor.add_, products), None, None


# --- a model's pair ------------------------------------------------------------------------------


def pack_embeddings(model: Any) -> None:
    """Replace a model's embedding and output head by packed ones, in place.

    Raises `SeparationError` for a model whose pair is not a plain embedding and linear layer, or
    has weights that are not finite; nothing is changed then.
    """
    embedding, head = check_embeddings(model)
    packed = PackedEmbedding.from_embedding(embedding)
    tied = head.weight is embedding.weight
    put_embeddings(model, packed, PackedHead.from_linear(head, tied_to=packed if tied else None))


def empty_embeddings(model: Any, dtype: torch.dtype) -> None:
    """Replace embedding and head by empty packed ones on the meta device, for a load."""
    embedding, head = check_embeddings(model)
    packed = PackedEmbedding(*embedding.weight.shape, dtype=dtype, device="meta")
    put_embeddings(
        model,
        packed,
        PackedHead(
            head.in_features,
            head.out_features,
            tied_to=packed if model.config.tie_word_embeddings else None,
            bias=head.bias is not None,
            dtype=dtype,
            device="meta",
        ),
    )


def check_embeddings(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """A model's embedding and head, if they are of the plain kinds; `SeparationError` if not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise SeparationError(
            f"{type(model).__name__} has a {type(embedding).__name__} and a "
            f"{type(head).__name__} for embedding and head, and only an Embedding and a Linear "
            f"can be packed. Separate this model with head_bits={NO_LATTICE}."
        )
    return embedding, head


def put_embeddings(model: Any, embedding: PackedEmbedding, head: PackedHead) -> None:
    """Put a packed pair in the place of a model's own, and let transformers tie nothing to it."""
    names = {id(module): name for name, module in model.named_modules()}
    replace_module(model, names[id(model.get_input_embeddings())], embedding)
    replace_module(model, names[id(model.get_output_embeddings())], head)
    model._tied_weights_keys = model.all_tied_weights_keys = {}


def packed_heads(model: nn.Module) -> list[PackedHead]:
    """The packed heads of a model: one or none."""
    return [module for module in model.modules() if isinstance(module, PackedHead)]


def head_rows(head: Any, indices: Tensor) -> Tensor:
    """Rows of an output head's matrix, packed or not, float32 `[len(indices), hidden]`."""
    if isinstance(head, PackedHead):
        return head.rows(indices)
    return head.weight[indices].float()


def activation_dtype(model: Any) -> torch.dtype:
    """The dtype of the hidden states that a model's embedding makes."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        return embedding.activation_dtype
    return embedding.weight.dtype
