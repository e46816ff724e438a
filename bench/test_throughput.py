"""Throughput and memory: prefill and decode for every arm, and switching alpha.

pytest-benchmark records the times; conditions and tokens/s go into `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import libortho
from bench.arms import Arm, Arms
from libortho import hardware
from libortho.errors import HardwareError
from libortho.plugin import RunResults
from libortho.profiles import Profile
from libortho.results import ThroughputResult
from libortho.windows import token_windows

pytestmark = pytest.mark.gtx4050

DECODE_PROMPT_TOKENS = 16
DECODE_TOKENS = 16
ROUNDS = 3
SWITCH_ROUNDS = 20


@pytest.fixture(scope="module")
def loaded(arms: Arms) -> Iterator[Callable[[str], Arm]]:
    """Loads arms on demand and keeps the last one: prefill and decode of an arm share it."""
    current: dict[str, Any] = {}

    def close() -> None:
        if current:
            current.pop("context").__exit__(None, None, None)
            current.clear()
            hardware.release_memory()

    def get(name: str) -> Arm:
        if current.get("name") != name:
            close()
            context = arms.load(name)
            try:
                arm = context.__enter__()
            except HardwareError as error:
                pytest.skip(str(error))
            current.update(name=name, context=context, arm=arm)
        return current["arm"]

    yield get
    close()


def _record(
    benchmark: Any,
    run_results: RunResults,
    arm: Arm,
    phase: Any,
    tokens: int | None,
    device: str,
    conditions: dict[str, Any],
) -> None:
    """Write one case down, in the benchmark's JSON and in the results file."""
    # pytest-benchmark has no statistics under --benchmark-disable.
    median = None if benchmark.disabled else float(benchmark.stats.stats.median)
    peak = hardware.peak_mib(device)
    conditions = {
        "device": run_results.device_name,
        "dtype": run_results.compute_dtype,
        "execution": arm.execution,
        "precision": arm.precision,
        "torch": torch.__version__,
        **conditions,
    }
    reasons = {}
    if median is None:
        reasons["median_s"] = "benchmarks are disabled in this run"
    if tokens is None:
        reasons["tokens_per_s"] = "switching makes no tokens"
    elif median is None:
        reasons["tokens_per_s"] = reasons["median_s"]
    if peak is None:
        reasons["peak_memory_mib"] = "on a CPU only the whole process's peak is known"
        conditions["process_peak_rss_mib"] = round(hardware.process_peak_rss_mib())
    result = ThroughputResult(
        arm=arm.name,
        phase=phase,
        tokens_per_s=None if tokens is None or median is None else tokens / median,
        median_s=median,
        peak_memory_mib=peak,
        outcome="passed",
        conditions=conditions,
        reasons=reasons,
    )
    run_results.throughput.append(result)
    benchmark.extra_info.update(
        arm=arm.name,
        phase=phase,
        tokens_per_s=result.tokens_per_s,
        peak_memory_mib=peak,
        bits_per_linear_weight=arm.bits,
        outcome="passed",
        **conditions,
    )


def _synchronised(call: Callable[[], Any], device: str) -> Callable[[], None]:
    """CUDA runs on after a call returns; the clock must wait for it."""

    def run() -> None:
        with torch.inference_mode():
            call()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return run


@pytest.mark.benchmark(group="prefill")
def test_prefill(
    arm: str,
    loaded: Callable[[str], Arm],
    profile: Profile,
    device: str,
    benchmark: Any,
    run_results: RunResults,
) -> None:
    """One forward pass over a window, as at the start of an answer: only the last logits."""
    model = loaded(arm)
    length = profile.sequence_length
    ids = _public_tokens(model, profile.batch_size, length).to(device)
    hardware.reset_peak(device)
    benchmark.pedantic(
        _synchronised(lambda: model.model(ids, use_cache=True, logits_to_keep=1), device),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    conditions = {"batch": profile.batch_size, "prompt_tokens": length, "rounds": ROUNDS}
    tokens = profile.batch_size * length
    _record(benchmark, run_results, model, "prefill", tokens, device, conditions)


@pytest.mark.benchmark(group="decode")
def test_decode(
    arm: str,
    loaded: Callable[[str], Arm],
    profile: Profile,
    device: str,
    benchmark: Any,
    run_results: RunResults,
) -> None:
    """Greedy `generate` of a few tokens after a short prompt; the prompt's pass is in the time."""
    model = loaded(arm)
    ids = _public_tokens(model, profile.batch_size, DECODE_PROMPT_TOKENS).to(device)

    def generate() -> None:
        out = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=DECODE_TOKENS,
            min_new_tokens=DECODE_TOKENS,
            do_sample=False,
        )
        assert out.shape[1] == DECODE_PROMPT_TOKENS + DECODE_TOKENS

    hardware.reset_peak(device)
    benchmark.pedantic(_synchronised(generate, device), rounds=ROUNDS, warmup_rounds=1)
    conditions = {
        "batch": profile.batch_size,
        "prompt_tokens": DECODE_PROMPT_TOKENS,
        "new_tokens": DECODE_TOKENS,
        "rounds": ROUNDS,
    }
    tokens = profile.batch_size * DECODE_TOKENS
    _record(benchmark, run_results, model, "decode", tokens, device, conditions)


@pytest.mark.benchmark(group="switch")
def test_switch(
    loaded: Callable[[str], Arm],
    profile: Profile,
    device: str,
    benchmark: Any,
    run_results: RunResults,
) -> None:
    """From alpha = 1 to 0 and back; the very next forward pass feels it."""
    arm = loaded("alpha1")
    ids = _public_tokens(arm, 1, DECODE_PROMPT_TOKENS).to(device)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return arm.model(ids, use_cache=False).logits

    def there_and_back() -> None:
        libortho.set_alpha(arm.model, 0.0)
        libortho.set_alpha(arm.model, 1.0)

    at_1 = logits()
    with libortho.alpha(arm.model, 0.0):
        assert not torch.equal(at_1, logits())
    assert torch.equal(at_1, logits())
    hardware.reset_peak(device)
    benchmark.pedantic(_synchronised(there_and_back, device), rounds=SWITCH_ROUNDS, warmup_rounds=1)
    conditions = {"rounds": SWITCH_ROUNDS, "switches_per_round": 2}
    _record(benchmark, run_results, arm, "switch", None, device, conditions)


def _public_tokens(arm: Arm, batch: int, length: int) -> torch.Tensor:
    text = "It was the best of times, it was the worst of times. " * (length // 8 + 8)
    return token_windows(arm.tokenizer, [text] * batch, count=batch, length=length)
