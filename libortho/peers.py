"""The quantisers that people use now, loaded beside ours: bitsandbytes NF4 and LLM.int8.

Knows transformers' bitsandbytes integration and nothing of ours, so that a peer is measured as its
own users run it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .errors import HardwareError
from .models import ResolvedModel, replace_module
from .progress import bars_on_terminals_only

Peer = Literal["nf4", "int8"]
PEER_OF_BITS: dict[int, tuple[Peer, ...]] = {4: ("nf4",), 8: ("int8",), 16: ()}
"""The peers measured beside a lattice of so many bits."""


def why_no_peer() -> str | None:
    """Why bitsandbytes can't be used here, or None if it can."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed; pip install bitsandbytes"
    return None


def load_peer(
    resolved: ResolvedModel, peer: Peer, *, dtype: torch.dtype, device: str | torch.device
) -> Any:
    """The model quantised by bitsandbytes, computing in `dtype`, in eval mode.

    `nf4` is 4-bit NormalFloat with double quantisation (Dettmers et al. 2023), `int8` LLM.int8
    (Dettmers et al. 2022). Raises `HardwareError` if bitsandbytes is missing or refuses.
    """
    reason = why_no_peer()
    if reason:
        raise HardwareError(f"the {peer} peer can't be measured: {reason}.")
    if peer == "nf4":
        recipe = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        recipe = BitsAndBytesConfig(load_in_8bit=True)
    try:
        with bars_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                resolved.folder,
                quantization_config=recipe,
                dtype=dtype,
                device_map={"": torch.device(device)},
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise HardwareError(
            f"the {peer} peer can't be loaded on {device}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    quantised: Any
    for quantised in model.modules():
        if hasattr(quantised, "support_avx512bf16_for_cpu"):
            quantised.support_avx512bf16_for_cpu = False  # see `unpacked`
    return model.eval()


def unpacked(weight: Any) -> Tensor:
    """A weight in bitsandbytes' 4 bits as plain numbers, `[out, in]`, in its own dtype.

    On a CPU with AVX512-BF16 the first call of a layer lays its weight out anew and rounds the
    scales to bfloat16: what is stored then depends on the machine and on whether it has run, and a
    model's fingerprint with it. Peers that `load_peer` loads are kept from that; a model that comes
    from elsewhere may be laid out so.
    """
    import bitsandbytes as bnb  # noqa: PLC0415  (optional)

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = bnb.functional._convert_weight_packed_for_cpu_inverse(data, copy(state))
    plain: Tensor = bnb.functional.dequantize_4bit(data, state)
    return plain


@contextmanager
def quiet_peer() -> Iterator[None]:
    """Mute the line that bitsandbytes logs for each layer and each call on a CPU."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def dequantized_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Run a block with NF4 weights unpacked once, in `dtype`; the quantised layers come back.

    The same values that bitsandbytes unpacks again in every call: it trades a dense model's memory
    for time, as `dense_weights` does for ours. Layers inside an adapter are reached as well.
    """
    import bitsandbytes as bnb  # noqa: PLC0415  (optional)

    packed = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    try:
        for name, module in packed.items():
            weight = unpacked(module.weight)
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            linear.bias = module.bias
            replace_module(model, name, linear)
        yield model
    finally:
        for name, module in packed.items():
            replace_module(model, name, module)


def is_peer(model: nn.Module) -> bool:
    """Whether a model's weights are quantised by bitsandbytes."""
    return bool(getattr(model, "is_quantized", False))


def bits_per_peer_weight(model: nn.Module) -> float:
    """Stored bits over weights of a peer's quantised layers: scales, codebooks, adapters count."""
    import bitsandbytes as bnb  # noqa: PLC0415  (optional)

    weights = 0
    adapter = [p for name, p in model.named_parameters() if ".lora_" in name]
    bits = sum(8 * p.numel() * p.element_size() for p in adapter)
    for module in model.modules():
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        weights += module.in_features * module.out_features
        stored: list[Tensor] = [
            tensor for name, tensor in module.state_dict().items() if name != "bias"
        ]
        bits += sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
    return bits / weights
