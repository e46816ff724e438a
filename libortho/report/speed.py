"""Sections on throughput: what was measured, and the guide's promises against the roofline.

A *measured* figure was timed in this run. A *ceiling* is arithmetic: memory bandwidth over the
bytes that decoding one token has to read. The two never share a kind of mark.
"""

from __future__ import annotations

from collections.abc import Iterator

from libortho.budget import Budget, RunRecipe, decode_bytes_per_token, run_budget
from libortho.figures import arm_name
from libortho.profiles import get_profile
from libortho.registry import REGISTRY, ModelEntry
from libortho.results import ThroughputResult

from .blocks import Block, Cell, Paragraph, Section, columns_table, drawings
from .drawing import Bar, Dot, Row, row_chart
from .guide import CLAIMS, Claim
from .run import Run

_BITS = 4
_EMBEDDINGS = ((16, "FP16 head"), (8, "INT8 head"))
_BYTES, _BANDWIDTH = "bytes_per_token", "copy_bandwidth_gb_per_s"
"""Conditions that a case may carry: bytes read per token, and 1e9 bytes/s measured on its card."""


def throughput(run: Run) -> Section:
    """What was timed, arm by arm, and the share of the roofline where the file tells it."""
    title = "Throughput, measured"
    cases = _named(run.results.throughput)
    if not cases:
        return Section(title, (Paragraph("Not measured: no throughput case ran."),), tone="missing")
    blocks: list[Block] = [Paragraph(f"Timed in this run on {run.device}.")]
    for phase in ("decode", "prefill"):
        blocks += _phase(run, phase, [pair for pair in cases if pair[1].phase == phase])
    blocks += [
        Paragraph(
            f"Switching alpha: {1000 * case.median_s / _switches(case):,.2f} ms a switch, measured."
        )
        for _, case in cases
        if case.phase == "switch" and case.median_s is not None
    ]
    return Section(title, tuple(blocks))


def guide(run: Run) -> Section:
    """The guide's promises beside the ceiling and, on the same card and model, what was timed."""
    names, bars = [], []
    columns: dict[str, list[Cell]] = {
        name: [] for name in ("promised", "ceiling (arithmetic)", "fits", "measured, alpha = 1")
    }
    for claim in CLAIMS:
        entry, profile = REGISTRY[claim.model], get_profile(claim.profile)
        timed = _timed_on(run, claim)
        for bits, head in _EMBEDDINGS:
            budget = run_budget(entry, RunRecipe(_BITS, head_bits=bits), profile.sequence_length)
            ceiling = _ceiling(entry, budget, profile.bandwidth_gb_per_s)
            fits = budget.total_mib <= profile.vram_gib_usable * 1024
            cells = (
                Cell(f"{claim.low:g} to {claim.high:g}"),
                Cell(f"{ceiling:,.0f}", ceiling),
                Cell("yes" if fits else "no"),
                timed,
            )
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
            names.append(f"{claim.card}, {claim.model}, {head}")
            marks = (Bar(0, ceiling, "projected"), Bar(claim.low, claim.high, "claim"))
            dots = () if timed.value is None else (Dot(timed.value, "measured"),)
            value = f"{claim.low:g}–{claim.high:g} promised, ceiling {ceiling:,.0f}"
            bars.append(Row(f"{claim.model}, {head}", value, marks, dots))
    profile = get_profile(CLAIMS[0].profile)
    text = (
        "The ceiling is arithmetic: the card's bandwidth over the bytes read per token, at "
        f"{_BITS} bits with the default streams and {profile.sequence_length} tokens of context. "
        f"No implementation can pass it. {profile.description}. Cards for which the guide's figure "
        "is not known here are left out."
    )
    legend = [("claim", "promised by the guide"), ("projected", "ceiling, arithmetic")]
    if any(row.dots for row in bars):
        legend.append(("measured", "measured on that card"))
    chart = row_chart(
        "Decode on a 6 GB card: promise and ceiling",
        bars,
        unit="tokens per second, batch 1",
        legend=legend,
        from_zero=True,
    )
    table = columns_table("Tokens per second at batch 1", names, columns, "card and model")
    blocks = (Paragraph(text), *drawings(chart), *table)
    return Section("Throughput against the guide", blocks)


def _named(cases: tuple[ThroughputResult, ...]) -> list[tuple[str, ThroughputResult]]:
    """Cases with the names that their figures have; see `libortho.figures`."""
    named, seen = [], dict[tuple[str, str], int]()
    for case in cases:
        key = (case.arm, case.phase)
        seen[key] = copy = seen.get(key, 0) + 1
        named.append((f"throughput.{case.arm}.{case.phase}" + f"#{copy}" * (copy > 1), case))
    return named


def _phase(run: Run, phase: str, cases: list[tuple[str, ThroughputResult]]) -> Iterator[Block]:
    """Chart and table of one phase; a column that nothing was measured for is said in words."""
    if not cases:
        return
    bars = [
        Row(
            arm_name(case.arm),
            f"{case.tokens_per_s:,.1f} tokens/s",
            (Bar(0, case.tokens_per_s, "measured"),),
        )
        for _, case in cases
        if case.tokens_per_s is not None
    ]
    yield from drawings(
        row_chart(f"{phase.capitalize()}, measured", bars, unit="tokens per second", from_zero=True)
    )
    conditions = [_conditions(case) for _, case in cases]
    columns = {
        "tokens/s": [run.cell(f"{name}.tokens_per_s") for name, _ in cases],
        "peak memory, MiB": [run.cell(f"{name}.peak_memory_mib") for name, _ in cases],
        "conditions": [Cell(text) for text in conditions],
    }
    if phase == "decode":
        columns["share of the roofline"] = [_roofline(case) for _, case in cases]
    if len(set(conditions)) == 1:
        del columns["conditions"]
    common = f": {conditions[0]}" if len(set(conditions)) == 1 and conditions[0] else ""
    caption = f"{phase.capitalize()}, median of the rounds{common}"
    yield from columns_table(caption, [arm_name(case.arm) for _, case in cases], columns)


def _conditions(case: ThroughputResult) -> str:
    shown = {
        "batch": "batch {}",
        "prompt_tokens": "prompt of {} tokens",
        "new_tokens": "{} new tokens",
        "rounds": "{} rounds",
        "execution": "{}",
    }
    told = [text.format(case.conditions[k]) for k, text in shown.items() if k in case.conditions]
    return ", ".join(([] if case.outcome == "passed" else [case.outcome]) + told)


def _roofline(case: ThroughputResult) -> Cell:
    """Bytes per token times tokens per second, over the card's measured bandwidth."""
    size, bandwidth = case.conditions.get(_BYTES), case.conditions.get(_BANDWIDTH)
    known = [type(x) in (int, float) and x > 0 for x in (size, bandwidth)]  # type: ignore[operator]
    if case.tokens_per_s is None or not all(known):
        return Cell(
            "not measured: the case names no bytes per token, or no bandwidth", tone="missing"
        )
    share = case.tokens_per_s * float(size) / (float(bandwidth) * 1e9)  # type: ignore[arg-type]
    return Cell(f"{share:.0%}", share)


def _switches(case: ThroughputResult) -> int:
    count = case.conditions.get("switches_per_round")
    return count if type(count) is int and count > 0 else 1


def _ceiling(entry: ModelEntry, budget: Budget, bandwidth_gb_per_s: float) -> float:
    return bandwidth_gb_per_s * 1e9 / decode_bytes_per_token(entry, budget)


def _timed_on(run: Run, claim: Claim) -> Cell:
    device = run.results.provenance.device_name
    if claim.card not in device:
        return Cell(f"not measured: this run was on {run.device}", tone="missing")
    if run.model != claim.model:
        return Cell(f"not measured: this run was of {run.model}", tone="missing")
    return run.cell("throughput.alpha1.decode.tokens_per_s")
