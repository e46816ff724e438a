"""Decode Llamas of random weights by `generate` on a GPU: `python -m bench.gpu_decode --out F`.

At the exact geometry of Llama 3 8B and Llama 3.2 3B: INT4 in groups of 128 with 0.5 % residual and
0.5 % private, and its peers beside it on the same card: bitsandbytes NF4 as its users run it and on
captured steps, PyTorch's INT4 product, GemLite and 16-bit weights on captured steps. Stops in time:
sections come in order of importance, and the file is written after each.

`--device cpu --geometry tiny` rehearses it without a card.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.decode_models import DENSITY, GEOMETRIES, GROUP_SIZE
from bench.decode_timings import Conditions, decode, switching, transformers_compile
from bench.gpu_run import Run, Section
from bench.gpu_timings import bandwidth
from bench.kernel_cases import Case
from bench.kernel_compiler import Compiler
from libortho.kernels.configs import default_config
from libortho.kernels.op import rows_at_once
from libortho.profiles import prepare_environment

CAP_GIB = 5.0
"""Memory that PyTorch may reserve where the cap is on: what a 6 GB card leaves."""


def sections(conditions: Conditions, geometries: list[str]) -> dict[str, Section]:
    """What is done, in the order of importance."""
    found: dict[str, Callable[..., None]] = {}
    first, *others = geometries

    def add(name: str, measure: Callable[..., None], geometry: str, **options: object) -> None:
        found[f"{geometry} {name}"] = functools.partial(measure, conditions, geometry, **options)

    for geometry in (first, *others):
        add("ortho", decode, geometry, kind="ortho")
        add("ortho, INT8 head, capped", decode, geometry, kind="ortho", head_bits=8, cap=CAP_GIB)
        add("switching", switching, geometry)
        add("nf4, eager", decode, geometry, kind="nf4", captured=False)
        add("int4pack", decode, geometry, kind="int4pack")
    for geometry in (first, *others):
        add("dense", decode, geometry, kind="dense")
        add("nf4", decode, geometry, kind="nf4")
        add("gemlite", decode, geometry, kind="gemlite")
    add("ortho, FP16 head, capped", decode, geometries[-1], kind="ortho", cap=CAP_GIB)
    add("ortho, transformers' compile", transformers_compile, geometries[-1])
    return found


def kernels(geometry: str, dtype: str) -> list[Case]:
    """What has to be compiled for a geometry's layers, fused ones included."""
    sizes = GEOMETRIES[geometry]
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", width // sizes["num_attention_heads"])
    key, query = (head * sizes[f"num_{n}_heads"] for n in ("key_value", "attention"))
    properties = torch.cuda.get_device_properties(0)
    card = (properties.major, properties.minor), properties.multi_processor_count
    few = [(query + 2 * key, width), (width, query), (2 * inner, width), (width, inner)]
    many = [(query, width), (key, width), (width, query), (inner, width), (width, inner)]
    cases = []
    for shape in few:
        case = Case(*shape, group_size=GROUP_SIZE, dtype=dtype, overlap=True, paired=True)
        case = case.with_streams(DENSITY)
        cases.append(replace(case, config=default_config(case.shape, 1, *card).config))
    parts = dict.fromkeys((rows_at_once(*shape), shape[1]) for shape in many)
    dense = [Case(*part, group_size=GROUP_SIZE, dtype=dtype) for part in parts]
    return cases + [case.with_streams(DENSITY) for case in dense]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file is written")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), nargs="+", default=["8B", "3B"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens, half-way through decoding"
    )
    parser.add_argument("--new", type=int, default=128, help="tokens that are decoded")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timings, of which the median counts"
    )
    parser.add_argument("--only", nargs="+", help="sections whose names contain one of these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=230.0, help="time that may be taken")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    # Nothing that was tuned before may enter, and the platform's folder need not exist.
    os.environ["LIBORTHO_CACHE"] = tempfile.mkdtemp()
    prepare_environment()
    on_card = options.device == "cuda"
    device = torch.device("cuda", 0) if on_card else torch.device("cpu")
    conditions = Conditions(
        device, getattr(torch, options.dtype), options.context, options.new, options.repeats
    )
    capability = torch.cuda.get_device_capability(0) if on_card else (9, 0)
    compiler = Compiler(options.processes, 10 * capability[0] + capability[1])
    if on_card:
        for geometry in options.geometry:
            compiler.submit(kernels(geometry, options.dtype))
    run = Run("bench.gpu_decode", options.out, options.seconds, compiler)
    run.found |= {"weights": "random", "conditions": conditions.described()}
    try:
        if on_card:
            run.section("bandwidth", bandwidth)
        for name, measure in sections(conditions, options.geometry).items():
            if options.only is None or any(part in name for part in options.only):
                run.section(name, measure)
    finally:
        compiler.close()
    print("\n".join(run.lines))  # noqa: T201


if __name__ == "__main__":
    main()
