"""Whether two runs measured the same thing, and in what else they differ.

Knows the conditions in results files. Judges no figure. A results file names a model but not its
revision, so another checkpoint of the same name shows by the perplexity of the unquantised model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .figures import figures
from .figures.audits import audit_names
from .results import KillSwitchResult, NullTestResult, Results

REFERENCE_TOLERANCE = 0.01
"""Relative difference of the unquantised reference's perplexity on the same windows and in the same
dtype, at most. Libraries and CPUs move it in the fourth digit; another checkpoint by more."""

WORKLOAD = ("batch", "prompt_tokens", "new_tokens", "tokens", "context_tokens")
"""Conditions of a throughput case that make it another case."""


def obstacles(before: Results, after: Results) -> Iterator[str]:
    """Why two runs can't be compared, as clauses; none if they can."""
    yield from _differing(
        ("the device", before.provenance.device_name, after.provenance.device_name),
    )
    if before.provenance.device_name == after.provenance.device_name == "cpu":
        yield from _differing(("the CPU", before.provenance.cpu_model, after.provenance.cpu_model))
    sections = (
        ("experiment 1", before.exp1_kill_switch, after.exp1_kill_switch),
        ("experiment 2", before.exp2_null_test, after.exp2_null_test),
        ("an audit", before.audits or None, after.audits or None),
        ("throughput", before.throughput or None, after.throughput or None),
    )
    for name, first, second in sections:
        if (first is None) != (second is None):
            yield f"only the {'second' if first is None else 'first'} run has {name}"
    if before.exp1_kill_switch is not None and after.exp1_kill_switch is not None:
        yield from _kill_switch_obstacles(before.exp1_kill_switch, after.exp1_kill_switch)
    if before.exp2_null_test is not None and after.exp2_null_test is not None:
        same_dtype = before.provenance.compute_dtype == after.provenance.compute_dtype
        yield from _null_test_obstacles(before.exp2_null_test, after.exp2_null_test, same_dtype)
    yield from _audit_obstacles(before, after)
    yield from _workload_obstacles(before, after)


def _kill_switch_obstacles(first: KillSwitchResult, second: KillSwitchResult) -> Iterator[str]:
    yield from _differing(
        ("experiment 1's model", first.model, second.model),
        (
            "the families of records",
            ", ".join(sorted(first.per_family)),
            ", ".join(sorted(second.per_family)),
        ),
    )


def _null_test_obstacles(
    first: NullTestResult, second: NullTestResult, same_dtype: bool
) -> Iterator[str]:
    same = (
        ("experiment 2's model", first.model, second.model),
        ("the test text's SHA-256", first.corpus_sha256, second.corpus_sha256),
        ("the number of windows", first.windows, second.windows),
        ("the tokens of a window", first.window_tokens, second.window_tokens),
    )
    found = list(_differing(*same))
    yield from found
    one, other = first.ppl_fp16, second.ppl_fp16
    if found or not same_dtype or one is None or other is None:
        return
    if abs(other - one) > REFERENCE_TOLERANCE * abs(one):
        yield (
            f"the unquantised model has perplexity {one:.4f} in one run and {other:.4f} in the "
            "other on the same text, so these are different checkpoints of that name"
        )


def _audit_obstacles(before: Results, after: Results) -> Iterator[str]:
    old, new = (dict(zip(audit_names(r.audits), r.audits, strict=True)) for r in (before, after))
    for name in (name for name in old if name in new):
        families = [
            ", ".join(sorted({row.family for row in audit.metrics}))
            for audit in (old[name], new[name])
        ]
        yield from _differing(
            (f"the model of the audit of {name}", old[name].model, new[name].model),
            (f"the families of the audit of {name}", families[0], families[1]),
        )


def _workload_obstacles(before: Results, after: Results) -> Iterator[str]:
    old, new = figures(before), figures(after)
    told: set[str] = set()
    for name, figure in old.items():
        other, where = new.get(name), name.rpartition(".")[0]
        if other is None or where in told:
            continue
        for key in WORKLOAD:
            one, two = figure.conditions.get(key), other.conditions.get(key)
            if one != two:
                told.add(where)
                yield f"{where} was measured with {key} {one} in one run and {two} in the other"


def _differing(*facts: tuple[str, Any, Any]) -> Iterator[str]:
    for name, one, two in facts:
        if one != two:
            yield f"{name} is {one} in one run and {two} in the other"


def differences(before: Results, after: Results) -> Iterator[str]:
    """Conditions that differ and don't hinder: what a change may be due to, as clauses."""
    names = ("compute_dtype", "libortho", "git_commit", "torch", "transformers", "bitsandbytes")
    where = (before.provenance, after.provenance)
    yield from _differing(*((n, getattr(where[0], n), getattr(where[1], n)) for n in names))
    for title, one, two in (
        ("experiment 1", before.exp1_kill_switch, after.exp1_kill_switch),
        ("experiment 2", before.exp2_null_test, after.exp2_null_test),
    ):
        if one is None or two is None:
            continue
        for name in ("quantization_bits", "seed", "method", "base_fingerprint", "n_planted"):
            if hasattr(one, name):
                yield from _differing((f"{title}'s {name}", getattr(one, name), getattr(two, name)))
        yield from _config_notes(title, one.config, two.config)
    tests = before.exp2_null_test, after.exp2_null_test
    if tests[0] is not None and tests[1] is not None:
        first_hash, second_hash = (t.calibration_sha256 for t in tests if t is not None)
        yield from _differing(("the calibration text's SHA-256", first_hash, second_hash))


def _config_notes(where: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for key in sorted(one.keys() | two.keys()):
        first, second = one.get(key), two.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _config_notes(f"{where}, {key}", first, second)
        else:
            yield from _differing((f"{where}, {key}", first, second))
