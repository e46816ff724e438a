"""Speed on a card at Llama's exact shapes with random weights: kernels, `generate`, peers, files.

`pytest bench/test_runtime.py --benchmark-json=out.json`. pytest-benchmark records the times; what a
launch or a token reads, and what share that is of the card's copy bandwidth, go into `extra_info`.
`gpu_kernels.py`, `gpu_decode.py` and `gpu_memory.py` measure more of it, by the same functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import libortho
from bench.decode_models import GEOMETRIES, bytes_per_token, random_model, why_not
from bench.kernel_cases import DENSITY, SHAPES, Case
from libortho.decoding import accelerate_decoding
from libortho.hardware import release_memory
from libortho.switch import set_alpha

pytestmark = pytest.mark.gpu

ROUNDS = 5
NEW_TOKENS = 64
CONTEXT = 512
GB = 1e9
FAMILIES = ("8B", "3B")
SHAPES_OF = [(family, name) for family in FAMILIES for name in SHAPES[family]]
OURS = {"base": None, "alpha1": 1.0, "alpha0": 0.0}
"""Sides of a kernel, and their alpha; the base has no streams."""
MODELS = {
    # what is timed: (kind of layer, alpha, whether steps are captured)
    "alpha1": ("ortho", 1.0, True),
    "alpha0": ("ortho", 0.0, True),
    "int4pack": ("int4pack", None, True),
    "gemlite": ("gemlite", None, True),
    "nf4": ("nf4", None, True),
    "nf4-eager": ("nf4", None, False),
    "dense": ("dense", None, True),
}


@pytest.fixture(scope="module")
def copy_gb_per_s() -> float:
    """The card's bandwidth, bytes read plus bytes written."""
    from bench.gpu_run import median_us  # noqa: PLC0415 - imports Triton

    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    us = median_us([lambda: torch.neg(source, out=target)], launches=4)
    return 2 * source.numel() * source.element_size() / us * 1e6 / GB


@pytest.mark.benchmark(group="kernel")
@pytest.mark.parametrize("side", [*OURS, "int4pack", "dense"])
@pytest.mark.parametrize(("family", "layer"), SHAPES_OF, ids=["-".join(s) for s in SHAPES_OF])
def test_kernel(family: str, layer: str, side: str, copy_gb_per_s: float, benchmark: Any) -> None:
    """One token through a layer: a replay of a graph of launches, each on other operands.

    All of our sides take the config that decoding takes.
    """
    from bench.gpu_run import capture, operand_sets, sets_for  # noqa: PLC0415 - imports Triton

    plain = Case(*SHAPES[family][layer])
    case = plain if side == "base" else replace(plain, paired=True).with_streams(DENSITY)
    if side == "dense":
        shape = plain.out_features, plain.in_features
        read = 2 * shape[0] * shape[1]
        x = torch.randn(1, shape[1], device="cuda").bfloat16()
        weights = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets_for(read))
        ]
        calls: list[Callable[[], Any]] = [lambda w=w: F.linear(x, w) for w in weights]
    elif side == "int4pack":
        read, calls = plain.bytes_read, _int4pack_calls(plain)
    else:
        from libortho.kernels.autotune import config_for  # noqa: PLC0415
        from libortho.kernels.decode import decode  # noqa: PLC0415

        read, sets = case.bytes_read, operand_sets(case)
        if side == "alpha0":
            read -= case.private_slots * case.out_features * 4
            for operands in sets:
                operands.alpha.zero_()
        one = sets[0]
        config = config_for(one.lattice, one.x, one.residual, one.private, one.alpha)
        calls = [lambda o=o: decode(*o, config) for o in sets]
        benchmark.extra_info["config"] = str(config)
    captured = capture(calls)

    def replay() -> None:
        captured.graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=ROUNDS, warmup_rounds=1)
    us = sorted(captured.replay_us() for _ in range(ROUNDS))[ROUNDS // 2]
    benchmark.extra_info.update(
        shape=[plain.out_features, plain.in_features],
        launches=captured.launches,
        us_per_launch=us,
        bytes_per_launch=read,
        copy_gb_per_s=copy_gb_per_s,
        share_of_copy=read / us * 1e6 / GB / copy_gb_per_s,
        weights="random",
    )


def _int4pack_calls(case: Case) -> list[Callable[[], Any]]:
    from bench.gpu_run import operand_sets  # noqa: PLC0415 - imports Triton
    from libortho.kernels import int4pack  # noqa: PLC0415

    device, dtype = torch.device("cuda", 0), torch.bfloat16
    reason = int4pack.why_not(case.shape, device, dtype)
    if reason is not None:
        pytest.skip(f"PyTorch's INT4 product does not take this: {reason}")
    x = torch.randn(1, case.in_features, device=device, dtype=dtype)
    sets = operand_sets(case)
    for operands in sets:
        int4pack.multiply(x, operands.lattice)  # repacks
    return [lambda o=o: int4pack.multiply(x, o.lattice) for o in sets]


@pytest.fixture(scope="module")
def random_llama() -> Iterator[Callable[[str, str], Any]]:
    """Makes models of random weights and keeps the last one."""
    kept: dict[tuple[str, str, bool], Any] = {}

    def get(geometry: str, name: str) -> Any:
        kind, alpha, captured = MODELS[name]
        reason = why_not(kind)
        if reason is not None:
            pytest.skip(reason)
        key = geometry, kind, captured
        if key not in kept:
            kept.clear()
            release_memory()
            device = torch.device("cuda", 0)
            with torch.no_grad():
                model = random_model(geometry, kind, dtype=torch.bfloat16, device=device)
            if captured:
                accelerate_decoding(model, max_cache_len=CONTEXT + NEW_TOKENS)
            kept[key] = model
        if alpha is not None:
            set_alpha(kept[key], alpha)
        return kept[key]

    yield get
    kept.clear()
    release_memory()


@pytest.mark.benchmark(group="generate")
@pytest.mark.parametrize("new", [1, 1 + NEW_TOKENS], ids=["first-token", "tokens"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("geometry", FAMILIES)
def test_generate(
    geometry: str,
    name: str,
    new: int,
    random_llama: Callable[[str, str], Any],
    copy_gb_per_s: float,
    benchmark: Any,
) -> None:
    """Greedy `generate` after a prompt: time to the first token, and of it with the others."""
    from bench.decode_timings import (  # noqa: PLC0415 - imports Triton
        PROJECTED_GB_PER_S,
        Conditions,
        generated,
        prompt_of,
        seconds,
    )

    model = random_llama(geometry, name)
    device = torch.device("cuda", 0)
    conditions = Conditions(device, torch.bfloat16, CONTEXT, NEW_TOKENS, ROUNDS)
    ids = prompt_of(conditions, model)

    def generate(new: int = new) -> None:
        with torch.no_grad():
            out = generated(model, ids, new, min_new_tokens=new)
        torch.cuda.synchronize()
        assert out.shape[1] == ids.shape[1] + new

    torch.cuda.reset_peak_memory_stats(device)
    benchmark.pedantic(generate, rounds=ROUNDS, warmup_rounds=1)
    kind, alpha, captured = MODELS[name]
    info = {
        "geometry": GEOMETRIES[geometry],
        "layers": kind,
        "captured_steps": captured,
        "prompt_tokens": ids.shape[1],
        "new_tokens": new,
        "peak_memory_mib": torch.cuda.max_memory_reserved(device) >> 20,
        "copy_gb_per_s": copy_gb_per_s,
        "weights": "random",
    }
    # pytest-benchmark has no statistics under --benchmark-disable.
    if new > 1 and not benchmark.disabled:
        read = bytes_per_token(model, CONTEXT, private=alpha != 0.0)
        firsts = [seconds(conditions, lambda: generate(1)) for _ in range(ROUNDS)]
        # Of the fastest: a prompt's host time varies by as much as the tokens take.
        token = (float(benchmark.stats.stats.min) - min(firsts)) / NEW_TOKENS
        info |= {
            "tokens_per_s": 1 / token,
            "bytes_per_token": read,
            "share_of_copy": read / token / GB / copy_gb_per_s,
            # At the same share of the bandwidth: not measured on such a card.
            "projected_tokens_per_s_at_192_gb_per_s": PROJECTED_GB_PER_S / copy_gb_per_s / token,
        }
    benchmark.extra_info.update(info)


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Shards of a geometry on disk, under the memory cap of a 6 GB card."""
    from bench import memory_stages  # noqa: PLC0415

    geometry = request.param
    folder = tmp_path_factory.mktemp(geometry)
    job = memory_stages.Job(geometry, folder, "cuda", "gtx4050")
    memory_stages.write(job)
    yield job
    torch.cuda.set_per_process_memory_fraction(1.0)
    shutil.rmtree(folder)
    release_memory()


# In this order: the second reads what the first wrote.


@pytest.mark.benchmark(group="files")
@pytest.mark.parametrize("job", FAMILIES, indirect=True, scope="module")
def test_separation(job: Any, benchmark: Any) -> None:
    """From safetensors shards to an artefact, once."""
    from bench import memory_stages  # noqa: PLC0415

    found = benchmark.pedantic(memory_stages.separate, args=(job,), rounds=1)
    benchmark.extra_info.update(found, weights="random")


@pytest.mark.benchmark(group="files")
@pytest.mark.parametrize("job", FAMILIES, indirect=True, scope="module")
def test_loading(job: Any, benchmark: Any) -> None:
    """An artefact, verified, onto the card."""
    if not job.separated.exists():
        pytest.skip("there is no artefact: test_separation makes it and did not run, or failed")

    def load() -> None:
        libortho.load(job.separated, device=job.device)
        torch.cuda.synchronize()

    release_memory()
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(load, rounds=1)
    peak = torch.cuda.max_memory_reserved() >> 20
    benchmark.extra_info.update(peak_memory_mib=peak, weights="random")
