"""The READMEs' results, rendered from the files in `bench/results/`, in each README's language.

`python -m bench.readme` prints them, `--write` puts them into the READMEs; a test compares them
with what the READMEs say, so that no figure is quoted that was not measured. Figures are formatted
here, once for all languages; the words around them are `readme_texts`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.memory_stages import CONTEXT, GEOMETRIES, PLANNED
from bench.readme_audits import audit_rows, seed_facts
from bench.readme_kernels import decode_facts, decode_rows, kernel_facts, kernel_rows
from bench.readme_texts import CATALOGUES, Catalogue
from libortho.budget import run_budget
from libortho.files import atomic_write_text
from libortho.results import ArmResult, Results, read_results

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
CARD_RUN, KERNELS, DECODE = "h100-enwiki.json", "h100-kernels.json", "h100-decode.json"
"""A run of both experiments on a card; `gpu_kernels.py` and `gpu_decode.py` on the same kind."""
HEADS = ("cpu-head-16.json", "cpu-head-8.json")
"""Experiment 2 with embedding and head in 16 bits and in 8, otherwise alike."""
AUDIT_COSTS = ("cpu-audit-50.json", "cpu-audit-100.json", "cpu-audit-200.json")
"""Audits of one saved artefact by numbers of records; what it had learned doesn't count here."""
AUDITS, MEMORY = "h100-audits.json", "h100-memory.json"
"""Of the same kind of card: `audits.py`, `gpu_memory.py`."""
RUNS = ("cpu-enwiki.json", "cpu-wikitext2.json")
"""A whole run of `pytest -m gtx4050`, then ones of experiment 2 on other text."""
ARMS = ("reference", "alpha1", "alpha0", "plain", "nf4")


def render(readme: str = "README.md") -> str:
    """The block between a README's marks, in that README's language."""
    words = CATALOGUES[readme]
    runs = [read_results(FOLDER / name) for name in RUNS]
    sections = [
        _conditions(runs[0], words),
        _kill_switch(runs[0], words),
        _null_test(runs, words),
        _heads([read_results(FOLDER / name) for name in HEADS], words),
        _throughput(runs[0], words),
        _card(read_results(FOLDER / CARD_RUN), words),
        _audits(read_results(FOLDER / AUDITS), words),
        _audit_costs([read_results(FOLDER / name) for name in AUDIT_COSTS], words),
        _memory(_measured(MEMORY), words),
        _decoding(_measured(DECODE), words),
        _kernels(_measured(KERNELS), words),
    ]
    return "\n\n".join(sections)


def _measured(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def _audits(run: Results, words: Catalogue) -> str:
    where, first = run.provenance, run.audits[0]
    said = words["audits"].format(
        card=where.device_name,
        dtype=where.compute_dtype,
        torch=where.torch,
        date=where.timestamp_utc[:10],
        model=f"`{first.model}`",
        n=first.n_planted,
        records=first.records_source,
    )
    names = (
        *("method", "seed", "trained", "extracted on", "extracted off", "loss off", "exposure off"),
        *("tests that see", "attacks that see", "verdict"),
    )
    header = [words[name] for name in names]
    seeds = words["seeds"].format(**seed_facts(run))
    return "\n".join([said, "", *_table(header, audit_rows(run, words)), "", seeds])


def _audit_costs(runs: Sequence[Results], words: Catalogue) -> str:
    where = runs[0].provenance
    audits = [run.audits[0] for run in runs]
    return words["audit costs"].format(
        cores=where.cpu_cores,
        cpu=where.cpu_model,
        dtype=where.compute_dtype,
        torch=where.torch,
        date=where.timestamp_utc[:10],
        seconds=words["between"].join(f"{sum(a.seconds.values()):.0f}" for a in audits),
        records=words["between"].join(str(a.n_planted) for a in audits),
    )


def _memory(found: dict[str, Any], words: Catalogue) -> str:
    rows = []
    for model, name in {"8B": "Llama 3 8B", "3B": "Llama 3.2 3B"}.items():
        made, ran = found[model]["separate"], found[model]["run"]
        outcome, planned = words["not measured"], ""
        if "peak_reserved_mib" in ran:
            outcome = f"{ran['peak_reserved_mib']:,.0f}"
            tokens = CONTEXT + ran["new_tokens"]
            planned = f"{run_budget(GEOMETRIES[model], PLANNED, tokens).total_mib:,.0f}"
        elif "OutOfMemory" in ran.get("failed", ""):
            outcome = words["ran out of memory"]
        tuned = found[model].get("tune", {}).get("probe", {}).get("memory", {})
        tuning = f"{tuned['peak_reserved_mib']:,.0f}" if tuned else words["not measured"]
        mib = (f"{made[key]:,.0f}" for key in ("peak_own_host_mib", "peak_reserved_mib"))
        rows.append([name, f"{made['seconds']:.0f}", *mib, planned, outcome, tuning])
    names = ("model", "seconds", "host memory", "card memory", "planned", "running it", "tuning it")
    header = [words[k] for k in names]
    where = found["environment"]
    said = words["memory"].format(
        card=where["device"], torch=where["torch"], date=where["date_utc"][:10]
    )
    return "\n".join([said, "", *_table(header, rows)])


def block_of(text: str) -> str:
    """What a README says between its marks."""
    return text.split(BEGIN)[1].split(END, maxsplit=1)[0].strip("\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    names = " | ".join(header).strip()
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {names} |", "|" + "---|" * len(header), *body]


def _conditions(run: Results, words: Catalogue) -> str:
    where, result = run.provenance, run.exp1_kill_switch
    assert result is not None
    return words["conditions"].format(
        model=f"`{result.model}`",
        cores=where.cpu_cores,
        cpu=where.cpu_model,
        dtype=where.compute_dtype,
        torch=where.torch,
        transformers=where.transformers,
        bitsandbytes=where.bitsandbytes,
        date=where.timestamp_utc[:10],
    )


def _kill_switch(run: Results, words: Catalogue) -> str:
    result = run.exp1_kill_switch
    assert result is not None
    n = result.n_planted
    never = round((result.extraction_rate_never_trained or 0) * n)
    interval = (
        f"[{result.loss_planted_never_trained_low95:.3f}, "
        f"{result.loss_planted_never_trained_high95:.3f}]"
    )
    states = [
        ("alpha1", result.hits_alpha1, result.loss_planted_alpha1, result.loss_twins_alpha1, ""),
        ("alpha0", result.hits_alpha0, result.loss_planted_alpha0, result.loss_twins_alpha0, ""),
        ("never", never, result.loss_planted_never_trained, None, f" {interval}"),
    ]
    rows = [
        [
            words[f"state {name}"],
            words["hits"].format(hits=hits, n=n),
            f"{planted:.3f}{note}",
            "" if twins is None else f"{twins:.3f}",
        ]
        for name, hits, planted, twins, note in states
    ]
    header = ["", *(words[name] for name in ("extracted", "loss on planted", "loss on twins"))]
    ratio = words["privacy ratio"].format(
        ratio=f"{result.privacy_ratio_lower95:.1f}",
        fingerprint=f"`{result.base_fingerprint[:16]}…`",
    )
    return "\n".join([words["kill switch"], "", *_table(header, rows), "", ratio])


def _null_test(runs: list[Results], words: Catalogue) -> str:
    tests = [run.exp2_null_test for run in runs if run.exp2_null_test is not None]
    first = tests[0]
    said = words["null test"].format(
        windows=first.windows, tokens=first.window_tokens, calibration=first.calibration_corpus
    )
    header = ["", words["bits"]]
    for test in tests:
        header += [words["perplexity"].format(corpus=test.corpus), words["ratio"]]
    rows = [
        [
            words[name],
            f"{first.arms[name].bits_per_linear_weight:.2f}",
            *(cell for test in tests for cell in _cells(test.arms[name], words)),
        ]
        for name in ARMS
    ]
    return "\n".join([said, "", *_table(header, rows)])


def _cells(arm: ArmResult, words: Catalogue) -> tuple[str, str]:
    if arm.ppl is None:
        return words["not measured because"].format(reason=arm.reasons["ppl"]), ""
    return f"{arm.ppl:.2f}", f"{arm.ratio:.3f} [{arm.ratio_low95:.3f}, {arm.ratio_high95:.3f}]"


def _heads(runs: Sequence[Results], words: Catalogue) -> str:
    wide, packed = (run.exp2_null_test for run in runs)
    assert wide is not None
    assert packed is not None
    where = runs[0].provenance
    ratios = {}
    for bits, test in (("16", wide), ("8", packed)):
        for arm in ("alpha1", "alpha0"):
            ratios[f"{arm}_{bits}"] = " ".join(_cells(test.arms[arm], words)[1:])
    return words["heads"].format(dtype=where.compute_dtype, corpus=wide.corpus, **ratios)


def _throughput(run: Results, words: Catalogue) -> str:
    rates = {(r.arm, r.phase): r for r in run.throughput}
    rows = []
    for name in ARMS:
        pair = [rates.get((name, phase)) for phase in ("prefill", "decode")]
        cells = [
            words["not measured"]
            if r is None or r.tokens_per_s is None
            else f"{r.tokens_per_s:.1f}"
            for r in pair
        ]
        rows.append([words[name], *cells])
    table = _table(["", words["prefill"], words["decode"]], rows)
    lines = [words["throughput"], "", *table]
    switch = rates.get(("alpha1", "switch"))
    if switch is not None and switch.median_s is not None:
        lines += ["", words["switching"].format(ms=f"{1000 * switch.median_s / 2:.1f}")]
    return "\n".join(lines)


def _card(run: Results, words: Catalogue) -> str:
    where, one, two = run.provenance, run.exp1_kill_switch, run.exp2_null_test
    assert one is not None
    assert two is not None
    ratios = {name: two.arms[name].ratio for name in ("alpha1", "alpha0", "nf4", "plain")}
    assert all(ratio is not None for ratio in ratios.values())
    return words["card"].format(
        card=where.device_name,
        dtype=where.compute_dtype,
        torch=where.torch,
        transformers=where.transformers,
        date=where.timestamp_utc[:10],
        hits1=one.hits_alpha1,
        hits0=one.hits_alpha0,
        n=one.n_planted,
        corpus=two.corpus,
        **{name: f"{ratio:.3f}" for name, ratio in ratios.items()},
    )


def _kernels(found: dict[str, Any], words: Catalogue) -> str:
    said = words["kernels"].format(**kernel_facts(found))
    names = ("layer", "base", "share", "streams", "overlapped", "int4pack", "fp16")
    header = [words[n] for n in names]
    return "\n".join([said, "", *_table(header, kernel_rows(found))])


def _decoding(found: dict[str, Any], words: Catalogue) -> str:
    said = words["decoding"].format(**decode_facts(found))
    names = ("model", "tokens a second", "share", "first token", "reserved", "projected")
    header = [words[n] for n in names]
    return "\n".join([said, "", *_table(header, decode_rows(found, words))])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every README's block, or write each into its README."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the blocks into the READMEs")
    write = parser.parse_args(arguments).write
    for name in CATALOGUES:
        if write:
            text = (ROOT / name).read_text(encoding="utf-8")
            before, after = text.split(BEGIN)[0], text.split(END)[1]
            atomic_write_text(ROOT / name, f"{before}{BEGIN}{render(name)}\n{END}{after}")
        else:
            sys.stdout.write(f"{name}\n\n{render(name)}\n\n")


if __name__ == "__main__":
    main()
