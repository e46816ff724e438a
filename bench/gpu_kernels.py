"""Check and time the kernels on a GPU: `python -m bench.gpu_kernels --out kernels.json`.

Checks every kernel against float64 on random shapes, then times decode at the layer shapes of
Llama 3 8B and Llama 3.2 3B for candidate configs, with PyTorch's INT4 product and dense products
on the same card beside them. Times are medians over replays of captured graphs that go round more
operands than the L2 cache holds. Stops in time: sections come in order of importance, and the file
is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.kernel_cases import (
    DTYPES,
    Case,
    Compiler,
    Operands,
    make_operands,
    random_cases,
    random_layer,
    reference_weight,
)
from libortho.files import atomic_write_text
from libortho.kernels import autotune, configs, dispatch, int4pack, op
from libortho.kernels.compose import compose
from libortho.kernels.configs import DecodeConfig
from libortho.kernels.decode import decode
from libortho.lattice import Lattice
from libortho.linear import set_alphas

SHAPES = {
    "8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
    },
    "3B": {
        "q, o": (3072, 3072),
        "k, v": (1024, 3072),
        "gate, up": (8192, 3072),
        "down": (3072, 8192),
    },
}
"""(out_features, in_features)."""
DENSITY = 0.005
"""Share of a row's entries in each of the two streams."""
TOLERANCE = {"float16": 1e-3, "bfloat16": 4e-3, "float32": 1e-4}
"""Largest relative error of a product: bfloat16 keeps 8 bits, so rounding alone leaves 2e-3."""
CACHES = 3
"""Times the L2 cache that the operands of a timing take."""
REPLAYS = 9
PROMPT_TOKENS = 512
LAYERS_8B = 224
GB = 1e9


class Run:
    """What was found so far, and the time that is left."""

    def __init__(self, out: Path, seconds: float, compiler: Compiler) -> None:
        self.out, self.compiler = out, compiler
        self.began = time.monotonic()
        self.seconds = seconds
        self.found: dict[str, Any] = {"environment": environment()}
        self.lines: list[str] = []

    @property
    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def section(self, name: str, measure: Callable[[Run], Any]) -> None:
        """Run one section and write the file; a failure is its result."""
        if self.left_s < 5:
            self.found[name] = {"skipped": "no time left"}
            return
        began = time.monotonic()
        try:
            self.found[name] = measure(self)
        except Exception as error:
            self.found[name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            self.lines.append(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}")
        self.found.setdefault("section_seconds", {})[name] = round(time.monotonic() - began, 1)
        self.found["compiled"] = self.compiler.counts()
        atomic_write_text(self.out, json.dumps(self.found, indent=1, default=str) + "\n")


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "command": "python -m bench.gpu_kernels",
    }


# --- timing -------------------------------------------------------------------------------------


def captured(calls: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of all calls in order, warmed up, and what they return."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    return graph, results


def replay_us(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    """Microseconds of a launch in one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / launches


def median_us(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    graph, _ = captured(calls)
    return statistics.median(replay_us(graph, len(calls)) for _ in range(replays))


def operand_sets(case: Case) -> list[Operands]:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, -(-CACHES * l2 // case.bytes_read))
    return [make_operands(case, seed) for seed in range(count)]


def bare(operands: Operands) -> Operands:
    """The same base without streams."""
    none = operands.residual[0][:0], operands.residual[1][:0]
    return operands._replace(residual=none, private=none)


def decode_calls(sets: Sequence[Operands], config: DecodeConfig) -> list[Callable[[], Tensor]]:
    return [lambda o=o: decode(*o, config) for o in sets]


# --- checks -------------------------------------------------------------------------------------


def relative_error(y: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y.double() - expected).norm() / expected.norm())


def check_random(run: Run) -> dict[str, Any]:
    """Decode and compose against float64; outputs are NaN before they are written."""
    worst: dict[str, float] = {}
    failures: list[dict[str, Any]] = []
    checked = 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is then full of NaN
    try:
        for seed, case in enumerate(CHECKS):
            if run.left_s < 0.75 * run.seconds:
                break
            problem = run.compiler.ready(case, 60)
            if problem is not None:
                failures.append({"case": asdict(case), "compile": problem})
                continue
            operands = make_operands(case, seed, alpha=(1.0, 0.0, -2.5)[seed % 3])
            if seed % 4 == 1:  # rows apart
                wide = torch.full((case.tokens, case.in_features + 5), torch.nan, device="cuda")
                wide = wide.to(operands.x.dtype)
                wide[:, : case.in_features] = operands.x
                operands = operands._replace(x=wide[:, : case.in_features])
            elif seed % 4 == 2:  # columns apart
                operands = operands._replace(x=operands.x.t().contiguous().t())
            if seed % 3 == 1:  # alpha is 0: what is in the stream must not be heard
                operands.private[1].fill_(torch.nan)
            assert case.config is not None
            weight = reference_weight(operands)
            expected = operands.x.double() @ weight.t()
            if operands.bias is not None:
                expected += operands.bias.double()
            # Sums near 0 say nothing of a kernel: measure against the size of their terms.
            size = (operands.x.double().square() @ weight.square().t()).sqrt()
            scale = max(float(expected.norm()), float(size.norm()))
            y = decode(*operands, case.config)
            dense = compose(*operands[1:5], DTYPES[case.dtype])
            errors = {
                "decode": relative_error(y, expected) * float(expected.norm()) / scale,
                "compose": relative_error(dense, weight),
            }
            torch.cuda.synchronize()
            checked += 1
            for kind, error in errors.items():
                key = f"{kind} {case.dtype}"
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= TOLERANCE[case.dtype]:
                    failures.append({"case": asdict(case), "seed": seed, kind: error})
    finally:
        torch.use_deterministic_algorithms(False)
    text = ", ".join(f"{key} {error:.1e}" for key, error in sorted(worst.items()))
    run.lines.append(f"checked {checked} random cases, {len(failures)} failed; worst: {text}")
    return {"checked": checked, "worst": worst, "failures": failures}


def check_switching(run: Run) -> dict[str, Any]:
    """alpha under a captured graph: the next replay follows it, and 0 is the bare layer."""
    case = Case(1024, 4096).with_streams(DENSITY)
    layer, other = random_layer(case, 0), random_layer(case, 0)
    other.private_columns, other.private_values = (
        other.private_columns[:0],
        other.private_values[:0],
    )
    result: dict[str, Any] = {}
    with torch.no_grad():
        for tokens in (1, 3, PROMPT_TOKENS):
            x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
            layer.set_alpha(1.0)
            graph, (y,) = captured([lambda x=x: layer(x)])
            for alpha in (1.0, 0.0, 0.5, -3.0):
                layer.set_alpha(alpha)
                graph.replay()
                operands = Operands(
                    x,
                    Lattice(layer.packed, layer.scales, layer.zeros, 4, 128, 4096),
                    (layer.residual_columns, layer.residual_values),
                    (layer.private_columns, layer.private_values),
                    layer.alpha,
                    None,
                )
                expected = x.double() @ reference_weight(operands).t()
                result[f"{tokens} tokens, alpha {alpha}"] = relative_error(y, expected)
                if alpha == 0.0:
                    result[f"{tokens} tokens, 0 is bare"] = bool(torch.equal(y, other(x)))
        layers = [layer] + [random_layer(Case(8, 64).with_streams(0.1), i) for i in range(223)]
        took = []
        for alpha in (0.0, 1.0) * 10:
            torch.cuda.synchronize()
            began = time.perf_counter()
            set_alphas(layers, alpha)
            torch.cuda.synchronize()
            took.append(1e3 * (time.perf_counter() - began))
        result[f"switching {LAYERS_8B} layers, ms"] = statistics.median(took)
    good = all(v <= TOLERANCE["float16"] for k, v in result.items() if "alpha" in k)
    same = [v for k, v in result.items() if "bare" in k]
    run.lines.append(
        f"switching under a graph: {'followed' if good else 'WRONG'}; alpha = 0 equals the bare "
        f"layer bitwise: {same}; {took[-1]:.3f} ms for {LAYERS_8B} layers"
    )
    return result


def check_layer(run: Run) -> dict[str, Any]:
    """A layer's own forward and backward on the GPU, and under torch.compile."""
    case = replace(Case(512, 1024), has_bias=True).with_streams(0.01)
    layer = random_layer(case, 0)
    result: dict[str, Any] = {}
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens in (1, 8, 9, 100):
            x = torch.randn(tokens, 1024, device="cuda").to(DTYPES[dtype]).requires_grad_()
            with torch.no_grad():
                y = layer(x)
            weight = layer.effective_weight(torch.float32).double()
            expected = x.detach().double() @ weight.t() + layer.bias.double()
            layer(x).sum().backward()
            assert x.grad is not None
            gradient = weight.sum(0).expand_as(x)
            result[f"{dtype}, {tokens} tokens"] = {
                "error": relative_error(y, expected),
                "gradient_error": relative_error(x.grad, gradient),
                "backend": dispatch.choose(
                    Lattice(layer.packed, layer.scales, layer.zeros, 4, 128, 1024),
                    DTYPES[dtype],
                    tokens,
                ),
            }
    worst = max(max(v["error"], v["gradient_error"]) for v in result.values())
    run.lines.append(f"layer forward and backward: worst error {worst:.1e}")
    if run.left_s > 60:
        x = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
        whole = torch.compile(layer, fullgraph=True)
        with torch.no_grad():
            error = float((whole(x) - layer(x)).abs().max())
            layer.set_alpha(0.0)
            error = max(error, float((whole(x) - layer(x)).abs().max()))
        result["torch.compile, largest difference"] = error
        run.lines.append(f"torch.compile(fullgraph=True): largest difference {error:.1e}")
    return result


# --- measurements -------------------------------------------------------------------------------


def copy_bandwidth(run: Run) -> dict[str, float]:
    """Bytes read plus bytes written of a device-to-device copy of 1 GiB, GB/s (1e9)."""
    source = torch.randint(0, 127, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    us = median_us([lambda: target.copy_(source)], 21)
    result = {"copy_gb_per_s": 2 * source.numel() / us * 1e6 / GB, "copy_us": us}
    run.lines.append(f"copy bandwidth: {result['copy_gb_per_s']:.0f} GB/s (read + written)")
    return result


def tuned(
    run: Run, case: Case, sets: Sequence[Operands], candidates: Sequence[DecodeConfig]
) -> list[dict[str, Any]]:
    """Every candidate's time on these operands, fastest first."""
    rows: list[dict[str, Any]] = []
    for config in candidates:
        problem = run.compiler.ready(replace(case, config=config), min(90, run.left_s - 5))
        row: dict[str, Any] = {"config": asdict(config)}
        if problem is not None:
            row |= {"us": None, "reason": problem}
        else:
            try:
                row["us"] = median_us(decode_calls(sets, config), 5)
            except Exception as error:
                row |= {"us": None, "reason": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    return sorted(rows, key=lambda row: row["us"] or float("inf"))


def single_token(run: Run, family: str) -> dict[str, Any]:
    """One token: base alone, with streams at alpha 1 and 0, and the peers."""
    bandwidth = run.found["bandwidth"]["copy_gb_per_s"]
    result: dict[str, Any] = {}
    run.lines.append(
        f"{family}, 1 token, float16 | base us, % of copy | +streams us, ratio | alpha=0 us | "
        "int4pack us | dense us | config"
    )
    for name, (rows, columns) in SHAPES[family].items():
        if run.left_s < 10:
            break
        case = Case(rows, columns).with_streams(DENSITY)
        plain = Case(rows, columns)
        candidates = autotune.candidates(case.shape, 1)
        sets = operand_sets(case)
        with_streams = tuned(run, case, sets, candidates)
        without = tuned(run, plain, [bare(o) for o in sets], candidates)
        best, base_best = with_streams[0], without[0]
        config = DecodeConfig(**best["config"])
        # The same replays in turn, so that the ratio is not one of moments.
        graphs = {
            "base": captured(
                decode_calls([bare(o) for o in sets], DecodeConfig(**base_best["config"]))
            )[0],
            "base, same config": captured(decode_calls([bare(o) for o in sets], config))[0],
            "streams": captured(decode_calls(sets, config))[0],
        }
        times: dict[str, list[float]] = {key: [] for key in (*graphs, "alpha 0")}
        for _ in range(2 * REPLAYS):
            for key, graph in graphs.items():
                times[key].append(replay_us(graph, len(sets)))
            for o in sets:
                o.alpha.zero_()
            times["alpha 0"].append(replay_us(graphs["streams"], len(sets)))
            for o in sets:
                o.alpha.fill_(1.0)
        us = {key: statistics.median(values) for key, values in times.items()}
        share = plain.bytes_read / us["base"] * 1e6 / GB / bandwidth
        result[name] = {
            "shape": [rows, columns],
            "us": us,
            "ratio_streams_to_base": us["streams"] / us["base"],
            "base_bytes": plain.bytes_read,
            "base_share_of_copy_bandwidth": share,
            "streams_share_of_copy_bandwidth": case.bytes_read
            / us["streams"]
            * 1e6
            / GB
            / bandwidth,
            "operand_sets": len(sets),
            "reasoned": asdict(
                configs.reasoned(case.shape, 1, run.found["environment"]["multiprocessors"])
            ),
            "with_streams": with_streams,
            "base_alone": without,
            "peers": peers(case, sets, 1),
        }
        peer = result[name]["peers"]
        run.lines.append(
            f"  {name:9s} {us['base']:6.2f} {100 * share:4.0f} % | {us['streams']:6.2f} "
            f"{us['streams'] / us['base']:.3f} | {us['alpha 0']:6.2f} | {peer['int4pack_us']} | "
            f"{peer['dense_us']} | {tuple(best['config'].values())} base "
            f"{tuple(base_best['config'].values())}"
        )
        del sets, graphs
        torch.cuda.empty_cache()
    return result


def peers(case: Case, sets: Sequence[Operands], tokens: int) -> dict[str, Any]:
    """PyTorch's INT4 product on the same bases (bfloat16, no streams), and the dense product."""
    x16 = [torch.randn(tokens, case.in_features, device="cuda").bfloat16() for _ in sets]
    result: dict[str, Any] = {"int4pack_us": None, "dense_us": None}
    refusal = int4pack.why_not(case.shape, torch.device("cuda", 0), torch.bfloat16)
    if refusal is None:
        for x, o in zip(x16, sets, strict=True):
            int4pack.multiply(x, o.lattice)  # repacks
        calls = [
            lambda x=x, o=o: int4pack.multiply(x, o.lattice) for x, o in zip(x16, sets, strict=True)
        ]
        result["int4pack_us"] = round(median_us(calls), 2)
    else:
        result["int4pack_reason"] = refusal
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, -(-CACHES * l2 // (2 * case.out_features * case.in_features)))
    shape = (case.out_features, case.in_features)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = x16[0]
    result["dense_us"] = round(median_us([lambda w=w: F.linear(x, w) for w in weights]), 2)
    return result


def prompts(run: Run) -> dict[str, Any]:
    """512 tokens: composing the weight, the dense product, and both as the layer does them."""
    bandwidth = run.found["bandwidth"]["copy_gb_per_s"]
    result: dict[str, Any] = {}
    run.lines.append(
        f"8B, {PROMPT_TOKENS} tokens, bfloat16 | compose us, % of copy | dense us | product us"
    )
    for name, (rows, columns) in SHAPES["8B"].items():
        case = replace(
            Case(rows, columns, PROMPT_TOKENS, dtype="bfloat16"), config=None
        ).with_streams(DENSITY)
        problem = run.compiler.ready(case, 60)
        if problem is not None:
            result[name] = {"reason": problem}
            continue
        sets = [make_operands(case, seed) for seed in range(4)]
        compose_us = median_us([lambda o=o: compose(*o[1:5], torch.bfloat16) for o in sets])
        dense = [compose(*o[1:5], torch.bfloat16) for o in sets]
        dense_us = median_us(
            [lambda o=o, w=w: F.linear(o.x, w) for o, w in zip(sets, dense, strict=True)]
        )

        def product(o: Operands) -> Tensor:
            la = o.lattice
            return op.product(
                o.x,
                la.packed,
                la.scales,
                la.zeros,
                *o.residual,
                *o.private,
                o.alpha,
                None,
                4,
                128,
                la.in_features,
            )

        product_us = median_us([lambda o=o: product(o) for o in sets])
        written = 2 * rows * columns + case.bytes_read
        share = written / compose_us * 1e6 / GB / bandwidth
        result[name] = {
            "compose_us": compose_us,
            "compose_share_of_copy_bandwidth": share,
            "dense_us": dense_us,
            "product_us": product_us,
        }
        run.lines.append(
            f"  {name:9s} {compose_us:7.1f} {100 * share:4.0f} % | {dense_us:7.1f} | "
            f"{product_us:7.1f}"
        )
    return result


def several_tokens(run: Run) -> dict[str, Any]:
    """2, 4 and 8 tokens at the shapes of 8B, with streams, and the peers at as many."""
    result: dict[str, Any] = {}
    run.lines.append(
        "8B, several tokens, float16 with streams | us | int4pack us | dense us | config"
    )
    for tokens in (8, 4, 2):
        for name, (rows, columns) in SHAPES["8B"].items():
            if run.left_s < 10:
                return result
            case = Case(rows, columns, tokens).with_streams(DENSITY)
            sets = operand_sets(case)
            found = tuned(run, case, sets, several_candidates(case))
            peer = peers(case, sets, tokens)
            result[f"{tokens} tokens, {name}"] = {"candidates": found, "peers": peer}
            us = found[0]["us"]
            run.lines.append(
                f"  {tokens} {name:9s} {us and round(us, 2)} | {peer['int4pack_us']} | "
                f"{peer['dense_us']} | {tuple(found[0]['config'].values())}"
            )
            del sets
            torch.cuda.empty_cache()
    return result


def several_candidates(case: Case) -> list[DecodeConfig]:
    """The likelier half of the candidates: these kernels take longest to build."""
    rows = {2: (4, 8), 4: (4, 8), 8: (2, 4, 8)}[case.tokens]
    return [c for c in autotune.candidates(case.shape, case.tokens) if c.rows in rows]


def formats(run: Run) -> dict[str, Any]:
    """Other formats at gate/up's shape, one token, with streams: reasoned configs."""
    result: dict[str, Any] = {}
    run.lines.append("14336 x 4096, other formats, 1 token, with streams | us | % of copy")
    bandwidth = run.found["bandwidth"]["copy_gb_per_s"]
    for case in FORMATS:
        if run.left_s < 10:
            break
        problem = run.compiler.ready(case, 60)
        name = f"{case.bits} bits, groups of {case.group_size}, {case.dtype}"
        if problem is not None:
            result[name] = {"us": None, "reason": problem}
            continue
        sets = operand_sets(case)
        assert case.config is not None
        us = median_us(decode_calls(sets, case.config))
        share = case.bytes_read / us * 1e6 / GB / bandwidth
        result[name] = {"us": us, "share_of_copy_bandwidth": share, "config": asdict(case.config)}
        run.lines.append(f"  {name:38s} {us:6.2f} {100 * share:4.0f} %")
        del sets
        torch.cuda.empty_cache()
    return result


def eager_overhead(run: Run) -> dict[str, float]:
    """Host time of a call outside of a graph: what a launch costs where nothing is captured."""
    layer = random_layer(Case(1024, 1024).with_streams(DENSITY), 0)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
    dense = torch.randn(1024, 1024, device="cuda", dtype=torch.float16)
    result = {}
    with torch.inference_mode():
        for name, call in (("layer", lambda: layer(x)), ("F.linear", lambda: F.linear(x, dense))):
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(300):
                call()
            result[f"{name}, host us a call"] = 1e6 * (time.perf_counter() - began) / 300
            torch.cuda.synchronize()
    run.lines.append(f"eager: {', '.join(f'{k} {v:.1f}' for k, v in result.items())}")
    return result


def measured_table(run: Run) -> str:
    """The winners as lines for `configs.MEASURED`."""
    lines = []
    for section in ("8B, 1 token", "3B, 1 token"):
        for shape in run.found.get(section, {}).values():
            if (
                isinstance(shape, dict)
                and "with_streams" in shape
                and shape["with_streams"][0]["us"]
            ):
                config = DecodeConfig(**shape["with_streams"][0]["config"])
                lines.append(f"({shape['shape'][0]}, {shape['shape'][1]}, 1): {config},")
    for name, shape in run.found.get("several tokens", {}).items():
        if isinstance(shape, dict) and shape.get("candidates") and shape["candidates"][0]["us"]:
            tokens, layer = name.split(" tokens, ")
            rows, columns = SHAPES["8B"][layer]
            config = DecodeConfig(**shape["candidates"][0]["config"])
            lines.append(f"({rows}, {columns}, {tokens}): {config},")
    return "\n".join(lines)


CHECKS = random_cases(64, seed=2)


def _format_cases() -> list[Case]:
    base = Case(14336, 4096).with_streams(DENSITY)
    cases = [
        replace(base, dtype="bfloat16"),
        *(replace(base, group_size=size) for size in (32, 64, -1)),
        replace(base, bits=8),
        replace(base, in_features=4095),
    ]
    return [replace(c, config=configs.reasoned(c.shape, 1, 132)) for c in cases]


FORMATS = _format_cases()


def plan() -> list[Case]:
    """Everything to build, in the order in which it is needed."""
    cases = list(CHECKS)
    cases += [replace(case, config=None, tokens=1) for case in CHECKS]
    for family, shapes in SHAPES.items():
        for rows, columns in shapes.values():
            streams = Case(rows, columns).with_streams(DENSITY)
            candidates = autotune.candidates(streams.shape, 1)
            cases += [
                replace(c, config=k) for c in (streams, Case(rows, columns)) for k in candidates
            ]
        if family == "8B":
            for rows, columns in SHAPES["8B"].values():
                prompt = Case(rows, columns, PROMPT_TOKENS, dtype="bfloat16").with_streams(DENSITY)
                cases.append(prompt)
            for tokens in (8, 4, 2):
                for rows, columns in SHAPES["8B"].values():
                    case = Case(rows, columns, tokens).with_streams(DENSITY)
                    cases += [replace(case, config=k) for k in several_candidates(case)]
    return cases + FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file is written")
    parser.add_argument("--seconds", type=float, default=420.0, help="time that may be taken")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    os.environ.setdefault("LIBORTHO_CACHE", tempfile.mkdtemp())
    compiler = Compiler(options.processes)
    compiler.submit(plan())
    run = Run(options.out, options.seconds, compiler)
    try:
        run.section("bandwidth", copy_bandwidth)
        run.section("checks", check_random)
        run.section("switching", check_switching)
        run.section("8B, 1 token", lambda r: single_token(r, "8B"))
        run.section("layer", check_layer)
        run.section("prompts", prompts)
        run.section("eager", eager_overhead)
        run.section("3B, 1 token", lambda r: single_token(r, "3B"))
        run.section("several tokens", several_tokens)
        run.section("formats", formats)
    finally:
        compiler.close()
    run.found["measured_table"] = measured_table(run)
    run.section("end", lambda r: {"left_s": r.left_s})
    print(run.found["measured_table"])  # noqa: T201
    print("\n".join(run.lines))  # noqa: T201


if __name__ == "__main__":
    main()
