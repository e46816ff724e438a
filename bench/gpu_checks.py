"""Whether the kernels are right on a card: float64 references, graphs, gradients, compilation."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_run import Run, capture
from bench.kernel_cases import (
    DTYPES,
    Case,
    make_operands,
    random_cases,
    random_layer,
    reference_weight,
)
from libortho.kernels import int4pack
from libortho.kernels.compose import compose
from libortho.kernels.decode import decode
from libortho.linear import OrthoLinear, set_alphas
from libortho.product import backend_of, lattice_of

CHECKS = random_cases(48, seed=2)
TOLERANCE = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 1e-4}
"""Largest relative error of a product: bfloat16 keeps 8 bits, so rounding alone leaves 2e-3."""
SHARE_OF_TIME = 0.25
"""Of the run's time, what the random cases may take."""
LAYERS_8B = 224
"""Linear layers of Llama 3 8B that are separated: 7 in each of 32."""


def relative_error(y: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """||y - expected|| over ||expected||, or over `scale` if that is more; inf for NaN."""
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y.double() - expected).norm()) / max(float(expected.norm()), scale)


def _strided(x: Tensor, seed: int) -> Tensor:
    """The same inputs as they were, with rows apart, or with columns apart."""
    if seed % 4 == 1:
        wide = x.new_full((x.shape[0], x.shape[1] + 16), torch.nan)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    return x.t().contiguous().t() if seed % 4 == 2 else x


def check_random(run: Run, found: dict[str, Any]) -> None:
    """Decode and compose against float64; outputs are NaN before they are written."""
    worst: dict[str, float] = {}
    failures: list[dict[str, Any]] = []
    found.update(checked=0, worst=worst, failures=failures)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is then full of NaN
    try:
        for seed, case in enumerate(CHECKS):
            if run.left_s < (1 - SHARE_OF_TIME) * run.seconds:
                break
            assert case.config is not None
            problems = [run.compiler.problem(c, 60) for c in (case, replace(case, config=None))]
            if any(problems):
                failures.append({"case": asdict(case), "compile": problems})
                continue
            operands = make_operands(case, seed, alpha=(1.0, 0.0, -2.5)[seed % 3])
            operands = operands._replace(x=_strided(operands.x, seed))
            if seed % 3 == 1:  # alpha is 0: what is in the stream must not be heard
                operands.private[1].fill_(torch.nan)
            weight = reference_weight(*operands[1:5])
            expected = operands.x.double() @ weight.t()
            if operands.bias is not None:
                expected += operands.bias.double()
            # Sums near 0 say nothing of a kernel: the size of their terms counts as well.
            size = (operands.x.double().square() @ weight.square().t()).sqrt()
            dense = compose(*operands[1:5], DTYPES[case.dtype])
            errors = {
                "decode": relative_error(
                    decode(*operands, case.config), expected, float(size.norm())
                ),
                "compose": relative_error(dense, weight),
            }
            found["checked"] += 1
            for kind, error in errors.items():
                key = f"{kind} {case.dtype}"
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= TOLERANCE[case.dtype]:
                    failures.append({"case": asdict(case), "seed": seed, kind: error})
    finally:
        torch.use_deterministic_algorithms(False)
    text = ", ".join(f"{key} {error:.1e}" for key, error in sorted(worst.items()))
    run.lines.append(
        f"random cases: {found['checked']} of {len(CHECKS)} checked, {len(failures)} failures; "
        f"worst relative errors: {text}"
    )


def _weight_of(layer: OrthoLinear) -> Tensor:
    """base + residual + alpha * private of a layer, float64."""
    private = layer.private_columns, layer.private_values
    residual = layer.residual_columns, layer.residual_values
    return reference_weight(lattice_of(layer), residual, private, layer.alpha)


def check_switching(run: Run, found: dict[str, Any]) -> None:
    """A captured graph follows alpha at its next replay; at 0 it is the bare layer, bit for bit."""
    case = Case(1024, 4096).with_streams(0.005)
    layer, bare = random_layer(case, 0), random_layer(case, 0)
    bare.set_private(bare.private_columns[:0], bare.private_values[:0])
    errors, same = {}, {}
    with torch.no_grad():
        for tokens in (1, 3, 100):
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
            layer.set_alpha(1.0)
            captured = capture([lambda x=x: layer(x)], launches=1)
            for alpha in (1.0, 0.0, 0.5, -3.0):
                layer.set_alpha(alpha)
                captured.graph.replay()
                expected = x.double() @ _weight_of(layer).t()
                name = f"{tokens} tokens, alpha {alpha}"
                errors[name] = relative_error(captured.results[0], expected)
                if alpha == 0.0:
                    same[f"{tokens} tokens"] = bool(torch.equal(captured.results[0], bare(x)))
        small = Case(8, 64, residual_slots=1, private_slots=1)
        layers = [random_layer(small, seed) for seed in range(LAYERS_8B)]
        took = []
        for alpha in (0.0, 1.0) * 10:
            torch.cuda.synchronize()
            began = time.perf_counter()
            set_alphas(layers, alpha)
            torch.cuda.synchronize()
            took.append(1e3 * (time.perf_counter() - began))
    followed = all(error <= TOLERANCE["float16"] for error in errors.values())
    switch_ms = statistics.median(took)
    found.update(errors=errors, zero_is_bare=same, followed=followed, switch_ms=switch_ms)
    run.lines.append(
        f"alpha under a graph: {'followed' if followed else 'WRONG'} (worst "
        f"{max(errors.values()):.1e}); at 0 bitwise the bare layer: {all(same.values())}; "
        f"{LAYERS_8B} layers switched in {switch_ms:.3f} ms"
    )


def check_layer(run: Run, found: dict[str, Any]) -> None:
    """A layer's forward and backward, PyTorch's INT4 product, and torch.compile."""
    layer = random_layer(replace(Case(512, 1024), has_bias=True).with_streams(0.01), 0)
    assert layer.bias is not None
    weight = _weight_of(layer)
    worst = 0.0
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens in (1, 8, 9, 100):
            x = torch.randn(tokens, 1024, device="cuda").to(DTYPES[dtype])
            with torch.no_grad():
                y = layer(x)
            error = relative_error(y, x.double() @ weight.t() + layer.bias.double())
            x.requires_grad_()
            layer(x).sum().backward()
            assert x.grad is not None
            gradient_error = relative_error(x.grad, weight.sum(0).expand_as(x))
            backend = backend_of(layer, tokens, DTYPES[dtype])
            found[f"{dtype}, {tokens} tokens"] = [error, gradient_error, *backend]
            worst = max(worst, error / TOLERANCE[dtype], gradient_error / TOLERANCE[dtype])
    run.lines.append(f"layer, forward and backward: worst error {worst:.2f} of what is allowed")

    x = torch.randn(3, 1024, device="cuda").bfloat16()
    base = random_layer(Case(512, 1024), 0)
    y = int4pack.multiply(x, lattice_of(base))
    found["int4pack_error"] = relative_error(y, x.double() @ _weight_of(base).t())
    run.lines.append(f"PyTorch's INT4 product, repacked: error {found['int4pack_error']:.1e}")

    if run.left_s > 60:
        x = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
        whole = torch.compile(layer, fullgraph=True)
        differences = []
        with torch.no_grad():
            for alpha in (1.0, 0.0):
                layer.set_alpha(alpha)
                differences.append(float((whole(x) - layer(x)).abs().max()))
        found["torch_compile_differences"] = differences
        run.lines.append(f"torch.compile(fullgraph=True): differences {differences}")
