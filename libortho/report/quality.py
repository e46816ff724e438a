"""Sections of experiment 2: what separation and the private stream cost in perplexity and bits."""

from __future__ import annotations

from libortho.figures import arm_name
from libortho.results import ArmResult, NullTestResult

from .blocks import Block, Cell, Facts, Paragraph, Section, Table, drawings
from .drawing import Bar, Dot, Drawing, Limit, Row, row_chart
from .run import Run

_EXP2 = "exp2_null_test"


def perplexity(run: Run) -> Section:
    """Every arm on the same windows, each ratio with its interval."""
    title = "Experiment 2: the null test"
    result = run.results.exp2_null_test
    if result is None:
        return _not_run(run, title)
    rows = tuple(
        (
            Cell(arm_name(name)),
            run.cell(f"{_EXP2}.arms.{name}.ppl"),
            run.cell(f"{_EXP2}.arms.{name}.ratio", interval=True),
            Cell(_precision(arm)),
        )
        for name, arm in result.arms.items()
    )
    caption = (
        f"Perplexity on {result.windows} windows of {result.window_tokens} tokens of "
        f"{result.corpus}, the same for all; ratios to the unquantised model with paired "
        "bootstrap intervals"
    )
    header = ("", "perplexity", "ratio [95 % interval]", "precision")
    blocks: tuple[Block, ...] = (
        Paragraph(result.verdict_reason[:1].upper() + result.verdict_reason[1:] + "."),
        *drawings(_ratio_chart(run, result)),
        Facts(
            (
                ("measured on", f"{result.corpus}, SHA-256 {result.corpus_sha256[:16]}…"),
                (
                    "calibrated on",
                    f"{result.calibration_corpus}, SHA-256 {result.calibration_sha256[:16]}…",
                ),
                ("batch size", str(result.batch_size)),
            )
        ),
        Table(caption, header, rows),
    )
    return Section(title, blocks, result.verdict, result.verdict)


def bits(run: Run) -> Section:
    """Stored bits per linear weight, scales, zero points and streams counted."""
    title = "Bits per weight"
    result = run.results.exp2_null_test
    if result is None:
        return _not_run(run, title)
    names = [f"{_EXP2}.arms.{name}.bits_per_linear_weight" for name in result.arms]
    table = Table(
        "Stored bits per linear weight: codes, scales, zero points and streams",
        ("", "bits per weight"),
        tuple(
            (Cell(arm_name(arm)), run.cell(name))
            for arm, name in zip(result.arms, names, strict=True)
        ),
    )
    chart_rows = []
    for arm, name in zip(result.arms, names, strict=True):
        value = run.value(name)
        if value is not None:
            bar = Bar(0, value, "ours" if arm.startswith("alpha") else "other")
            chart_rows.append(Row(arm_name(arm), f"{value:.2f}", (bar,)))
    chart = row_chart(
        "Stored bits per linear weight",
        chart_rows,
        unit="bits",
        legend=(("ours", "separated"), ("other", "others")),
        from_zero=True,
    )
    return Section(title, (*drawings(chart), table))


def _ratio_chart(run: Run, result: NullTestResult) -> Drawing | None:
    rows = []
    for arm in result.arms:
        figure = run.figures[f"{_EXP2}.arms.{arm}.ratio"]
        if figure.value is None:
            continue
        text = f"{figure.value:.3f}"
        if figure.low is not None and figure.high is not None and figure.low < figure.high:
            text += f" [{figure.low:.3f}, {figure.high:.3f}]"
        kind = "ours" if arm.startswith("alpha") else "other"
        dot = Dot(figure.value, kind, figure.low, figure.high)
        rows.append(Row(arm_name(arm), text, dots=(dot,)))
    return row_chart(
        "Perplexity over the unquantised model's, with 95 % intervals",
        rows,
        unit="ratio; lower is better",
        limits=(Limit(result.max_ppl_ratio, f"gate for alpha = 1: {result.max_ppl_ratio:g}"),),
        legend=(("ours", "separated"), ("other", "others")),
    )


def _precision(arm: ArmResult) -> str:
    return arm.precision + (f" ({arm.note})" if arm.note else "")


def _not_run(run: Run, title: str) -> Section:
    reason = run.results.reasons.get(_EXP2) or "no reason given"
    return Section(title, (Paragraph(f"Not measured: {reason}."),), tone="missing")
