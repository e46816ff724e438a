"""The memory section: what models take of a 6 GB card, by arithmetic, beside what was measured.

Knows the profile and the registry's geometries. A model that is in no registry has no bar.
"""

from __future__ import annotations

from typing import Any

from libortho.budget import PRECISION_OF_BITS, Budget, RunRecipe, run_budget
from libortho.config import NO_LATTICE
from libortho.profiles import get_profile
from libortho.registry import REGISTRY

from .blocks import Block, Cell, Paragraph, Section, Table, drawings
from .drawing import Bar, Limit, Row, row_chart
from .guide import GUIDE_MODELS
from .run import Run

_PROFILE = "gtx4050"
_PARTS = (
    ("weights", "weights_mib", "linear layers and norms"),
    ("embedding", "embedding_mib", "embedding and head"),
    ("streams", "streams_mib", "residual and private"),
    ("cache", "kv_cache_mib", "KV cache"),
    ("workspace", "workspace_mib", "workspace"),
    ("overhead", "overhead_mib", "overhead"),
)


def memory(run: Run) -> Section:
    """Bars against the card, part by part, and the peak that was measured."""
    title = "Memory on a 6 GB card"
    profile = get_profile(_PROFILE)
    bits = run.bits if run.bits in PRECISION_OF_BITS else 4
    recipe = _recipe(run, bits)
    names = dict.fromkeys([*([run.model] if run.model else []), *GUIDE_MODELS])
    budgets = {
        name: run_budget(REGISTRY[name], recipe, profile.sequence_length)
        for name in names
        if name in REGISTRY
    }
    usable, total = profile.vram_gib_usable * 1024, profile.vram_gib_total * 1024
    lattice = (
        "16-bit weights" if bits == NO_LATTICE else f"{bits} bits, groups of {recipe.group_size}"
    )
    text = (
        f"Arithmetic, not a measurement: {lattice}, residual {recipe.residual_density:.1%} and "
        f"private {recipe.private_density:.1%} of the linear weights, embedding and head at "
        f"{recipe.head_bits} bits, one sequence of "
        f"{profile.sequence_length} tokens. Of the card's {total:,.0f} MiB about {usable:,.0f} can "
        "be used."
    )
    blocks: list[Block] = [Paragraph(text)]
    chart = row_chart(
        "Memory needed, by part",
        [
            Row(name, f"{b.total_mib:,.0f} MiB", _bars(b))
            for name, b in budgets.items()
            if b.total_mib < 4 * total  # a bar that leaves the card's far behind shows nothing
        ],
        unit="MiB",
        limits=(
            Limit(total, f"6 GB card: {total:,.0f}"),
            Limit(usable, f"usable: {usable:,.0f}"),
        ),
        legend=tuple((kind, words) for kind, _, words in _PARTS),
        from_zero=True,
    )
    blocks += drawings(chart)
    blocks.append(_table(budgets, usable))
    if run.model is not None and run.model not in REGISTRY:
        blocks.append(
            Paragraph(f"{run.model}: no bar, because its geometry is not in the registry.")
        )
    blocks.append(_measured(run))
    return Section(title, tuple(blocks))


def _recipe(run: Run, bits: int) -> RunRecipe:
    """What this run's file says of its recipe, and the defaults where it says nothing."""
    result = run.results.exp1_kill_switch
    config: dict[str, Any] = {} if result is None else result.config
    if result is None and run.results.exp2_null_test is not None:
        config = run.results.exp2_null_test.config
    separation, tuned = (
        part if isinstance(part, dict) else {}
        for part in (config.get("separation"), config.get("tuning"))
    )
    group: Any = separation.get("group_size")
    head: Any = separation.get("head_bits")
    residual, private = separation.get("residual_density"), tuned.get("density")
    default = RunRecipe()
    known_group = type(group) is int and (group == -1 or group > 1)
    return RunRecipe(
        bits,
        group_size=group if known_group else default.group_size,
        head_bits=head if head in (8, NO_LATTICE) else default.head_bits,
        residual_density=(
            0.0 if bits == NO_LATTICE else _share(residual, default.residual_density)
        ),
        private_density=_share(private, default.private_density),
    )


def _share(value: Any, default: float) -> float:
    return float(value) if type(value) in (int, float) and 0 <= value <= 1 else default


def _bars(budget: Budget) -> tuple[Bar, ...]:
    bars, start = [], 0.0
    for kind, name, _ in _PARTS:
        end = start + getattr(budget, name)
        bars.append(Bar(start, end, kind))
        start = end
    return tuple(bars)


def _table(budgets: dict[str, Budget], usable: float) -> Table:
    parts = [(words, name) for _, name, words in _PARTS] + [("in all", "total_mib")]
    rows = [
        (Cell(words), *(_mib(getattr(budget, name)) for budget in budgets.values()))
        for words, name in parts
    ]
    over = [budget.total_mib - usable for budget in budgets.values()]
    told = ["it fits" if excess <= 0 else f"{excess:,.0f} too many" for excess in over]
    rows.append((Cell(f"of {usable:,.0f} usable"), *(Cell(text) for text in told)))
    return Table("MiB needed, by arithmetic", ("", *budgets), tuple(rows))


def _mib(value: float) -> Cell:
    return Cell(f"{value:,.0f}", value)


def _measured(run: Run) -> Paragraph:
    peaks = [
        (case.peak_memory_mib, case)
        for case in run.results.throughput
        if case.peak_memory_mib is not None
    ]
    if peaks:
        most, case = max(peaks, key=lambda pair: pair[0])
        return Paragraph(
            f"Measured: at most {most:,.0f} MiB were reserved on {run.device}, in {case.phase} "
            f"with {case.arm}."
        )
    reasons = {case.reasons.get("peak_memory_mib", "") for case in run.results.throughput} - {""}
    why = "; ".join(sorted(reasons)) or "no throughput case ran"
    return Paragraph(f"Peak memory: not measured: {why}.")
