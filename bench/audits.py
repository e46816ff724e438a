"""Audits of several runs as one results file: `python -m bench.audits --out FILE RESULTS...`.

Methods are audited side by side, a process each, and a reader wants them in one file. They must be
of one model, card and set of versions; what each method was trained by is in its own audit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from libortho.errors import ConfigError
from libortho.files import atomic_write_text
from libortho.results import Results, read_results, to_json

ALIKE = ("libortho", "torch", "transformers", "bitsandbytes", "device_name", "compute_dtype")
"""What the runs must share, by its name in `Provenance`."""


def merged(runs: Sequence[Results]) -> Results:
    """One `Results` with the audits of all; provenance is the first run's, with every command.

    Raises `ConfigError` if there is nothing to merge, if runs differ in what is `ALIKE` or in the
    model, or if a method was audited twice with one seed.
    """
    audits = [audit for run in runs for audit in run.audits]
    if not audits:
        raise ConfigError("none of these files holds an audit; make some with: pytest -m audit")
    first = runs[0].provenance
    for run in runs:
        for name in ALIKE:
            here, there = getattr(first, name), getattr(run.provenance, name)
            if here != there:
                raise ConfigError(f"the runs differ in {name}: {here} and {there}.")
    seen: set[tuple[str, int]] = set()
    for audit in audits:
        if audit.model != audits[0].model:
            raise ConfigError(f"audits of {audits[0].model} and of {audit.model} are two tables.")
        if (audit.method, audit.seed) in seen:
            raise ConfigError(f"{audit.method} was audited twice with seed {audit.seed}.")
        seen.add((audit.method, audit.seed))
    command = [word for run in runs for word in (*run.provenance.command, ";")]
    provenance = replace(first, command=tuple(command[:-1]))
    return replace(runs[0], provenance=provenance, audits=tuple(audits))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.audits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("results", type=Path, nargs="+", help="results files with audits")
    options = parser.parse_args(arguments)
    text = to_json(merged([read_results(path) for path in options.results]))
    atomic_write_text(options.out, text)


if __name__ == "__main__":
    main()
