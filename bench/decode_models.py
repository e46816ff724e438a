"""Llamas of random weights at an exact geometry, whose linear layers are what is compared.

Knows how each kind of layer is made on a device, one at a time, so that no dense model ever is.
Results say `weights: random`: speed and memory are real, the text means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.kernel_cases import Case, make_operands, random_layer
from libortho.kernels import int4pack
from libortho.linear import OrthoLinear
from libortho.models import linear_layers, replace_module

GEOMETRIES: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    # For a rehearsal without a card: shapes that every kind of layer takes.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
"""Llama 3 8B and Llama 3.2 3B, from their config.json files."""
DENSITY = 0.005
"""Share of a row's entries in each of the two streams."""
GROUP_SIZE = 128
HEAD_BITS = (16, 8)

MakeLinear = Callable[[nn.Linear, int, torch.dtype, torch.device], nn.Module]


def random_model(
    geometry: str,
    kind: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    head_bits: int = 16,
) -> Any:
    """A Llama whose linear layers are of a kind of `KINDS`, the rest in `dtype`."""
    config = LlamaConfig(
        **GEOMETRIES[geometry],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=None,
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    for seed, (name, linear) in enumerate(linear_layers(model).items()):
        replace_module(model, name, KINDS[kind](linear, seed, dtype, device))
    if head_bits == 8:
        _pack_embeddings(model, dtype, device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = torch.randn(parameter.shape, dtype=dtype, device=device)
                filled = drawn.mul_(0.02) if parameter.dim() > 1 else drawn.fill_(1.0)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    if head_bits == 16:
        model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(device).eval().requires_grad_(False)


def why_not(kind: str, head_bits: int = 16) -> str | None:
    """Why a kind can't be made here, or None if it can."""
    if head_bits == 8 and find_spec("libortho.embedding") is None:
        return "this libortho has no 8-bit embedding"
    package = {"nf4": "bitsandbytes", "gemlite": "gemlite"}.get(kind)
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed"
    return None


def bytes_per_token(model: Any, context: int, *, private: bool = True) -> int:
    """The fewest bytes that a decode step reads: weights, head, and a cache of `context` tokens.

    private: count the private streams, which a step at alpha = 0 does not read
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    counted: dict[int, Tensor] = {}
    for module in model.modules():
        if module is embedding and not tied:
            continue  # one row is read
        for name, tensor in (*module.named_parameters(recurse=False), *_buffers(module)):
            if private or not name.startswith("private_"):
                counted[id(tensor)] = tensor
    assert tied or head is not None
    config = model.config
    entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    weights = sum(t.numel() * t.element_size() for t in counted.values())
    return weights + entries * context * model.dtype.itemsize


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = list(module.named_buffers(recurse=False))
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)  # bitsandbytes keeps its scales beside a weight
    while state is not None:
        found += [("absmax", state.absmax)]
        state = getattr(state, "state2", None)
    return found


# --- kinds of layers ----------------------------------------------------------------------------


def _case(linear: nn.Linear, dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(linear.out_features, linear.in_features, group_size=GROUP_SIZE, dtype=name)


def _ortho(linear: nn.Linear, seed: int, dtype: torch.dtype, device: torch.device) -> OrthoLinear:
    case = _case(linear, dtype).with_streams(DENSITY)
    layer = random_layer(case, seed, device=str(device))
    # Of the size that keeps activations finite through the layers.
    size = layer.in_features**-0.5
    layer.scales, layer.zeros = layer.scales * size, layer.zeros * size
    layer.residual_values = layer.residual_values * size
    layer.private_values = layer.private_values * size
    return layer


class Int4PackLinear(nn.Module):
    """PyTorch's own INT4 product (tinygemm), which torchao's tile-packed INT4 calls as well."""

    def __init__(self, repacked: int4pack.Repacked, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.register_buffer("packed", repacked.packed)
        self.register_buffer("scales_and_zeros", repacked.scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        repacked = int4pack.Repacked(None, self.packed, self.scales_and_zeros)
        y = int4pack.multiply_repacked(x.reshape(-1, self.in_features), repacked, GROUP_SIZE)
        return y.view(*x.shape[:-1], -1)


def _int4pack(linear: nn.Linear, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    lattice = make_operands(_case(linear, dtype), seed, device=str(device)).lattice
    lattice.scales.mul_(linear.in_features**-0.5)
    lattice.zeros.mul_(linear.in_features**-0.5)
    return Int4PackLinear(int4pack.repack(lattice), linear.in_features)


def _dense(linear: nn.Linear, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(_random_weight(linear, dtype, device), requires_grad=False)
    return made


def _nf4(linear: nn.Linear, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb  # noqa: PLC0415 - optional

    recipe = {"compress_statistics": True, "quant_type": "nf4"}
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        device="meta",
        **recipe,
    )
    weight = _random_weight(linear, dtype, device)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **recipe)
    return made.to(device)  # quantises


def _gemlite(linear: nn.Linear, seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    import gemlite  # noqa: PLC0415 - optional, and imports with a CUDA device only

    kinds = {torch.float16: gemlite.DType.FP16, torch.bfloat16: gemlite.DType.BF16}
    out_features, in_features = linear.out_features, linear.in_features
    made = gemlite.GemLiteLinear(
        W_nbits=4,
        group_size=GROUP_SIZE,
        in_features=in_features,
        out_features=out_features,
        input_dtype=kinds[dtype],
        output_dtype=kinds[dtype],
    )
    shape = (out_features, in_features)
    q = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    groups = (out_features, in_features // GROUP_SIZE)
    scales = torch.full(groups, in_features**-0.5 / 4, dtype=dtype, device=device)
    made.pack(q, scales.view(-1, 1), torch.full_like(scales, 7.5).view(-1, 1), None)
    return made


def _random_weight(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (linear.out_features, linear.in_features)
    return torch.randn(shape, dtype=dtype, device=device).mul_(linear.in_features**-0.5)


def _pack_embeddings(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    from libortho.embedding import (  # noqa: PLC0415 - see `why_not`
        PackedEmbedding,
        PackedHead,
        put_embeddings,
    )

    config = model.config
    vocabulary, width = config.vocab_size, config.hidden_size
    embedding = PackedEmbedding(vocabulary, width, dtype=dtype, device="meta")
    tied = embedding if config.tie_word_embeddings else None
    head = PackedHead(width, vocabulary, tied_to=tied, dtype=dtype, device="meta")
    for packed in [embedding] if tied else [embedding, head]:
        lattice = make_operands(
            Case(vocabulary, width, bits=8, group_size=-1), 0, device=str(device)
        ).lattice
        packed.packed = lattice.packed
        packed.scales, packed.zeros = lattice.scales * 0.02, lattice.zeros * 0.02
    put_embeddings(model, embedding, head)


KINDS: dict[str, MakeLinear] = {
    "ortho": _ortho,
    "nf4": _nf4,
    "int4pack": _int4pack,
    "dense": _dense,
    "gemlite": _gemlite,
}
