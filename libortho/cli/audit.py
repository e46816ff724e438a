"""`audit`: what the off state of a saved artefact gives away of the records it was tuned on."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from libortho.audit_request import ENOUGH, AuditRequest
from libortho.errors import ArtifactError
from libortho.files import atomic_write_text
from libortho.results import to_json
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
    positive_float,
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
            "audit ./full --records records.jsonl --min-privacy-ratio 8",
        ),
        more="Beside it stand twins of the records and the public model, separated anew by the "
        "artefact's own recipe, which never saw them.",
        exit_codes="0 private, by construction or as far as tested; 1 it leaks, the evidence "
        "carries no verdict, or a limit that was given is not reached",
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
        "--require-verdict",
        choices=tuple(ENOUGH),
        default="tested",
        help="what is enough: private by construction, or also as far as tested (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--min-privacy-ratio",
        type=positive_float,
        metavar="RATIO",
        help="least lower 95 %% limit of the privacy ratio (default: none is asked for)",
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
    audited = AuditRequest(
        artefact=options.artefact,
        records=options.records,
        model=options.model,
        corpus=options.corpus,
        attacks=options.attacks,
        relearn=options.relearn,
        seed=options.seed,
        device=options.device,
        cache_dir=options.cache_dir,
    ).perform()
    results = audited.results(options.command_line)
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
        out(output.to_json(asdict(audited.result)))
    else:
        out("\n".join(summary_lines(results)).strip("\n"))
    problem = audited.shortfall(
        min_ratio=options.min_privacy_ratio, verdict=options.require_verdict
    )
    if problem:
        note(f"not shown to be private: {problem}")
    return EXIT_NO if problem else EXIT_DONE
