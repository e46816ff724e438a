"""Decode at one token: base alone, with both streams at alpha 1 and 0, and the peers beside them.

The ratio of the two is taken of each side's best config, and with one config for both; launched in
turn, and overlapped as a captured step launches them, with the configs that are best for that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.gpu_run import REPLAYS, Captured, Run, Section, capture, operand_sets
from bench.gpu_timings import DENSITY, SHAPES, bare, calls, peers, share, short, timed
from bench.kernel_cases import Case, Operands
from libortho.kernels import autotune
from libortho.kernels.configs import DecodeConfig, reasoned
from libortho.kernels.overlap import overlapped, why_not

FINALISTS = 4
"""Configs of each side that are timed again, in turn: the first round's order is partly noise."""
SIDES = ("base", "streams")
Key = tuple[str, DecodeConfig]
"""A side, and the config that it is launched with."""


def single_token(family: str) -> Section:
    """One token: base alone, with both streams at alpha 1 and 0, and the peers."""

    def measure(run: Run, found: dict[str, Any]) -> None:
        run.lines.append(
            f"{family}, 1 token, float16 | base us, of copy | with streams us, ratio of the best, "
            "at the streams' config, at the base's; of copy | alpha 0 us | the same two, "
            "overlapped | int4pack us | dense us | rows, warps, words, prefetch of the base; the "
            "streams; the same, overlapped"
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
    sides = {"base": (plain, bare_sets), "streams": (case, sets)}
    # In turn first. As a captured step launches them, each begins while the one ahead still runs.
    in_turn = _graphs(run, sides, finalists, overlap=False)
    times = _in_turn(in_turn)
    problem = why_not(torch.device("cuda", 0))
    in_a_row = {} if problem else _in_turn(_graphs(run, sides, finalists, overlap=True))
    for operands in sets:
        operands.alpha.zero_()
    best = {side: _fastest(times, side) for side in SIDES}
    silent = [in_turn["streams", best["streams"]].replay_us() for _ in range(2 * REPLAYS)]
    del in_turn
    us: dict[str, float | None] = {
        **{side: _median(times, side, best[side]) for side in SIDES},
        "base, the streams' config": _median(times, "base", best["streams"]),
        "streams, the base's config": _median(times, "streams", best["base"]),
        "alpha 0": statistics.median(silent),
        **{f"{side}, overlapped": None for side in SIDES},
    }
    if in_a_row:
        best |= {f"{side}, overlapped": _fastest(in_a_row, side) for side in SIDES}
        us |= {
            f"{side}, overlapped": _median(in_a_row, side, best[f"{side}, overlapped"])
            for side in SIDES
        }
    ratios = {
        "ratio_streams_to_base": _ratio(us["streams"], us["base"]),
        "ratio_at_the_streams_config": _ratio(us["streams"], us["base, the streams' config"]),
        "ratio_at_the_bases_config": _ratio(us["streams, the base's config"], us["base"]),
        "ratio_overlapped": _ratio(us["streams, overlapped"], us["base, overlapped"]),
    }
    base_share, streams_share = (
        share(run, sides[side][0].bytes_read, us[side] or float("inf")) for side in SIDES
    )
    beside = peers(case, sets)
    processors = run.found["environment"]["multiprocessors"]
    run.lines.append(
        f"  {name:14s} | {us['base']:6.2f} {base_share:.0%} | {us['streams']:6.2f} "
        f"{' '.join(f'{r:.3f}' if r else '-' for r in ratios.values())} {streams_share:.0%} | "
        f"{us['alpha 0']:6.2f} | {us['base, overlapped']} {us['streams, overlapped']} | "
        f"{beside['int4pack_us']} | {beside['dense_us']} | "
        f"{'; '.join(short(config) for config in best.values())}"
    )
    return found | {
        "shape": [case.out_features, case.in_features],
        "us": us,
        "best": {key: asdict(config) for key, config in best.items()},
        "spread_us": {
            side: [min(times[side, best[side]]), max(times[side, best[side]])] for side in SIDES
        },
        **ratios,
        "overlapped_reason": problem,
        "base_bytes": plain.bytes_read,
        "streams_bytes": case.bytes_read - plain.bytes_read,
        "base_share_of_copy": base_share,
        "streams_share_of_copy": streams_share,
        "operand_sets": len(sets),
        "reasoned": asdict(reasoned(case.shape, 1, processors)),
        "peers": beside,
    }


def _graphs(
    run: Run,
    sides: dict[str, tuple[Case, list[Operands]]],
    configs: Iterable[DecodeConfig],
    *,
    overlap: bool,
) -> dict[Key, Captured]:
    """A graph of launches for each side and config whose kernel can be built."""
    graphs = {}
    for config in configs:
        for side, (case, sets) in sides.items():
            wanted = replace(case, config=config, overlap=overlap)
            if run.compiler.problem(wanted, min(30, run.left_s - 5)) is None:
                with overlapped(torch.device("cuda", 0)) if overlap else nullcontext():
                    graphs[side, config] = capture(calls(sets, config))
    return graphs


def _in_turn(graphs: dict[Key, Captured]) -> dict[Key, list[float]]:
    """Times of all graphs, replayed in turn: a ratio is of one and the same minute."""
    times: dict[Key, list[float]] = {key: [] for key in graphs}
    for _ in range(2 * REPLAYS):
        for key, captured in graphs.items():
            times[key].append(captured.replay_us())
    return times


def _fastest(times: dict[Key, list[float]], side: str) -> DecodeConfig:
    return min((key for key in times if key[0] == side), key=lambda k: statistics.median(times[k]))[
        1
    ]


def _median(times: dict[Key, list[float]], side: str, config: DecodeConfig) -> float | None:
    found = times.get((side, config))
    return None if found is None else statistics.median(found)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
