"""Fewer launches between a step's products, put in place while a step is captured.

transformers' Llama makes some 40 launches a layer besides its products: norms, the rotary
embedding, the gate, attention with its repeated keys, sums. While `in_few_launches` is open, a
model that is run takes one or two for each, and they overlap (`kernels.overlap`). A shortcut is
taken only where it gives what the model's own code gives, which is tried once; what isn't
recognised stays as it is. After a capture nothing is left in place: a prompt is read by the model's
own code.

Knows transformers' models from outside: attributes of their modules, their attention interface, and
the function that rotates queries and keys. Doesn't know the products, but for one that adds.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels import dispatch
from .linear import OrthoLinear
from .product import product_plus

ROTARY = "apply_rotary_pos_emb"
"""Name of the function, in the module of a model, that rotates queries and keys."""
_TOLERANCE = 1e-2
"""Largest relative difference to the model's own code: one unit in bfloat16's last place and a
half."""
_HALVES = (torch.float16, torch.bfloat16)
_WITHOUT = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What attention may be asked for and the kernel doesn't know."""

log = logging.getLogger(__name__)


@contextmanager
def in_few_launches(model: Any) -> Iterator[None]:
    """Run a block with shortcuts in place, for calls with one token a sequence."""
    reason = why_not(model)
    if reason is not None:
        log.info("decoding takes the model's own launches: %s", reason)
        yield
        return
    from .kernels.overlap import overlapped  # noqa: PLC0415 - imports Triton

    undo: list[Callable[[], None]] = []
    try:
        undo += _blocks(model)
        for module in model.modules():
            forward = _norm(module) or _gate(module)
            if forward is not None:
                module.forward = forward
                undo.append(functools.partial(module.__dict__.pop, "forward"))
        undo += _attention(model)
        undo += _rotary(model)
        with overlapped(model.device):
            yield
    finally:
        for each in reversed(undo):
            each()


def cache_writer(model: Any) -> Callable[..., None] | None:
    """What puts a new key and value into a cache by one launch (`kernels.pointwise.write`).

    None where the cache's own two have to do.
    """
    if why_not(model) is not None:
        return None
    from .kernels.pointwise import write  # noqa: PLC0415 - imports Triton

    return write


def why_not(model: Any) -> str | None:
    """Why a model can't take shortcuts, or None if it can."""
    if model.device.type != "cuda":
        return f"no kernel is made for {model.device.type}"
    if model.dtype not in _HALVES:
        return f"the kernels are for float16 and bfloat16, not {model.dtype}"
    return dispatch.why_no_triton(model.device)


# --- blocks -------------------------------------------------------------------------------------


class _Adds:
    """In place of a separated layer's forward: also adds what was left with it beforehand."""

    def __init__(self, layer: OrthoLinear) -> None:
        self._layer = layer
        self.addend: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.addend is not None:
            y = product_plus(self._layer, x, self.addend)
            if y is not None:
                self.addend = None
                return y
        return OrthoLinear.forward(self._layer, x)


def _blocks(model: Any) -> list[Callable[[], None]]:
    """Answer for the forward of blocks that are two sums: of attention and of what follows it."""
    undo: list[Callable[[], None]] = []
    same: dict[type, bool] = {}  # of each kind of block the first one is tried
    for block in [module for module in model.modules() if _is_block(module)]:
        last = block.self_attn.o_proj, block.mlp.down_proj
        for layer in last:
            layer.forward = _Adds(layer)
        back = [functools.partial(vars(m).pop, "forward", None) for m in (*last, block)]
        kind = type(block)
        if kind not in same:
            same[kind] = _sums_are_the_same(model, block)
        if same[kind]:
            block.forward = _two_sums(block)
            undo += back
        else:
            for each in back:
                each()
    return undo


def _is_block(module: nn.Module) -> bool:
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    last = getattr(attention, "o_proj", None), getattr(mlp, "down_proj", None)
    norms = [getattr(module, f"{name}_layernorm", None) for name in ("input", "post_attention")]
    separated = all(isinstance(x, OrthoLinear) and "forward" not in vars(x) for x in last)
    return separated and all(isinstance(x, nn.Module) for x in norms)


def _two_sums(block: Any) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attention, mlp = block.self_attn.o_proj.forward, block.mlp.down_proj.forward
        attention.addend = hidden_states
        y, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **options)
        hidden_states = _with(y, attention)
        mlp.addend = hidden_states
        return _with(block.mlp(block.post_attention_layernorm(hidden_states)), mlp)

    return forward


def _with(y: Tensor, adds: _Adds) -> Tensor:
    """`y`, and what was to be added to it if that did not happen yet."""
    addend, adds.addend = adds.addend, None
    return y if addend is None else addend + y


def _sums_are_the_same(model: Any, block: Any) -> bool:
    """Whether a block, given one token and no cache, does what `_two_sums` does."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return False
    x = _noise(1, 1, model.config.hidden_size, like=model)
    angles = rotary(x, torch.ones(1, 1, dtype=torch.long, device=model.device))
    options = {"position_embeddings": angles, "attention_mask": None}
    try:
        ours, theirs = (f(x, **options) for f in (_two_sums(block), block.forward))
        return isinstance(theirs, Tensor) and _same(ours, theirs, block)
    except (RuntimeError, TypeError, ValueError) as error:
        log.info("%s is another kind of block: %s", type(block).__name__, error)
        return False


# --- modules ------------------------------------------------------------------------------------


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None:
        return None
    if "forward" in vars(module) or weight.dtype not in _HALVES:
        return None
    from .kernels.pointwise import rms_norm  # noqa: PLC0415 - imports Triton

    def forward(x: Tensor) -> Tensor:
        return rms_norm(x, weight, eps)

    x = _noise(1, 1, weight.shape[0], like=weight)
    return forward if _same(forward(x), module(x), module) else None


def _gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Module) for part in parts) or act is None:
        return None
    x = torch.linspace(-4, 4, 9)
    if "forward" in vars(module) or not torch.equal(act(x), nn.functional.silu(x)):
        return None
    from .kernels.pointwise import gated  # noqa: PLC0415 - imports Triton

    gate, up, down = parts

    def forward(x: Tensor) -> Tensor:
        return down(gated(gate(x), up(x)))  # type: ignore[misc]

    return forward


# --- functions ----------------------------------------------------------------------------------


def _attention(model: Any) -> list[Callable[[], None]]:
    """Answer for the model's attention function where the kernel can."""
    name = model.config._attn_implementation
    if name != "sdpa":
        return []
    theirs = ALL_ATTENTION_FUNCTIONS[name]
    was_local = name in ALL_ATTENTION_FUNCTIONS._local_mapping
    ALL_ATTENTION_FUNCTIONS[name] = attention_over(theirs)

    def undo() -> None:
        if was_local:
            ALL_ATTENTION_FUNCTIONS[name] = theirs
        else:
            del ALL_ATTENTION_FUNCTIONS[name]

    return [undo]


def attention_over(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers that does one new token itself, and leaves the rest."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plain = dropout == 0.0 and all(options.get(name) is None for name in _WITHOUT)
        if not plain or not _fits(query, key, value, attention_mask):
            return theirs(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **options,
            )
        from .kernels.attention import attend  # noqa: PLC0415 - imports Triton

        assert attention_mask is not None  # it fits
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, attention_mask, scale), None

    return attention


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `kernels.attention` takes these."""
    batch, heads, tokens, dim = query.shape
    return (
        mask is not None
        and mask.dtype == torch.bool
        and mask.shape in ((batch, 1, 1, key.shape[2]), (1, 1, 1, key.shape[2]))
        and tokens == 1
        and query.dtype in _HALVES
        and key.dtype == value.dtype == query.dtype
        and dim in (16, 32, 64, 128, 256)
        and heads % key.shape[1] == 0
        and key.shape == value.shape
        and key.is_contiguous()
        and value.is_contiguous()
    )


def _rotary(model: Any) -> list[Callable[[], None]]:
    """Answer for the function that rotates queries and keys, in the module of the model's code."""
    code = sys.modules[type(model).__module__]
    theirs = getattr(code, ROTARY, None)
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if theirs is None or dim & (dim - 1):
        return []
    from .kernels.pointwise import rotate  # noqa: PLC0415 - imports Triton

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        if rest or more or q.dtype not in _HALVES or cos.dtype != q.dtype or q.shape[-1] != dim:
            return theirs(q, k, cos, sin, *rest, **more)
        return rotate(q, k, cos, sin)

    q, k = (_noise(1, heads, 1, dim, like=model) for heads in (4, 2))
    cos, sin = _noise(2, 1, 1, dim, like=model)
    try:
        pairs = zip(rotary(q, k, cos, sin), theirs(q, k, cos, sin), strict=True)
        same = all(_same(a, b, code) for a, b in pairs)
    except (RuntimeError, TypeError, ValueError) as error:
        log.info("%s is another function in %s: %s", ROTARY, code.__name__, error)
        return []
    if not same:
        return []
    setattr(code, ROTARY, rotary)
    return [lambda: setattr(code, ROTARY, theirs)]


def _noise(*shape: int, like: Any) -> Tensor:
    """Normal numbers, in the dtype and on the device of something; the seeds of others stay."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def _same(ours: Tensor, theirs: Tensor, what: object) -> bool:
    difference = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    if not difference <= _TOLERANCE:
        log.info("a shortcut differs by %.1e from %s, and is not taken", difference, what)
        return False
    return True
