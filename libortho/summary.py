"""The closing table: a results record as a few lines of text.

Knows results. A pure function, so that what a terminal shows is what the file says.
"""

from __future__ import annotations

from collections.abc import Sequence

from .audit_results import AuditResult
from .contrast import ALL_FAMILIES
from .results import KillSwitchResult, NullTestResult, Results, ThroughputResult


def summary_lines(results: Results) -> list[str]:
    """Lines for a terminal of about 100 columns."""
    lines: list[str] = []
    if results.exp1_kill_switch:
        lines += _kill_switch(results.exp1_kill_switch)
    if results.exp2_null_test:
        lines += ["", *_null_test(results.exp2_null_test)]
    for audited in results.audits:
        lines += ["", *_audit(audited)]
    if results.throughput:
        lines += ["", *_throughput(results.throughput)]
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first left-aligned and the others right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    return [line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])]


def number(value: float | None, digits: int) -> str:
    """A figure, or a dash for one that was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def _kill_switch(result: KillSwitchResult) -> list[str]:
    n, bits = result.n_planted, result.quantization_bits
    loss = [
        number(x, 3)
        for x in (
            result.loss_planted_alpha1,
            result.loss_twins_alpha1,
            result.loss_planted_alpha0,
            result.loss_twins_alpha0,
        )
    ]
    never = (
        f"{number(result.loss_planted_never_trained, 3)} "
        f"[{number(result.loss_planted_never_trained_low95, 3)}, "
        f"{number(result.loss_planted_never_trained_high95, 3)}]"
    )
    rows = [
        ["alpha = 1", f"{result.hits_alpha1}/{n}", loss[0], loss[1]],
        ["alpha = 0", f"{result.hits_alpha0}/{n}", loss[2], loss[3]],
        ["never trained", f"{_never(result)}", never, ""],
    ]
    return [
        f"experiment 1, kill switch: {result.verdict.upper()} ({result.model}, {bits} bits)",
        f"  {result.verdict_reason}",
        f"  privacy ratio {number(result.privacy_ratio, 1)}"
        f"{' (no hit at alpha = 0: half a hit assumed)' if result.privacy_ratio_censored else ''}, "
        f"95 % lower limit {number(result.privacy_ratio_lower95, 2)}; base fingerprint "
        f"{result.base_fingerprint[:16]} {'unchanged' if result.fingerprint_equal else 'CHANGED'}",
        *("  " + line for line in table(["", "extracted", "loss planted", "loss twins"], rows)),
    ]


def _never(result: KillSwitchResult) -> str:
    rate = result.extraction_rate_never_trained
    return "-" if rate is None else f"{round(rate * result.n_planted)}/{result.n_planted}"


def _null_test(result: NullTestResult) -> list[str]:
    rows = []
    for name, arm in result.arms.items():
        interval = f"[{number(arm.ratio_low95, 3)}, {number(arm.ratio_high95, 3)}]"
        rows.append(
            [
                name,
                number(arm.ppl, 3),
                number(arm.ratio, 4),
                interval,
                number(arm.bits_per_linear_weight, 3),
            ]
        )
        if arm.ppl is None:
            rows[-1][0] += f" ({arm.reasons.get('ppl', 'not measured')[:40]})"
    header = ["arm", "perplexity", "ratio", "95 % interval", "bits/weight"]
    return [
        f"experiment 2, null test: {result.verdict.upper()} ({result.corpus}, {result.windows} "
        f"windows of {result.window_tokens} tokens, batch {result.batch_size})",
        f"  {result.verdict_reason}",
        *("  " + line for line in table(header, rows)),
    ]


def _audit(result: AuditResult) -> list[str]:
    rows = []
    families = {m.family for m in result.metrics}
    shown = ALL_FAMILIES if ALL_FAMILIES in families else next(iter(families), "")
    for row in (m for m in result.metrics if m.family == shown):
        values = row.metrics
        rows.append(
            [
                row.state,
                number(values["extraction, planted"].value, 3),
                number(values["mean loss, planted"].value, 3),
                number(values["mean loss, twins"].value, 3),
                number(values["loss: AUC"].value, 3),
                number(values["ratio to B0: AUC"].value, 3),
            ]
        )
    header = ["state", "extraction", "loss planted", "loss twins", "AUC loss", "AUC ratio"]
    attacks = [
        [
            attack.name,
            f"{attack.off_planted.hits}/{attack.off_planted.n}",
            f"{attack.never_planted.hits}/{attack.never_planted.n}",
            number(attack.auc, 3),
            f"{attack.p_value:.2g}",
        ]
        for attack in result.attacks
    ]
    lines = [
        f"audit of {result.method}: {result.verdict.upper()} ({result.n_planted} planted records)",
        f"  {result.verdict_reason}",
        *("  " + line for line in table(header, rows)),
    ]
    if attacks:
        head = ["attack", "off", "never trained", "AUC", "p"]
        lines += ["", *("  " + line for line in table(head, attacks))]
    return lines


def _throughput(results: Sequence[ThroughputResult]) -> list[str]:
    rows = [
        [
            f"{r.phase} {r.arm}",
            number(r.tokens_per_s, 1),
            "-" if r.median_s is None else f"{1000 * r.median_s:.2f}",
            number(r.peak_memory_mib, 0),
        ]
        for r in results
    ]
    return [
        "throughput",
        *("  " + line for line in table(["case", "tokens/s", "median ms", "peak MiB"], rows)),
    ]
