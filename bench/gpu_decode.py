"""Decode a Llama of random weights on a GPU: `python -m bench.gpu_decode --out decode.json`.

Exercises the exact geometry of Llama 3 8B or Llama 3.2 3B: INT4 in groups of 128 with 0.5 %
residual and 0.5 % private, transformers' static cache, one decode step as a captured CUDA graph.
Says `weights: random`: speed and memory are real, the text means nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.gpu_run import environment
from bench.kernel_cases import Case, random_layer
from libortho.files import atomic_write_text
from libortho.linear import OrthoLinear
from libortho.models import linear_layers
from libortho.separation import replace_module
from libortho.switch import ortho_layers, set_alpha

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
}
DENSITY = 0.005
GB = 1e9
MIB = 1 << 20
WARM_STEPS = 3


def random_model(
    geometry: dict[str, Any], *, dtype: torch.dtype, group_size: int = 128, device: str = "cuda"
) -> Any:
    """A separated Llama with random contents, never dense anywhere: layers are drawn packed."""
    config = LlamaConfig(**geometry, max_position_embeddings=8192, rope_theta=500000.0, dtype=dtype)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    for seed, (name, linear) in enumerate(linear_layers(model).items()):
        case = Case(linear.out_features, linear.in_features, group_size=group_size)
        replace_module(
            model, name, _shrunk(random_layer(case.with_streams(DENSITY), seed, device=device))
        )
    for module in model.modules():
        if isinstance(module, OrthoLinear):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.randn(parameter.shape, dtype=dtype, device=device)
            filled = drawn.mul_(0.02) if parameter.dim() > 1 else drawn.fill_(1.0)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


def _shrunk(layer: OrthoLinear) -> OrthoLinear:
    """Weights of the size that keeps activations finite through the layers."""
    size = layer.in_features**-0.5
    layer.scales, layer.zeros = layer.scales * size, layer.zeros * size
    layer.residual_values = layer.residual_values * size
    layer.private_values = layer.private_values * size
    return layer


class Decoder:
    """One greedy decode step of a model with a static cache, captured once and replayed."""

    def __init__(self, model: Any, length: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.slots = torch.arange(length, device=model.device)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, ids: Tensor) -> None:
        """Read a prompt `[1, tokens]`; the next step continues it."""
        self.cache.reset()
        positions = torch.arange(ids.shape[1], device=ids.device)
        logits = self._logits(ids, positions)
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.fill_(ids.shape[1])

    def step(self) -> None:
        """The next token, into `self.token`."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def capture(self) -> None:
        """Capture the step; what it changed by warming up is of no consequence to speed."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def _step(self) -> None:
        logits = self._logits(self.token, self.position)
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        # The whole mask is given: what transformers makes of none may ask the device for lengths.
        seen = self.slots[None, :] <= positions[:, None]
        return self.model(
            input_ids=ids,
            attention_mask=seen[None, None],  # [1, 1, tokens, length]
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits


def bytes_per_token(model: Any, context: int) -> int:
    """The fewest bytes that a decode step reads: weights, head, and a cache of `context` tokens."""
    layers = sum(layer.storage_bits() // 8 for layer in ortho_layers(model).values())
    head = model.get_output_embeddings().weight
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * width * context * head.element_size()
    return layers + head.numel() * head.element_size() + cache


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file is written")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="8B")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompt", type=int, default=384, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are decoded")
    parser.add_argument("--cap-gib", type=float, help="memory that PyTorch may reserve")
    options = parser.parse_args()
    if options.cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * (1 << 30) / total)
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "environment": environment("bench.gpu_decode"),
        "weights": "random",
        "geometry": options.geometry,
        "dtype": options.dtype,
    }
    with torch.inference_mode():
        model = random_model(GEOMETRIES[options.geometry], dtype=getattr(torch, options.dtype))
        found["loaded_mib"] = torch.cuda.memory_allocated() / MIB
        decoder = Decoder(model, options.prompt + 2 * options.new + 2 * WARM_STEPS + 2)
        ids = torch.randint(0, model.config.vocab_size, (1, options.prompt), device="cuda")
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            decoder.prefill(ids)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        found["prefill_s"] = min(seconds)
        decoder.capture()
        for alpha in (1.0, 0.0):
            set_alpha(model, alpha)
            decoder.prefill(ids)
            took = []
            for _ in range(options.new):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                decoder.step()
                end.record()
                took.append((start, end))
            torch.cuda.synchronize()
            ms = statistics.median(start.elapsed_time(end) for start, end in took)
            read = bytes_per_token(model, options.prompt + options.new // 2)
            found[f"alpha {alpha:g}"] = {
                "median_ms": ms,
                "tokens_per_s": 1e3 / ms,
                "bytes_per_token": read,
                "gb_per_s": read / ms * 1e3 / GB,
            }
    found["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
    atomic_write_text(options.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "environment"}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
