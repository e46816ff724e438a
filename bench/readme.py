"""The README's results, rendered from the files in `bench/results/`.

`python -m bench.readme` prints them; a test compares them with what the README says, so that no
figure is quoted that was not measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from libortho.results import ArmResult, Results, read_results

FOLDER = Path(__file__).parent / "results"
CARD_RUN, KERNELS = "h100-enwiki.json", "h100-kernels.json"
"""A run of both experiments on a card, and `bench/gpu_kernels.py` on the same kind of card."""
RUNS = ("cpu-enwiki.json",)
"""A whole run of `pytest -m gtx4050`, then ones of experiment 2 on other text."""
NAMES = {
    "reference": "unquantised",
    "alpha1": "**alpha = 1**",
    "alpha0": "**alpha = 0**",
    "plain": "plain INT4, no ortho",
    "nf4": "bitsandbytes NF4",
}


def render() -> str:
    """The block between the README's marks."""
    runs = [read_results(FOLDER / name) for name in RUNS]
    return "\n\n".join(
        [
            _conditions(runs[0]),
            _kill_switch(runs[0]),
            _null_test(runs),
            _throughput(runs[0]),
            _card(read_results(FOLDER / CARD_RUN)),
            _kernels(json.loads((FOLDER / KERNELS).read_text(encoding="utf-8"))),
        ]
    )


def _conditions(run: Results) -> str:
    where, result = run.provenance, run.exp1_kill_switch
    assert result is not None
    return (
        f"`{result.model}` on {where.cpu_cores} cores of an {where.cpu_model}, "
        f"{where.compute_dtype} compute, torch {where.torch}, transformers {where.transformers}, "
        f"bitsandbytes {where.bitsandbytes}, {where.timestamp_utc[:10]}; files and commands in "
        "[bench/results](bench/results)."
    )


def _kill_switch(run: Results) -> str:
    result = run.exp1_kill_switch
    assert result is not None
    n = result.n_planted
    never = round((result.extraction_rate_never_trained or 0) * n)
    interval = (
        f"[{result.loss_planted_never_trained_low95:.3f}, "
        f"{result.loss_planted_never_trained_high95:.3f}]"
    )
    rows = [
        ("alpha = 1", result.hits_alpha1, result.loss_planted_alpha1, result.loss_twins_alpha1, ""),
        ("alpha = 0", result.hits_alpha0, result.loss_planted_alpha0, result.loss_twins_alpha0, ""),
        ("never trained", never, result.loss_planted_never_trained, None, f" {interval}"),
    ]
    lines = [
        "Experiment 1, kill switch. Loss is the mean in nats per secret token; twins were never "
        "planted.",
        "",
        "| | extracted | loss on planted | loss on twins |",
        "|---|---|---|---|",
    ]
    for name, hits, planted, twins, note in rows:
        other = "" if twins is None else f"{twins:.3f}"
        lines.append(f"| {name} | {hits} of {n} | {planted:.3f}{note} | {other} |")
    lines += [
        "",
        f"Privacy ratio at least **{result.privacy_ratio_lower95:.1f}** (lower limit of the 95 % "
        f"interval); base fingerprint `{result.base_fingerprint[:16]}…` before tuning, after it, "
        "and in the export.",
    ]
    return "\n".join(lines)


def _null_test(runs: list[Results]) -> str:
    tests = [run.exp2_null_test for run in runs]
    first = tests[0]
    assert first is not None
    head = " | ".join(f"{t.corpus}, perplexity | ratio" for t in tests if t is not None)
    lines = [
        f"Experiment 2, null test: {first.windows} windows of {first.window_tokens} tokens; ratios "
        "to the unquantised model with 95 % intervals; calibrated on "
        f"{first.calibration_corpus}.",
        "",
        f"| | bits per linear weight | {head} |",
        "|---|---|" + "---|---|" * len(tests),
    ]
    for name, label in NAMES.items():
        cells = [_cells(test.arms[name]) for test in tests if test is not None]
        bits = first.arms[name].bits_per_linear_weight
        lines.append(f"| {label} | {bits:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(arm: ArmResult) -> str:
    if arm.ppl is None:
        return f"not measured: {arm.reasons['ppl']} | "
    return f"{arm.ppl:.2f} | {arm.ratio:.3f} [{arm.ratio_low95:.3f}, {arm.ratio_high95:.3f}]"


def _throughput(run: Results) -> str:
    rates = {(r.arm, r.phase): r for r in run.throughput}
    lines = [
        "Throughput at batch 1 on that CPU: prefill of 512 tokens, `generate` of 16 tokens after "
        "16. Our arms hold their composed weights in memory here, as large as the unquantised "
        "ones.",
        "",
        "| | prefill, tokens/s | decode, tokens/s |",
        "|---|---|---|",
    ]
    for name, label in NAMES.items():
        pair = [rates.get((name, phase)) for phase in ("prefill", "decode")]
        cells = [
            "not measured" if r is None or r.tokens_per_s is None else f"{r.tokens_per_s:.1f}"
            for r in pair
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    switch = rates.get(("alpha1", "switch"))
    if switch is not None and switch.median_s is not None:
        lines += ["", f"Switching alpha: {1000 * switch.median_s / 2:.1f} ms."]
    return "\n".join(lines)


def _card(run: Results) -> str:
    where, one, two = run.provenance, run.exp1_kill_switch, run.exp2_null_test
    assert one is not None
    assert two is not None
    ratios = {name: two.arms[name].ratio for name in ("alpha1", "alpha0", "nf4", "plain")}
    assert all(ratio is not None for ratio in ratios.values())
    return (
        f"The same job on an {where.device_name}, capped at 5.0 GiB, in {where.compute_dtype} "
        f"(torch {where.torch}, transformers {where.transformers}, {where.timestamp_utc[:10]}): "
        f"{one.hits_alpha1} and {one.hits_alpha0} of {one.n_planted} extracted at alpha = 1 and 0; "
        f"on {two.corpus} perplexity ratios of {ratios['alpha1']:.3f} at alpha = 1, "
        f"{ratios['alpha0']:.3f} at alpha = 0, {ratios['nf4']:.3f} for NF4 and "
        f"{ratios['plain']:.3f} for plain INT4."
    )


def _kernels(found: dict[str, Any]) -> str:
    where, checks = found["environment"], found["checks"]
    lines = [
        f"Decode kernels on an {where['card']} (torch {where['torch']}, triton {where['triton']}, "
        f"{where['date_utc'][:10]}; copies ran at {found['bandwidth']['copy_gb_per_s']:.0f} GB/s, "
        "read and written): INT4 with groups of 128, one token, float16, at layer shapes of Llama; "
        f"streams are 0.5 % residual and 0.5 % private. Of {checks['checked']} random cases "
        f"{len(checks['failures'])} missed the float64 reference.",
        "",
        "| layer | base, µs | of copy bandwidth | with streams | PyTorch's INT4, µs | FP16, µs |",
        "|---|---|---|---|---|---|",
    ]
    for family in ("8B", "3B"):
        for name, case in found[f"{family}, 1 token"].items():
            peers = case["peers"]
            lines.append(
                f"| {family} {name} | {case['us']['base']:.1f} | "
                f"{case['base_share_of_copy_bandwidth']:.0%} | "
                f"{case['ratio_streams_to_base']:.2f} × | {peers['int4pack_us']:.1f} | "
                f"{peers['dense_us']:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render() + "\n")
