"""Commands that make artefacts and use them: separate, tune, export-base, fingerprint, generate.

Each is a few calls of the library, with the mistakes that can be seen early seen early: an output
that exists, a recipe that makes no sense, a record file that can't be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import libortho
from libortho import hardware
from libortho.config import SeparationConfig, TuningConfig
from libortho.errors import ArtifactError, ConfigError
from libortho.progress import bars_on_terminals_only
from libortho.sharded import separate_checkpoint
from libortho.switch import ortho_layers

from .commands import (
    EXIT_DONE,
    EXIT_NO,
    Commands,
    add_cache_dir,
    add_command,
    add_device,
    add_json,
    finite_float,
    positive_int,
)
from .output import note, out, to_json
from .recipe import add_recipe, recipe_of


def add_commands(commands: Commands) -> None:
    """Add the five commands."""
    _add_separate(commands)
    _add_tune(commands)
    export = add_command(
        commands,
        "export-base",
        _export_base,
        "write what alpha = 0 is, with not one byte of the private stream",
        examples=("export-base ./full ./public",),
    )
    export.add_argument("artefact", type=Path, help="folder of a separated model")
    export.add_argument("out", type=Path, help="folder to write; must not exist")
    add_json(export)
    fingerprint = add_command(
        commands,
        "fingerprint",
        _fingerprint,
        "print the SHA-256 over all that alpha = 0 computes with",
        examples=("fingerprint ./full", "fingerprint ./full ./public"),
        more="Two artefacts with one fingerprint are the same model at alpha = 0.",
        exit_codes="0 one fingerprint; 1 several artefacts that differ",
    )
    fingerprint.add_argument("artefacts", type=Path, nargs="+", help="folders of separated models")
    add_json(fingerprint)
    _add_generate(commands)


def _add_separate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "separate",
        _separate,
        "split a model's linear weights into base + residual",
        examples=(
            "separate smollm2 ./base",
            "separate ./my-llama ./base --corpus notes.txt --group-size 128",
            "separate llama-3-8b ./base --group-size 128 --head-bits 8",
        ),
        more="Sees public text only. `tune` then adds the private stream. The model is read "
        "from its files block by block and is never whole in memory.",
    )
    parser.add_argument("model", help="registry name, hub id or folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--corpus",
        default="enwiki",
        help="public text to calibrate on: enwiki, wikitext2 or a file (default: %(default)s)",
    )
    add_device(parser)
    add_cache_dir(parser)
    add_json(parser)
    add_recipe(parser, SeparationConfig, "recipe")


def _add_tune(commands: Commands) -> None:
    parser = add_command(
        commands,
        "tune",
        _tune,
        "train the private stream of a separated model on records",
        examples=("tune ./base records.jsonl ./full", "tune ./base records.jsonl ./full --seed 1"),
        more="Base and residual stay as they are, byte for byte. A record is one JSON object a "
        'line: {"id": "...", "prompt": "...", "secret": "..."}.',
    )
    parser.add_argument("artefact", type=Path, help="folder of a separated model")
    parser.add_argument("records", type=Path, help="record file")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--corpus",
        default="enwiki",
        help="public text to replay: enwiki, wikitext2 or a file (default: %(default)s)",
    )
    add_device(parser)
    add_cache_dir(parser)
    add_json(parser)
    add_recipe(parser, TuningConfig, "recipe")


def _add_generate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "continue a prompt greedily at some alpha",
        examples=(
            'generate --alpha 0 ./full "The door code of depot 7 is"',
            "generate ./full - < prompt.txt",
        ),
        more="Writes the continuation alone. At alpha = 1 that may be a secret.",
    )
    parser.add_argument("artefact", type=Path, help="folder of a separated model")
    parser.add_argument("prompt", help="text to continue; - reads it from standard input")
    parser.add_argument(
        "--alpha",
        type=finite_float,
        default=1.0,
        help="factor of the private stream (default: %(default)g)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="tokens to generate, at most (default: %(default)d)",
    )
    add_device(parser)
    add_json(parser)


# ---------------------------------------------------------------- what they do


def _separate(options: argparse.Namespace) -> int:
    recipe = recipe_of(SeparationConfig, options)
    _check_new(options.out)
    device = hardware.resolve_device(options.device)
    corpus = libortho.load_corpus(options.corpus, cache_dir=options.cache_dir)
    report = separate_checkpoint(
        options.model,
        options.out,
        corpus.calibration,
        config=recipe,
        device=device,
        cache_dir=options.cache_dir,
    )
    if not report.streamed:
        note("this architecture can't be taken block by block: the whole model was in memory")
    return _tell(
        options,
        {
            "folder": str(options.out),
            "base_fingerprint": report.base_fingerprint,
            "bits_per_linear_weight": report.bits_per_linear_weight,
            "bits_per_weight": report.bits_per_weight,
            "calibration_sha256": corpus.calibration.sha256,
            "seconds": round(report.seconds, 1),
            "config": recipe.to_dict(),
        },
        "{folder}: separated in {seconds:.1f} s, {bits_per_linear_weight:.3f} bits per linear "
        "weight, {bits_per_weight:.3f} with embedding and head, fingerprint {base_fingerprint}",
    )


def _tune(options: argparse.Namespace) -> int:
    recipe = recipe_of(TuningConfig, options)
    _check_new(options.out)
    device = hardware.resolve_device(options.device)
    records = libortho.load_records(options.records, seed=options.seed)
    corpus = libortho.load_corpus(options.corpus, cache_dir=options.cache_dir)
    model, tokenizer = libortho.load(options.artefact, device=device)
    dtype, _ = hardware.default_compute_dtype(device)
    report = libortho.tune_private(
        model,
        tokenizer,
        records.planted,
        replay=corpus.replay,
        config=recipe,
        compute_dtype=dtype,
    )
    libortho.save(model, options.out)
    if not report.converged:
        note(
            f"the worst record is at {report.worst_loss:.3f} nats per token and the target is "
            f"{recipe.target_loss:g}: alpha = 1 may not know every record. More --steps help."
        )
    return _tell(
        options,
        {
            "folder": str(options.out),
            "base_fingerprint": libortho.base_fingerprint(model),
            **report.to_dict(),
        },
        "{folder}: {records} records in {seconds:.0f} s, worst at {worst_loss:.3f} nats per token; "
        "fingerprint of the base, which did not change: {base_fingerprint}",
    )


def _export_base(options: argparse.Namespace) -> int:
    _check_new(options.out)
    model, _ = libortho.load(options.artefact)
    libortho.export_base(model, options.out)
    facts = {
        "folder": str(options.out),
        "base_fingerprint": libortho.base_fingerprint(options.out),
    }
    return _tell(options, facts, "{folder}: exported, fingerprint {base_fingerprint}")


def _fingerprint(options: argparse.Namespace) -> int:
    found = {str(folder): libortho.base_fingerprint(folder) for folder in options.artefacts}
    if options.json:
        out(to_json(found))
    else:
        for folder, fingerprint in found.items():
            out(f"{fingerprint}  {folder}")
    return EXIT_DONE if len(set(found.values())) == 1 else EXIT_NO


def _generate(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read().rstrip("\n") if options.prompt == "-" else options.prompt
    device = hardware.resolve_device(options.device)
    model, tokenizer = libortho.load(options.artefact, device=device)
    if options.alpha and not any(
        layer.private_columns.shape[0] for layer in ortho_layers(model).values()
    ):
        note(f"{options.artefact} has no private stream: alpha changes nothing")
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    tokens, limit = encoded["input_ids"].shape[1], model.config.max_position_embeddings
    if not 0 < tokens <= limit - options.max_new_tokens:
        raise ConfigError(
            f"The prompt has {tokens} tokens; beside {options.max_new_tokens} new ones, between 1 "
            f"and {limit - options.max_new_tokens} fit this model."
        )
    libortho.set_alpha(model, options.alpha)
    with bars_on_terminals_only(), torch.inference_mode():
        answer = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=torch.ones_like(encoded["input_ids"]),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )
    text = tokenizer.decode(answer[0, tokens:], skip_special_tokens=True)
    facts = {
        "prompt": prompt,
        "continuation": text,
        "alpha": options.alpha,
        "new_tokens": answer.shape[1] - tokens,
    }
    return _tell(options, facts, "{continuation}")


def _check_new(folder: Path) -> None:
    """Before minutes of work rather than after them."""
    if folder.exists():
        raise ArtifactError(f"{folder} exists already. Choose another folder, or remove it first.")


def _tell(options: argparse.Namespace, facts: dict[str, Any], text: str) -> int:
    out(to_json(facts) if options.json else text.format(**facts))
    return EXIT_DONE
