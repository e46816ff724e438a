"""`audit`: what the off state of a saved artefact gives away of the records it was tuned on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import libortho
from libortho import hardware
from libortho.audit_artefact import audit_artefact
from libortho.audit_results import AuditResult
from libortho.errors import ArtifactError
from libortho.files import atomic_write_text
from libortho.models import resolve_model
from libortho.precision import dtype_name
from libortho.provenance import collect_provenance
from libortho.results import Results, to_json
from libortho.summary import summary_lines

from . import output
from .commands import (
    EXIT_DONE,
    EXIT_NO,
    Commands,
    add_cache_dir,
    add_command,
    add_device,
    add_json,
)
from .output import note, out


def add_commands(commands: Commands) -> None:
    """Add `audit`."""
    parser = add_command(
        commands,
        "audit",
        _audit,
        "judge what alpha = 0 of an artefact gives away of its records",
        examples=(
            "audit ./full --records records.jsonl",
            "audit ./full --records records.jsonl --model ./my-llama --corpus notes.txt",
            "audit ./full --records records.jsonl --no-attacks --out audit.json",
        ),
        more="Beside it stand twins of the records and the public model, separated anew by the "
        "artefact's own recipe, which never saw them.",
        exit_codes="0 private, by construction or as far as tested; 1 it leaks, or the evidence "
        "carries no verdict",
    )
    parser.add_argument("artefact", type=Path, help="folder of a tuned model")
    parser.add_argument(
        "--records", type=Path, required=True, metavar="FILE", help="what it was tuned on"
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        help="the public model that it was made from (default: %(default)s)",
    )
    parser.add_argument(
        "--corpus",
        default="enwiki",
        help="the text that it was calibrated on (default: %(default)s)",
    )
    parser.add_argument(
        "--no-attacks",
        dest="attacks",
        action="store_false",
        help="judge by predictions alone; much faster",
    )
    parser.add_argument(
        "--relearn", action="store_true", help="attack by fine-tuning as well; much slower"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of generated twins and attacks (default: %(default)d)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write a results file, for `report`"
    )
    add_device(parser)
    add_cache_dir(parser)
    add_json(parser)


def _audit(options: argparse.Namespace) -> int:
    records = libortho.load_records(options.records, seed=options.seed)
    device = hardware.resolve_device(options.device)
    dtype, _ = hardware.default_compute_dtype(device)
    result = audit_artefact(
        options.artefact,
        records,
        public_model=resolve_model(options.model, options.cache_dir),
        corpus=libortho.load_corpus(options.corpus, cache_dir=options.cache_dir),
        attacks=options.attacks,
        relearn=options.relearn,
        compute_dtype=dtype,
        device=device,
        cache_dir=options.cache_dir,
    )
    results = _results(result, options.command_line, device, dtype_name(dtype))
    if options.out is not None:
        try:
            atomic_write_text(options.out, to_json(results))
        except OSError as error:
            raise ArtifactError(
                f"{options.out} could not be written: {error.strerror or error}. Choose another "
                "--out."
            ) from error
        note(f"wrote {options.out}")
    if options.json:
        out(output.to_json(asdict(result)))
    else:
        out("\n".join(summary_lines(results)).strip("\n"))
    return EXIT_DONE if result.verdict.startswith("private") else EXIT_NO


def _results(result: AuditResult, command: Sequence[str], device: str, dtype: str) -> Results:
    facts = hardware.cpu_facts()
    why = "an audit alone was asked for"
    return Results(
        provenance=collect_provenance(
            command=command,
            cpu_model=facts.model,
            cpu_cores=facts.logical_cores,
            device_name=hardware.device_name(device),
            compute_dtype=dtype,
        ),
        audits=(result,),
        reasons=dict.fromkeys(("exp1_kill_switch", "exp2_null_test"), why),
    )
