"""The report: what the file says is what the page shows, and nothing else."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import html5lib
import pytest
from hypothesis import HealthCheck, given, settings
from report_examples import (
    ON_A_CPU,
    kill_switch,
    null_test,
    provenance,
    run_results,
    throughput_case,
)
from test_results import some

from libortho.errors import ConfigError
from libortho.report import FORMATS, render, write_report
from libortho.report.page import SECTIONS
from libortho.results import ArmResult, RecordOutcome, Results, to_json

NASTY = "<script>alert('&\"')</script>"
NS = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


def page(*runs: Results) -> str:
    return render([(f"run-{i}.json", run) for i, run in enumerate(runs)])


def parsed(text: str) -> ElementTree.Element:
    """The page as a tree; raises for anything that the HTML standard calls a parse error."""
    return html5lib.HTMLParser(strict=True).parse(text)


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def table_of(tree: ElementTree.Element, caption: str) -> dict[str, list[str]]:
    """The rows of the one table whose caption begins so, by the name of the row."""
    tables = [
        table
        for table in tree.iter(f"{NS}table")
        if text_of(table.find(f"{NS}caption")).startswith(caption)  # type: ignore[arg-type]
    ]
    (table,) = tables
    return {
        text_of(row[0]): [text_of(cell) for cell in row[1:]]
        for row in table.find(f"{NS}tbody")  # type: ignore[union-attr]
    }


# --- the figures --------------------------------------------------------------------------------


def in_file(content: dict[str, Any], name: str) -> Any:
    """What the results file holds under a figure's name."""
    section, _, rest = name.partition(".")
    if section == "throughput":
        where, _, field = rest.rpartition(".")
        where, _, copy = where.partition("#")
        cases = [c for c in content["throughput"] if f"{c['arm']}.{c['phase']}" == where]
        return cases[int(copy or 1) - 1][field]
    parent, value = content, content[section]
    for key in rest.split("."):
        parent, value = value, value[key]
    return value / parent["n_planted"] if ".per_family." in name else value


def test_every_figure_of_the_page_is_that_of_the_file() -> None:
    results = run_results()
    content = json.loads(to_json(results))
    tree = parsed(page(results))
    shown = {
        item.get("data-figure"): float(item.get("value", "nan"))
        for item in tree.iter(f"{NS}data")
        if item.get("data-figure")
    }
    for name, value in shown.items():
        assert value == in_file(content, name), name
    for section, prefix in (("exp1_kill_switch", "extraction_rate"), ("exp1_kill_switch", "loss_")):
        numbers = [
            k for k, v in content[section].items() if k.startswith(prefix) and isinstance(v, float)
        ]
        names = {f"{section}.{k}" for k in numbers if not k.endswith("95")}
        assert names <= shown.keys()
    assert {f"exp2_null_test.arms.{arm}.ratio" for arm in results.exp2_null_test.arms} <= set(shown)  # type: ignore[union-attr]
    assert "throughput.nf4.decode.tokens_per_s" in shown


def test_the_text_of_a_figure_is_its_value_rounded() -> None:
    tree = parsed(page(run_results()))
    assert table_of(tree, "40 planted records") == {
        "alpha = 1": ["40 of 40 [91.2%, 100.0%]", "0.012", "3.871"],
        "alpha = 0": ["0 of 40 [0.0%, 8.8%]", "2.950", "2.949"],
        "never trained": [
            "0 of 40",
            "2.950 [2.712, 3.189]",
            "not measured: the file has no such figure",
        ],
    }
    perplexity = table_of(tree, "Perplexity on 50 windows of 512 tokens of enwiki")
    assert perplexity["alpha = 1"][:2] == ["31.921", "1.106 [1.094, 1.118]"]
    assert perplexity["bitsandbytes NF4"][:2] == ["34.321", "1.189 [1.177, 1.201]"]
    assert table_of(tree, "Stored bits")["alpha = 0"] == ["4.660"]
    assert table_of(tree, "Decode, median")["alpha = 1"] == ["18.2"]
    assert table_of(tree, "By family")["codes"] == ["20 of 20", "0 of 20"]


def test_the_curve_is_drawn_and_told_step_by_step() -> None:
    results = run_results()
    assert results.exp1_kill_switch is not None
    tree = parsed(page(results))
    rows = table_of(tree, "The curve as numbers")
    assert len(rows) == len(results.exp1_kill_switch.loss_curve)
    last = results.exp1_kill_switch.loss_curve[-1]
    assert rows[f"{last.step}"][0] == f"{last.secret_loss:.4f}"
    curves = list(tree.iter(f"{SVG}polyline"))
    assert [len(line.get("points", "").split()) for line in curves] == [len(rows)] * 2


def test_memory_is_arithmetic_against_the_card() -> None:
    tree = parsed(page(run_results()))
    rows = table_of(tree, "MiB needed, by arithmetic")
    header, names = rows["in all"], ["smollm2", "llama-3.2-3b", "llama-3-8b"]
    whole = dict(zip(names, header, strict=True))
    assert float(whole["llama-3-8b"].replace(",", "")) > 5120
    assert rows["of 5,120 usable"][0] == "it fits"
    assert rows["of 5,120 usable"][2].endswith("too many")
    text = text_of(tree)
    assert "Arithmetic, not a measurement" in text
    assert f"Peak memory: not measured: {ON_A_CPU}" in text


def test_the_guides_cards_are_measured_only_where_they_were_used() -> None:
    tree = parsed(page(run_results()))
    rows = table_of(tree, "Tokens per second at batch 1")
    assert [cells[0] for cells in rows.values()] == ["20 to 30"] * 2 + ["8 to 15"] * 2
    ceilings = [float(cells[1]) for cells in rows.values()]
    assert ceilings == sorted(ceilings[:2]) + sorted(ceilings[2:])  # INT8 heads are read faster
    assert 70 < ceilings[0] < 101
    assert 30 < ceilings[2] < 45
    assert "Measured, alpha = 1: not measured: this run was on A processor" in text_of(tree)
    for absent in ("4090", "A100"):
        assert absent not in text_of(tree)

    on_the_card = run_results(
        provenance=provenance(device_name="NVIDIA GeForce RTX 4050 Laptop GPU"),
        exp1_kill_switch=kill_switch(model="llama-3.2-3b"),
        exp2_null_test=null_test(model="llama-3.2-3b"),
    )
    rows = table_of(parsed(page(on_the_card)), "Tokens per second at batch 1")
    assert rows["RTX 4050, llama-3.2-3b, FP16 head"][3] == "18.2"
    assert rows["RTX 4050, llama-3-8b, FP16 head"][3].startswith("not measured")


def test_the_roofline_is_told_where_the_case_carries_its_bytes() -> None:
    case = throughput_case("alpha1", "decode", 50.0, peak_memory_mib=1500.0, reasons={})
    case.conditions.update(bytes_per_token=2e9, copy_bandwidth_gb_per_s=200.0)
    tree = parsed(page(run_results(throughput=(case,))))
    assert table_of(tree, "Decode, median")["alpha = 1"] == ["50.0", "1,500", "50%"]
    assert "Measured: at most 1,500 MiB" in text_of(tree)


# --- what is missing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left_out",
    [
        {"exp1_kill_switch": None},
        {"exp2_null_test": None},
        {"throughput": ()},
        {"exp1_kill_switch": None, "exp2_null_test": None},
    ],
)
def test_a_missing_section_says_why(left_out: dict[str, Any]) -> None:
    reasons = {name: "it was taken out" for name, value in left_out.items() if value is None}
    results = run_results(**left_out, reasons=reasons)
    tree = parsed(page(results))
    headings = [text_of(h) for h in tree.iter(f"{NS}h2")]
    assert len(headings) == len(SECTIONS)
    assert ("Not measured: it was taken out." in text_of(tree)) == bool(reasons)
    if left_out == {"throughput": ()}:
        assert "Not measured: no throughput case ran." in text_of(tree)
    for form in FORMATS:
        assert render([("one.json", results)], form)


def test_a_null_figure_shows_its_reason() -> None:
    arms = dict(null_test().arms)
    fields = ("ppl", "ratio", "ratio_low95", "ratio_high95", "bits_per_linear_weight")
    why = dict.fromkeys(fields, "bitsandbytes is missing")
    arms["nf4"] = ArmResult(precision="not measured", reasons=why)
    tree = parsed(page(run_results(exp2_null_test=null_test(arms=arms))))
    row = table_of(tree, "Perplexity on 50 windows")["bitsandbytes NF4"]
    assert row[:2] == ["not measured: bitsandbytes is missing"] * 2
    assert "exp2_null_test.arms.nf4.ppl" in text_of(tree)


def test_a_run_without_a_curve_or_records_says_so() -> None:
    tree = parsed(page(run_results(exp1_kill_switch=kill_switch(loss_curve=(), record_hashes=()))))
    assert "Not measured: the artefact was not tuned in this run" in text_of(tree)
    assert "Not measured: this file lists no records." in text_of(tree)


def test_a_model_outside_the_registry_has_no_bar() -> None:
    results = run_results(exp1_kill_switch=kill_switch(model="mine"))
    assert "mine: no bar" in text_of(parsed(page(results)))


# --- the verdict --------------------------------------------------------------------------------


def headline_of(results: Results) -> tuple[str, str]:
    tree = parsed(page(results))
    (block,) = (d for d in tree.iter(f"{NS}div") if "headline" in (d.get("class") or ""))
    return text_of(block), str(block.get("class"))


def test_the_verdict_stands_first_in_one_sentence() -> None:
    text, tone = headline_of(run_results())
    assert text == (
        "Passes smollm2 at 4 bits passes both gates: it recites 40 of 40 planted records at alpha "
        "= 1 and 0 at alpha = 0, where its fingerprint is that of before tuning, and its "
        "perplexity at alpha = 1 is 1.106 times the unquantised model's."
    )
    assert "tone-passes" in tone


@pytest.mark.parametrize("verdict", ["fails", "inconclusive"])
def test_one_gate_that_is_not_passed_decides(verdict: Any) -> None:
    bad = kill_switch(verdict=verdict, verdict_reason="because of the ratio")
    text, tone = headline_of(run_results(exp1_kill_switch=bad))
    assert text.startswith(verdict.capitalize())
    assert "privacy gate: because of the ratio" in text
    assert f"tone-{verdict}" in tone
    assert "passes" not in text.lower()


def test_a_failure_outranks_what_is_inconclusive() -> None:
    results = run_results(
        exp1_kill_switch=kill_switch(verdict="inconclusive", verdict_reason="too few"),
        exp2_null_test=null_test(verdict="fails", verdict_reason="too much"),
    )
    text, tone = headline_of(results)
    assert text.startswith("Fails smollm2 at 4 bits fails the perplexity gate: too much")
    assert "tone-fails" in tone


def test_a_gate_that_did_not_run_is_no_passed_gate() -> None:
    text, _ = headline_of(run_results(exp2_null_test=None, reasons={"exp2_null_test": "left out"}))
    assert text.startswith("Passes, privacy only")
    assert "the perplexity gate did not run (left out)" in text
    none = {"exp1_kill_switch": "no time", "exp2_null_test": "no time"}
    text, tone = headline_of(run_results(exp1_kill_switch=None, exp2_null_test=None, reasons=none))
    assert text.startswith("No verdict")
    assert "tone-missing" in tone


def test_a_changed_base_is_not_praised() -> None:
    result = kill_switch(fingerprint_equal=False)
    tree = parsed(page(run_results(exp1_kill_switch=result)))
    assert "where its fingerprint" not in text_of(tree)
    assert table_of(tree, "What follows")["base fingerprint"][0].endswith("CHANGED")


def test_records_that_leak_are_listed_and_the_others_are_not() -> None:
    tree = parsed(page(run_results(exp1_kill_switch=kill_switch(hits_alpha1=39, hits_alpha0=2))))
    rows = table_of(tree, "3 of 40 records")
    assert list(rows) == ["codes-0000", "passages-0001", "passages-0039"]
    assert rows["codes-0000"][1:3] == ["extracted", "EXTRACTED"]
    assert rows["passages-0039"][1:3] == ["not extracted", "not extracted"]
    many = parsed(
        page(run_results(exp1_kill_switch=kill_switch(n=200, hits_alpha1=200, hits_alpha0=80)))
    )
    assert len(table_of(many, "80 of 200 records; 30 more")) == 50


# --- escaping -----------------------------------------------------------------------------------


def nasty_results() -> Results:
    record = RecordOutcome(
        id=NASTY, salted_hash=NASTY, family=NASTY, extracted_alpha1=False, extracted_alpha0=True
    )
    result = kill_switch(record_hashes=(record,), model=NASTY, records_source=NASTY)
    result.per_family[NASTY] = result.per_family["codes"]
    arms = {NASTY: null_test().arms["alpha1"], "reference": null_test().arms["reference"]}
    return run_results(
        provenance=provenance(command=("pytest", NASTY), cpu_model=NASTY),
        exp1_kill_switch=result,
        exp2_null_test=null_test(arms=arms, verdict_reason=NASTY, model=NASTY, corpus=NASTY),
        throughput=(throughput_case(NASTY, "decode", 3.0, outcome=NASTY),),
        reasons={"attacks": NASTY},
    )


def test_what_a_file_says_stays_text() -> None:
    text = render([(NASTY, nasty_results()), (f"{NASTY}2", nasty_results())])
    tree = parsed(text)
    assert not list(tree.iter(f"{NS}script"))
    assert not list(tree.iter(f"{SVG}script"))
    assert "<script" not in text.lower()
    assert text.count(html.escape(NASTY)) + text.count("&lt;script&gt;") > 20
    assert NASTY in table_of(parsed(page(nasty_results())), "1 of 1 records")


def test_markdown_shows_markup_as_text() -> None:
    text = render([("run.json", nasty_results())], "markdown")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    pipes = kill_switch(records_source="a | b\n# c `d` *e* [f](g)")
    text = render([("run.json", run_results(exp1_kill_switch=pipes))], "markdown")
    assert r"a \| b \# c \`d\` \*e\* \[f\](g)" in text


def test_control_characters_and_text_that_reorders_are_replaced() -> None:
    odd = run_results(provenance=provenance(cpu_model="a\x00b\x1b[31mc\u202ed\ufffee"))
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde" in text_of(parsed(page(odd)))


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = page(run_results(), run_results())
    tree = parsed(text)
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on"), (element.tag, name)
            if name in ("src", "href"):
                assert value == "data:,"
    assert not re.search(r"@import|url\(|<script|<iframe|<object", text)
    policies = [m for m in tree.iter(f"{NS}meta") if m.get("http-equiv")]
    assert [m.get("content", "").split(";")[0] for m in policies] == ["default-src 'none'"]


# --- the page as a page -------------------------------------------------------------------------


def test_charts_can_be_heard_and_tables_are_tables() -> None:
    tree = parsed(page(run_results()))
    pictures = [s for s in tree.iter(f"{SVG}svg") if s.get("aria-hidden") != "true"]
    assert len(pictures) == 10
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert picture.get("role") == "img"
        labels = (picture.get("aria-labelledby") or "").split()
        assert labels
        assert set(labels) <= set(ids)
        assert text_of(picture.find(f"{SVG}desc"))  # type: ignore[arg-type]
    for table in tree.iter(f"{NS}table"):
        assert text_of(table.find(f"{NS}caption"))  # type: ignore[arg-type]
        for row in table.find(f"{NS}tbody"):  # type: ignore[union-attr]
            assert row[0].get("scope") == "row"


def test_every_kind_of_mark_has_a_colour() -> None:
    text = page(run_results())
    used = set(re.findall(r'class="[^"]*\b(mark-[a-z]+)', text))
    styled = set(re.findall(r"\.(mark-[a-z]+)", text.split("</style>")[0]))
    assert used <= styled


def test_what_an_interrupted_run_had_measured_is_said() -> None:
    resumed = run_results(resumed={"perplexity, alpha1": "2026-03-04T15:06:07+00:00"})
    told = "measured by an interrupted run: perplexity, alpha1 (2026-03-04T15:06:07+00:00)"
    assert told in text_of(parsed(page(resumed)))
    assert "interrupted" not in text_of(parsed(page(run_results())))


@pytest.mark.parametrize("n", [2, 3])
def test_several_runs_stand_side_by_side(n: int) -> None:
    slow = run_results(throughput=(throughput_case("alpha1", "decode", 2.0),))
    tree = parsed(page(run_results(), *[slow] * (n - 1)))
    assert len([d for d in tree.iter(f"{NS}div") if "headline" in (d.get("class") or "")]) == n
    figures = table_of(tree, "Every figure of every file")
    assert figures["decode, alpha = 1"] == ["18.2", *["2.0"] * (n - 1)]
    assert figures["decode, unquantised"][1] == "not measured: the file has no such figure"
    assert len(table_of(tree, "Conditions")["versions"]) == n
    changed = table_of(tree, "run-1.json: 1 changes beyond noise")
    assert changed["decode, alpha = 1"][:4] == ["18.2", "2.0", "-89.0%", "worse"]


def test_runs_that_cannot_be_compared_say_why() -> None:
    other = run_results(provenance=provenance(cpu_model="Another processor"))
    assert "can't be compared with run-0.json: the CPU is" in text_of(
        parsed(page(run_results(), other))
    )


@given(results=some(Results))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_results_give_valid_pages(results: Results) -> None:
    tree = parsed(page(results))
    assert tree.find(f"{NS}body") is not None
    for name in ("x1", "x2", "y1", "cx", "width", "points"):
        for element in tree.iter():
            if element.tag.startswith(SVG):
                assert "nan" not in (element.get(name) or "")
                assert "inf" not in (element.get(name) or "")
    assert render([("a", results), ("a", results)], "markdown").startswith("# ")
    json.loads(render([("a", results)], "benchmark-json"))


# --- formats ------------------------------------------------------------------------------------


def test_markdown_has_the_sections_and_figures_of_the_page() -> None:
    text = render([("run.json", run_results())], "markdown")
    assert len(re.findall(r"^## ", text, re.M)) == len(SECTIONS)
    assert "✅ **Passes**: smollm2 at 4 bits passes both gates" in text
    assert r"| alpha = 1 | 40 of 40 \[91.2%, 100.0%\] | 0.012 | 3.871 |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_benchmark_json_is_what_the_action_reads() -> None:
    results = run_results()
    bigger = json.loads(render([("run.json", results)], "benchmark-json", better="bigger"))
    smaller = json.loads(render([("run.json", results)], "benchmark-json", better="smaller"))
    for entry in (*bigger, *smaller):
        assert entry.keys() <= {"name", "unit", "value", "range", "extra"}
        assert isinstance(entry["value"], float)
    names = {entry["name"]: entry for entry in bigger}
    assert names["throughput.alpha1.decode.tokens_per_s"]["value"] == 18.2
    assert names["exp1_kill_switch.extraction_rate_alpha1"]["range"] == "0.911903 to 1"
    fewer = {entry["name"]: entry for entry in smaller}
    assert fewer["exp2_null_test.arms.alpha1.ratio"]["range"] == "1.094 to 1.118"
    assert "exp1_kill_switch.extraction_rate_alpha0" in fewer
    assert not names.keys() & fewer.keys()
    both = [("a.json", results), ("a.json", results)]
    names_of_both = [e["name"] for e in json.loads(render(both, "benchmark-json"))]
    assert len(names_of_both) == len(set(names_of_both)) == 2 * len(names)


def test_a_report_of_nothing_and_a_format_that_there_is_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one results file"):
        render([])
    with pytest.raises(ConfigError, match=r"'pdf'.*html, markdown, benchmark-json"):
        render([("run.json", run_results())], "pdf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens_per_s.*nan"):
        page(run_results(throughput=(throughput_case("alpha1", "decode", float("nan")),)))


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report([("run.json", run_results())], tmp_path / "new" / "report.html")
    before = path.read_text(encoding="utf-8")
    assert before == render([("run.json", run_results())])
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            write_report([("run.json", replace(run_results(), throughput=()))], path)
    assert path.read_text(encoding="utf-8") == before
    assert list(path.parent.iterdir()) == [path]
