"""How fast the kernels are on a card, and PyTorch's INT4 and dense products beside them.

Times are medians over replays of captured graphs, in microseconds of a launch. Each section fills
a dictionary of its own and adds lines to the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_run import Run, median_us, operand_sets, sets_for
from bench.kernel_cases import (
    DENSITY,
    SHAPES,
    Case,
    Operands,
    make_operands,
    random_layer,
    relative_error,
)
from libortho.kernels import autotune, int4pack, op
from libortho.kernels.compose import compose
from libortho.kernels.configs import DecodeConfig, reasoned
from libortho.kernels.decode import decode
from libortho.lattice import dequantize

PROMPT_TOKENS = 512
SEVERAL = (8, 4, 2)
GB = 1e9


def several_tokens(run: Run, found: dict[str, Any]) -> None:
    """8, 4 and 2 tokens at the shapes of 8B, with streams, and the peers at as many."""
    run.lines.append("8B, several tokens, with streams, float16 | us | int4pack us | dense us |")
    for tokens in SEVERAL:
        for name, shape in SHAPES["8B"].items():
            if run.left_s < 10:
                return
            case = Case(*shape, tokens, paired=True).with_streams(DENSITY)
            sets = operand_sets(case)
            rows = timed(run, case, sets, several_candidates(case))
            beside = peers(case, sets)
            found[f"{tokens} tokens, {name}"] = {
                "shape": [case.out_features, case.in_features],
                "tokens": tokens,
                "with_streams": rows,
                "peers": beside,
            }
            run.lines.append(
                f"  {tokens} {name:8s} | {rows[0]['us']} | {beside['int4pack_us']} | "
                f"{beside['dense_us']} | {short(DecodeConfig(**rows[0]['config']))}"
            )
            del sets
            torch.cuda.empty_cache()


def several_candidates(case: Case) -> list[DecodeConfig]:
    """The likelier of the candidates: these kernels take longest to build."""
    rows = {2: (4, 8), 4: (4, 8), 8: (2, 4)}[case.tokens]
    return [c for c in autotune.candidates(case.shape, case.tokens) if c.rows in rows]


def prompts(run: Run, found: dict[str, Any]) -> None:
    """Many tokens: composing the weight, the dense product, and both as a layer does them."""
    run.lines.append(
        f"8B, {PROMPT_TOKENS} tokens, bfloat16 | compose us, of copy | dense us | product us"
    )
    for name, case in prompt_cases().items():
        problem = run.compiler.problem(case, 60)
        if problem is not None:
            found[name] = {"reason": problem}
            continue
        sets = [make_operands(case, seed) for seed in range(3)]
        weights = [compose(*o[1:5], torch.bfloat16) for o in sets]
        calls: dict[str, list[Callable[[], Any]]] = {
            "compose_us": [lambda o=o: compose(*o[1:5], torch.bfloat16) for o in sets],
            "dense_us": [
                lambda o=o, w=w: F.linear(o.x, w) for o, w in zip(sets, weights, strict=True)
            ],
            "product_us": [lambda o=o: _product(o) for o in sets],
        }
        us = {key: median_us(these, launches=9) for key, these in calls.items()}
        moved = 2 * case.out_features * case.in_features + case.bytes_read
        of_copy = share(run, moved, us["compose_us"])
        found[name] = us | {"compose_share_of_copy": of_copy}
        run.lines.append(
            f"  {name:8s} | {us['compose_us']:.1f} {of_copy:.0%} | {us['dense_us']:.1f} | "
            f"{us['product_us']:.1f}"
        )


def prompt_cases() -> dict[str, Case]:
    return {
        name: Case(*shape, PROMPT_TOKENS, dtype="bfloat16").with_streams(DENSITY)
        for name, shape in SHAPES["8B"].items()
    }


def formats(run: Run, found: dict[str, Any]) -> None:
    """Other formats at about the shape of gate and up, one token, with streams."""
    run.lines.append("14336 x 4096, other formats, 1 token, with streams | us, of copy")
    for case in format_cases():
        if run.left_s < 10:
            break
        assert case.config is not None
        name = f"int{case.bits} g{case.group_size} {case.dtype}, {case.in_features} columns"
        row = timed(run, case, operand_sets(case), [case.config])[0]
        found[name] = row
        if row["us"] is not None:
            row["share_of_copy"] = share(run, case.bytes_read, row["us"])
            run.lines.append(f"  {name:36s} | {row['us']:6.2f} {row['share_of_copy']:.0%}")


def format_cases() -> list[Case]:
    """bfloat16, other group sizes, 8 bits and an odd width, with reasoned configs."""
    base = Case(14336, 4096)
    cases = [
        replace(base, dtype="bfloat16"),
        *(replace(base, group_size=size) for size in (32, 64, -1)),
        replace(base, bits=8),
        replace(base, in_features=4095),
    ]
    streams = [case.with_streams(DENSITY) for case in cases]
    return [replace(case, config=reasoned(case.shape, 1, 132)) for case in streams]


def eager(run: Run, found: dict[str, Any]) -> None:
    """Host time of a call outside of a graph: what a launch costs where nothing is captured."""
    layer = random_layer(Case(1024, 1024).with_streams(DENSITY), 0)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
    dense = torch.randn(1024, 1024, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        for name, call in (("layer", lambda: layer(x)), ("F.linear", lambda: F.linear(x, dense))):
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(300):
                call()
            found[f"{name}, host us"] = 1e6 * (time.perf_counter() - began) / 300
            torch.cuda.synchronize()
    run.lines.append("eager calls: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()))


def bandwidth(run: Run, found: dict[str, Any]) -> None:
    """Copying 2 GiB on the device: bytes read plus bytes written, GB/s (1e9).

    The larger of the driver's copy and of an elementwise kernel, which is the faster on some cards.
    """
    source = torch.ones(1 << 29, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {
        "memcpy_gb_per_s": lambda: target.copy_(source),
        "elementwise_gb_per_s": lambda: torch.neg(source, out=target),
    }
    for name, call in calls.items():
        us = median_us([call], launches=4)
        found[name] = 2 * source.numel() * source.element_size() / us * 1e6 / GB
    found["copy_gb_per_s"] = max(found.values())
    run.lines.append(
        "copy bandwidth, read plus written: "
        + ", ".join(f"{name} {value:.0f}" for name, value in found.items())
    )


# --- helpers ------------------------------------------------------------------------------------


def bare(operands: Operands) -> Operands:
    """The same base without streams."""
    none = operands.residual[0][:0], operands.residual[1][:0]
    return operands._replace(residual=none, private=none)


def calls(sets: Sequence[Operands], config: DecodeConfig) -> list[Callable[[], Tensor]]:
    return [lambda o=o: decode(*o, config) for o in sets]


def timed(
    run: Run, case: Case, sets: Sequence[Operands], candidates: Sequence[DecodeConfig]
) -> list[dict[str, Any]]:
    """Every candidate's time, fastest first; null with the reason where there is none."""
    rows: list[dict[str, Any]] = []
    for config in candidates:
        row: dict[str, Any] = {"config": asdict(config), "us": None}
        problem = run.compiler.problem(replace(case, config=config), min(90, run.left_s - 5))
        if problem is None:
            try:
                row["us"] = round(median_us(calls(sets, config), replays=5), 3)
            except Exception as error:  # too many registers, say
                problem = f"{type(error).__name__}: {error}"[:300]
        if problem is not None:
            row["reason"] = problem
        rows.append(row)
    return sorted(rows, key=lambda row: row["us"] or float("inf"))


def share(run: Run, moved_bytes: int, us: float) -> float:
    """Of the measured copy bandwidth."""
    return moved_bytes / us * 1e6 / GB / run.found["bandwidth"]["copy_gb_per_s"]


def short(config: DecodeConfig) -> str:
    flag = "+" if config.prefetch else ""
    return f"{config.rows},{config.warps},{config.words}{flag}"


def _product(operands: Operands) -> Tensor:
    x, lattice, residual, private, alpha, bias = operands
    weight = (lattice.packed, lattice.scales, lattice.zeros, *residual, *private, alpha)
    kind = lattice.bits, lattice.group_size, lattice.in_features
    return op.product(x, *weight, bias, *kind)


def peers(case: Case, sets: Sequence[Operands]) -> dict[str, Any]:
    """PyTorch's INT4 product on the same bases and the dense product, both in bfloat16."""
    found: dict[str, Any] = {"int4pack_us": None, "dense_us": None}
    x = torch.randn(case.tokens, case.in_features, device="cuda").bfloat16()
    reason = int4pack.why_not(case.shape, x.device, torch.bfloat16)
    if reason is None:
        try:
            for o in sets:
                int4pack.multiply(x, o.lattice)  # repacks
            calls = [lambda o=o: int4pack.multiply(x, o.lattice) for o in sets]
            found["int4pack_us"] = round(median_us(calls), 2)
            base = dequantize(sets[0].lattice)
            found["int4pack_error"] = relative_error(calls[0](), x.double() @ base.double().t())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
    if reason is not None:
        found["int4pack_reason"] = reason
    shape = (case.out_features, case.in_features)
    count = sets_for(2 * case.out_features * case.in_features)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    found["dense_us"] = round(median_us([lambda w=w: F.linear(x, w) for w in weights]), 2)
    return found
