"""`plan`: what a model takes of a card, part by part, before anything is loaded.

Arithmetic only: nothing is measured, fetched or loaded.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from libortho.budget import PRECISION_OF_BITS, decode_bytes_per_token, run_budget
from libortho.checkpoint import read_config
from libortho.config import NO_LATTICE
from libortho.errors import ConfigError, ModelLoadError
from libortho.profiles import fits, get_profile, usable_on_card
from libortho.registry import REGISTRY, ModelEntry, entry_from_config

from .commands import (
    EXIT_DONE,
    EXIT_NO,
    Commands,
    add_command,
    add_json,
    positive_float,
    positive_int,
)
from .output import columns, out, to_json

_PROFILE = get_profile("gtx4050")
_PARTS = {
    "weights_mib": "linear layers and norms",
    "embedding_mib": "embedding and head",
    "streams_mib": "residual and private stream",
    "kv_cache_mib": "KV cache",
    "workspace_mib": "workspace, at most",
    "overhead_mib": "cuBLAS and allocator",
    "total_mib": "in all",
}
_RECIPE = {
    "head_bits": "bits of embedding and head",
    "group_size": "group size",
    "residual_density": "residual",
    "private_density": "private stream",
}


def add_commands(commands: Commands) -> None:
    """Add `plan`."""
    parser = add_command(
        commands,
        "plan",
        _plan,
        "add up what a separated model takes of a card, and whether it fits",
        examples=(
            "plan llama-3.2-3b --vram 6",
            "plan llama-3-8b --vram 8 --bits 4 --context 2048",
            "plan ./my-llama --json",
        ),
        more="Arithmetic from the model's geometry; nothing is fetched or loaded. Where a model "
        "doesn't fit with the defaults, embedding and head go to 8 bits, then groups get larger "
        "and the private stream smaller; the table says what is planned.",
        exit_codes="0 it fits (at one of the bits shown); 1 it doesn't",
    )
    parser.add_argument("model", help="registry name, folder with a config.json, or cached hub id")
    parser.add_argument(
        "--vram",
        type=positive_float,
        default=_PROFILE.vram_gib_total,
        metavar="GIB",
        help="the card's memory in GiB (default: %(default)g)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=sorted(PRECISION_OF_BITS),
        help="bits of the lattice, 16 for none (default: all three)",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(8, NO_LATTICE),
        help="bits of embedding and output head (default: 16, or 8 where only that fits)",
    )
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=_PROFILE.batch_size,
        metavar="N",
        help="sequences that run at once (default: %(default)d)",
    )
    parser.add_argument(
        "--context",
        type=positive_int,
        default=_PROFILE.sequence_length,
        metavar="TOKENS",
        help="tokens of a sequence (default: %(default)d)",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive_float,
        default=_PROFILE.bandwidth_gb_per_s,
        metavar="GB/S",
        help="the card's memory bandwidth, for the ceiling of decoding (default: %(default)g, an "
        "RTX 4050 laptop's)",
    )
    add_json(parser)


def _plan(options: argparse.Namespace) -> int:
    entry = entry_of(options.model)
    if options.context > entry.max_position:
        raise ConfigError(
            f"{entry.name} has {entry.max_position:,} positions; found --context "
            f"{options.context:,}. Choose fewer."
        )
    bits = sorted(PRECISION_OF_BITS) if options.bits is None else [options.bits]
    facts = {
        "model": entry.name,
        "parameters": entry.parameters,
        "context_tokens": options.context,
        "batch_size": options.batch,
        "card_mib": round(options.vram * 1024),
        "usable_mib": round(usable_on_card(options.vram) * 1024),
        "bandwidth_gb_per_s": options.bandwidth,
        "plans": [_facts(entry, b, options) for b in bits],
    }
    out(to_json(facts) if options.json else _render(facts))
    return EXIT_DONE if any(plan["fits"] for plan in facts["plans"]) else EXIT_NO


def entry_of(model: str) -> ModelEntry:
    """A model's geometry by registry name, folder, or the hub's cache; `ModelLoadError` if none."""
    if model in REGISTRY:
        return REGISTRY[model]
    folder = Path(model).expanduser()
    if folder.is_dir():
        entry = entry_from_config(folder.resolve().name, read_config(folder))
    else:
        entry = entry_from_config(model, read_config(_cached(model)))
    if entry is None:
        raise ModelLoadError(
            f"{model} has a config.json without the sizes of a Llama-like model (hidden_size, "
            "num_attention_heads, intermediate_size and so on), so nothing can be added up."
        )
    return entry


def _cached(hub_id: str) -> Path:
    try:
        found = huggingface_hub.try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ModelLoadError(
            f"The geometry of {hub_id!r} is not known: it is no registry name "
            f"({', '.join(REGISTRY)}), no folder, and no hub model whose config.json is cached. "
            "Fetch that one file with `hf download OWNER/MODEL config.json`, or give a folder."
        )
    return Path(found).parent


def _facts(entry: ModelEntry, bits: int, options: argparse.Namespace) -> dict[str, Any]:
    fit = fits(
        entry,
        usable_on_card(options.vram),
        bits,
        options.context,
        batch_size=options.batch,
        head_bits=options.head_bits,
    )
    budget = run_budget(entry, fit.recipe, options.context, options.batch)
    ceiling = options.bandwidth * 1e9 / decode_bytes_per_token(entry, budget)
    return {
        "bits": bits,
        "recipe": asdict(fit.recipe),
        "parts_mib": budget.parts(),
        "fits": fit.ok,
        "reason": fit.reason,
        "decode_ceiling_tokens_per_s": ceiling,
    }


def _render(facts: dict[str, Any]) -> str:
    plans = facts["plans"]
    rows = [["MiB", *(f"{plan['bits']} bits" for plan in plans)]]
    rows += [
        [words, *(f"{plan['parts_mib'][part]:,.0f}" for plan in plans)]
        for part, words in _PARTS.items()
    ]
    for field, words in _RECIPE.items():
        rows.append([words, *(_figure(field, plan["recipe"]) for plan in plans)])
    rows.append(["fits", *("yes" if plan["fits"] else "no" for plan in plans)])
    ceilings = (f"{plan['decode_ceiling_tokens_per_s']:,.0f}" for plan in plans)
    rows.append(["decode ceiling, tokens/s", *ceilings])
    lines = [
        f"{facts['model']}, {facts['parameters']:,} parameters, {facts['batch_size']} sequence"
        f"{'s' if facts['batch_size'] > 1 else ''} of {facts['context_tokens']:,} tokens",
        f"{facts['card_mib']:,} MiB of memory, of which {facts['usable_mib']:,} can be used",
        "",
        *columns(rows),
        "",
        f"The ceiling is arithmetic: {facts['bandwidth_gb_per_s']:g} GB/s over the bytes read per "
        "token.",
    ]
    lines += [f"{plan['reason']}" for plan in plans]
    return "\n".join(lines)


def _figure(field: str, recipe: dict[str, Any]) -> str:
    if field == "group_size" and recipe["bits"] == NO_LATTICE:
        return "none"
    value = recipe[field]
    return f"{value:.1%}" if isinstance(value, float) else str(value)
