"""The figures of a results file, one by one: what each is called, its unit, limits and direction.

Knows results. What shows figures (`report`) or compares them (`compare`) takes them from here, so
that a figure has one name, one unit and one direction everywhere. Computes nothing.

A name is the figure's path in the file, such as `exp2_null_test.arms.alpha1.ratio`. Throughput
cases and audits, which are items of lists there, go by arm and phase, and by method.
"""

from __future__ import annotations

from libortho.results import Results

from .audits import audit_figures
from .experiments import kill_switch_figures, null_test_figures, throughput_figures
from .figure import Better, Figure, Noise, Unit, arm_name

__all__ = ["Better", "Figure", "Noise", "Unit", "arm_name", "figures"]


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a run by name, in the order of the file."""
    found: list[Figure] = []
    if results.exp1_kill_switch is not None:
        found += kill_switch_figures(results.exp1_kill_switch)
    if results.exp2_null_test is not None:
        found += null_test_figures(results.exp2_null_test)
    found += audit_figures(results.audits)
    found += throughput_figures(results.throughput)
    return {figure.name: figure for figure in found}
