"""Whether the kernels are right on a card: float64 references, graphs, gradients, compilation."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_run import Run, capture
from bench.kernel_cases import (
    DTYPES,
    Case,
    make_operands,
    random_cases,
    random_layer,
    reference_weight,
    relative_error,
)
from libortho.kernels import int4pack
from libortho.kernels.attention import attend
from libortho.kernels.compose import compose
from libortho.kernels.decode import decode
from libortho.kernels.overlap import overlapped, why_not
from libortho.kernels.pointwise import gated, rms_norm, rotate, write
from libortho.linear import OrthoLinear, set_alphas
from libortho.product import backend_of, lattice_of

CASES, CASES_SEED = 48, 2
"""Random cases, and what they are drawn from."""
TOLERANCE = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 1e-4}
"""Largest relative error of a product: bfloat16 keeps 8 bits, so rounding alone leaves 2e-3."""
SHARE_OF_TIME = 0.25
"""Of the run's time, what the random cases may take."""
LAYERS_8B = 224
"""Linear layers of Llama 3 8B that are separated: 7 in each of 32."""


def _strided(x: Tensor, seed: int) -> Tensor:
    """The same inputs as they were, with rows apart, or with columns apart."""
    if seed % 4 == 1:
        wide = x.new_full((x.shape[0], x.shape[1] + 16), torch.nan)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]
    return x.t().contiguous().t() if seed % 4 == 2 else x


def check_random(run: Run, found: dict[str, Any]) -> None:
    """Decode and compose against float64; outputs are NaN before they are written."""
    cases = random_cases(CASES, CASES_SEED)[: run.cases]
    worst: dict[str, float] = {}
    failures: list[dict[str, Any]] = []
    found.update(checked=0, worst=worst, failures=failures)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is then full of NaN
    try:
        for seed, case in enumerate(cases):
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
        f"random cases: {found['checked']} of {len(cases)} checked, {len(failures)} failures; "
        f"worst relative errors: {text}"
    )


BETWEEN = ((1, 1, 512), (2, 1, 777), (1, 1, 5000), (3, 1, 64))
"""Sequences, tokens and length of the cache of each check of what lies between the products."""
CHAIN, CHAIN_ROUNDS = 24, 50
"""Blocks of a chain of launches, and inputs that it is replayed with."""


def check_between(run: Run, found: dict[str, Any]) -> None:
    """Norms, rotation, gate and attention against float64; what the mask leaves out is NaN."""
    heads, key_heads, dim, width = 32, 8, 128, 4096
    worst: dict[str, float] = {}

    def note(name: str, dtype: str, ours: Tensor, expected: Tensor) -> None:
        key = f"{name} {dtype}"
        worst[key] = max(worst.get(key, 0.0), relative_error(ours, expected))

    for seed, (batch, tokens, length) in enumerate(BETWEEN):
        for dtype in ("float16", "bfloat16"):
            generator = torch.Generator("cuda").manual_seed(seed)

            def draw(*shape: int, kind: str = dtype, source: Any = generator) -> Tensor:
                return torch.randn(*shape, device="cuda", generator=source).to(DTYPES[kind])

            x, weight = draw(batch, tokens, width), draw(width)
            full = x.double()
            normed = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + 1e-5)
            note("norm", dtype, rms_norm(x, weight, 1e-5), normed * weight.double())
            gate, up = draw(batch, tokens, 2 * 14336).split(14336, -1)
            note("gate", dtype, gated(gate, up), F.silu(gate.double()) * up.double())
            q, k = (draw(batch, tokens, n, dim).transpose(1, 2) for n in (heads, key_heads))
            cos, sin = draw(batch, tokens, dim), draw(batch, tokens, dim)
            for ours, before in zip(rotate(q, k, cos, sin), (q, k), strict=True):
                turned = torch.cat((-before[..., dim // 2 :], before[..., : dim // 2]), -1).double()
                c, s = (t.double()[:, None] for t in (cos, sin))
                note("rotation", dtype, ours, before.double() * c + turned * s)
            mask = torch.arange(length, device="cuda") < max(1, length - 99)
            mask = mask.expand(batch, 1, 1, length).clone()
            mask[0, ..., 0] = length < 100  # as a padded sequence has it
            keys, values = (draw(batch, key_heads, length, dim) for _ in range(2))
            known = [t.double().repeat_interleave(heads // key_heads, 1) for t in (keys, values)]
            for t in (keys, values):
                t.masked_fill_(~mask.transpose(2, 3), torch.nan)
            scores = (q.double() @ known[0].transpose(2, 3) * dim**-0.5).masked_fill(
                ~mask, -torch.inf
            )
            expected = (scores.softmax(-1) @ known[1]).transpose(1, 2)
            note("attention", dtype, attend(q, keys, values, mask, dim**-0.5), expected)
            new = [draw(batch, 1, 2 * key_heads, dim).transpose(1, 2) for _ in range(2)]
            new = [t[:, key_heads:] for t in new]  # strided, as parts of a fused product are
            expected = torch.cat([keys, values], 1).double()
            expected[:, :, length // 2] = torch.cat(new, 1).double()[:, :, 0]
            write(keys, values, *new, torch.tensor([length // 2], device="cuda"))
            together = torch.cat([keys, values], 1).double()
            note("cache", dtype, together.nan_to_num(0), expected.nan_to_num(0))
    wrong = [k for k, error in worst.items() if not error <= 2 * TOLERANCE[k.split()[1]]]
    found.update(worst=worst, wrong=wrong)
    run.lines.append(f"between products: {len(wrong)} of {len(worst)} wrong; {worst}")


def check_overlap(run: Run, found: dict[str, Any]) -> None:
    """A chain of launches that overlap gives, at each replay, the bits that it gives in turn."""
    reason = why_not(torch.device("cuda", 0))
    if reason is not None:
        found["skipped"] = reason
        return
    width = 4096
    up, down = (Case(*s, dtype="bfloat16") for s in ((2 * 3 * width, width), (width, 3 * width)))
    layers = [
        (random_layer(up.with_streams(0.005), 2 * i), random_layer(down.with_streams(0.005), i))
        for i in range(3)
    ]
    weight, wider = (torch.ones(n, device="cuda").bfloat16() for n in (width, 3 * width))
    x = torch.randn(1, width, device="cuda").bfloat16()

    def chain() -> Tensor:
        y = x
        for i in range(CHAIN):
            wide, narrow = layers[i % len(layers)]
            gate, value = wide(rms_norm(y, weight, 1e-5)).split(3 * width, -1)
            y = narrow(rms_norm(gated(gate, value), wider, 1e-5))
        return y

    with torch.no_grad():
        in_turn = capture([chain], 1)
        with overlapped(x.device):
            together = capture([chain], 1)
    different, took = 0, {"in_turn_us": [], "overlapped_us": []}
    for seed in range(CHAIN_ROUNDS):
        generator = torch.Generator("cuda").manual_seed(seed)
        x.copy_(torch.randn(1, width, device="cuda", generator=generator))
        took["in_turn_us"].append(in_turn.replay_us())
        took["overlapped_us"].append(together.replay_us())
        different += not torch.equal(in_turn.results[0], together.results[0])
    finite = bool(in_turn.results[0].isfinite().all())
    found.update(chains=CHAIN_ROUNDS, different=different, finite=finite)
    found |= {name: statistics.median(values) for name, values in took.items()}
    run.lines.append(
        f"overlapped launches: {different} of {CHAIN_ROUNDS} chains of {4 * CHAIN} launches differ "
        f"(finite: {finite}); {found['in_turn_us']:.0f} us in turn, "
        f"{found['overlapped_us']:.0f} us overlapped"
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
