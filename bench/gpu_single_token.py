"""Decode at one token: base alone, with both streams at alpha 1 and 0, and the peers beside them.

The ratio of the two is taken of each side's best config, and with one config for both.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu_run import REPLAYS, Run, Section, capture, operand_sets
from bench.gpu_timings import DENSITY, SHAPES, bare, calls, peers, share, short, timed
from bench.kernel_cases import Case, Operands
from libortho.kernels import autotune
from libortho.kernels.configs import DecodeConfig, reasoned
from libortho.kernels.overlap import overlapped

FINALISTS = 3
"""Configs of each side that are timed again, in turn: the first round's order is partly noise."""


def single_token(family: str) -> Section:
    """One token: base alone, with both streams at alpha 1 and 0, and the peers."""

    def measure(run: Run, found: dict[str, Any]) -> None:
        run.lines.append(
            f"{family}, 1 token, float16 | base us, of copy | with streams us, ratio of the best, "
            "at the streams' config, at the base's; of copy | alpha 0 us | the same two, "
            "overlapped, and their ratio | int4pack us | dense us "
            "| rows, warps, words, prefetch, early; the base's"
        )
        for name, shape in SHAPES[family].items():
            if run.left_s < 10:
                break
            found[name] = _single_token(run, Case(*shape), name)
            torch.cuda.empty_cache()

    return measure


def _single_token(run: Run, plain: Case, name: str) -> dict[str, Any]:
    case = replace(plain, paired=True).with_streams(DENSITY)
    candidates = autotune.candidates(case.shape, 1)
    sets = operand_sets(case)
    bare_sets = [bare(operands) for operands in sets]
    with_streams = timed(run, case, sets, candidates)
    alone = timed(run, plain, bare_sets, candidates)
    found: dict[str, Any] = {"with_streams": with_streams, "base_alone": alone}
    if with_streams[0]["us"] is None or alone[0]["us"] is None:
        return found | {"reason": "no candidate could be timed"}
    finalists = dict.fromkeys(
        DecodeConfig(**row["config"])
        for rows in (with_streams, alone)
        for row in rows[:FINALISTS]
        if row["us"] is not None
    )
    # Replayed in turn, so that a ratio is of one and the same minute, and of one config as well.
    graphs = {
        (side, config): capture(calls(operands, config))
        for config in finalists
        for side, operands in (("base", bare_sets), ("streams", sets))
        if run.compiler.problem(
            replace(plain if side == "base" else case, config=config), min(30, run.left_s - 5)
        )
        is None
    }
    times: dict[tuple[str, DecodeConfig], list[float]] = {key: [] for key in graphs}
    for _ in range(2 * REPLAYS):
        for key, captured in graphs.items():
            times[key].append(captured.replay_us())
    medians = {key: statistics.median(values) for key, values in times.items()}
    base_best, best = (
        min((key for key in medians if key[0] == side), key=medians.__getitem__)[1]
        for side in ("base", "streams")
    )
    # As a captured step launches them: each begins while the one ahead still runs.
    in_a_row = _overlapped_us(
        run, {"base": (plain, bare_sets, base_best), "streams": (case, sets, best)}
    )
    silent = []
    for operands in sets:
        operands.alpha.zero_()
    for _ in range(2 * REPLAYS):
        silent.append(graphs["streams", best].replay_us())
    del graphs
    us = {
        "base": medians["base", base_best],
        "streams": medians["streams", best],
        "base, the streams' config": medians.get(("base", best)),
        "streams, the base's config": medians.get(("streams", base_best)),
        "alpha 0": statistics.median(silent),
        **{f"{side}, overlapped": value for side, value in in_a_row.items()},
    }
    base_share, streams_share = (
        share(run, c.bytes_read, us[key]) for c, key in ((plain, "base"), (case, "streams"))
    )
    beside = peers(case, sets)
    processors = run.found["environment"]["multiprocessors"]
    ratios = {
        "ratio_streams_to_base": us["streams"] / us["base"],
        "ratio_at_the_streams_config": _ratio(us["streams"], us["base, the streams' config"]),
        "ratio_at_the_bases_config": _ratio(us["streams, the base's config"], us["base"]),
        "ratio_overlapped": _ratio(in_a_row["streams"], in_a_row["base"]),
    }
    run.lines.append(
        f"  {name:14s} | {us['base']:6.2f} {base_share:.0%} | {us['streams']:6.2f} "
        f"{' '.join(f'{r:.3f}' if r else '-' for r in ratios.values())} {streams_share:.0%} | "
        f"{us['alpha 0']:6.2f} | {in_a_row['base']:.2f} {in_a_row['streams']:.2f} | "
        f"{beside['int4pack_us']} | {beside['dense_us']} | "
        f"{short(best)}; {short(base_best)}"
    )
    return found | {
        "shape": [case.out_features, case.in_features],
        "us": us,
        "best": {"streams": asdict(best), "base": asdict(base_best)},
        "spread_us": {
            "base": [min(times["base", base_best]), max(times["base", base_best])],
            "streams": [min(times["streams", best]), max(times["streams", best])],
        },
        **ratios,
        "base_bytes": plain.bytes_read,
        "streams_bytes": case.bytes_read - plain.bytes_read,
        "base_share_of_copy": base_share,
        "streams_share_of_copy": streams_share,
        "operand_sets": len(sets),
        "reasoned": asdict(reasoned(case.shape, 1, processors)),
        "peers": beside,
    }


def _overlapped_us(
    run: Run, sides: dict[str, tuple[Case, list[Operands], DecodeConfig]]
) -> dict[str, float]:
    """Microseconds of a launch of each side, in turn, in graphs whose launches overlap."""
    graphs = {}
    for side, (case, sets, config) in sides.items():
        problem = run.compiler.problem(replace(case, config=config, overlap=True), 30)
        assert problem is None, problem
        with overlapped(torch.device("cuda", 0)):
            graphs[side] = capture(calls(sets, config))
    times: dict[str, list[float]] = {side: [] for side in graphs}
    for _ in range(2 * REPLAYS):
        for side, captured in graphs.items():
            times[side].append(captured.replay_us())
    return {side: statistics.median(values) for side, values in times.items()}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
