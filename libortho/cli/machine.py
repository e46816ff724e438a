"""`check-gpu`: what this machine has, and which models fit in it.

Knows how to lay facts out as text or JSON. Finds nothing out by itself.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from libortho import hardware, profiles
from libortho.budget import PRECISION_OF_BITS
from libortho.precision import dtype_name
from libortho.registry import REGISTRY

from .commands import EXIT_DONE, Commands, add_command, add_json
from .output import columns, out, to_json


def add_commands(commands: Commands) -> None:
    """Add `check-gpu`."""
    parser = add_command(
        commands,
        "check-gpu",
        _check_gpu,
        "show cards, CPU and memory, and which models fit at which bits",
        examples=("check-gpu", "check-gpu --json"),
    )
    add_json(parser)


def _check_gpu(options: argparse.Namespace) -> int:
    facts = gather_facts()
    out(to_json(facts) if options.json else render(facts))
    return EXIT_DONE


def gather_facts() -> dict[str, Any]:
    """Everything that check-gpu shows, as plain values that JSON holds."""
    cards = hardware.cards()
    reason = hardware.why_no_gpu()
    cpu = hardware.cpu_facts()
    device = "cpu" if reason else "cuda"
    dtype, why_dtype = hardware.default_compute_dtype(device)
    card = next((c for c in cards if c.total_mib is not None), None)
    if card is not None and card.total_mib is not None:
        basis = f"card {card.index}, {card.name}"
        usable = profiles.usable_on_card(card.total_mib / 1024)
    else:
        profile = profiles.get_profile("gtx4050")
        basis = f"no card's memory is known, so that of the profile {profile.name}"
        usable = profile.vram_gib_usable
    # A card takes 16-bit weights; a CPU without native bfloat16 computes in float32.
    bytes_per_parameter = 2 if device == "cuda" else dtype.itemsize
    return {
        "cards": [asdict(card) for card in cards],
        "why_no_gpu": reason,
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "gpu_usable": reason is None,
        },
        "cpu": asdict(cpu),
        "compute_dtype": {"device": device, "dtype": dtype_name(dtype), "reason": why_dtype},
        "card_memory": {"basis": basis, "usable_mib": round(usable * 1024)},
        "models": [
            _model_facts(name, usable, cpu.available_gib, bytes_per_parameter) for name in REGISTRY
        ],
    }


def _model_facts(
    name: str, usable: float, host_gib: float, bytes_per_parameter: int
) -> dict[str, Any]:
    entry = REGISTRY[name]
    host = profiles.host_fit(entry, host_gib, bytes_per_parameter)
    fits = {bits: profiles.fits(entry, usable, bits) for bits in PRECISION_OF_BITS}
    return {
        "name": name,
        "parameters": entry.parameters,
        "card": {
            str(bits): {"fits": fit.ok, "needed_mib": round(fit.needed_mib), "reason": fit.reason}
            for bits, fit in fits.items()
        },
        "host": {"fits": host.ok, "needed_mib": round(host.needed_mib), "reason": host.reason},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as plain text: sections of aligned columns."""
    cpu, build, compute = facts["cpu"], facts["torch"], facts["compute_dtype"]
    lines = ["Cards"]
    if facts["cards"]:
        head = ["#", "name", "capability", "MiB", "free", "tensor cores", "GB/s", "driver"]
        lines += columns([head] + [_card_row(card) for card in facts["cards"]])
    else:
        lines.append("  none")
    if facts["why_no_gpu"]:
        lines.append(f"  torch can't use a GPU: {facts['why_no_gpu']}")
    cuda = f"CUDA {build['cuda']}" if build["cuda"] else "without CUDA"
    bf16 = "native" if cpu["bf16"] else "not native"
    lines += ["", "Software and CPU"]
    lines += columns(
        [
            ["torch", f"{build['version']}, {cuda}"],
            ["CPU", cpu["model"]],
            ["cores", f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical"],
            ["memory", f"{cpu['total_gib']:.1f} GiB, {cpu['available_gib']:.1f} GiB available"],
            ["bfloat16", f"{bf16}; AVX-512: {'yes' if cpu['avx512'] else 'no'}"],
            ["computes in", f"{compute['dtype']} on {compute['device']} ({compute['reason']})"],
        ]
    )
    memory = facts["card_memory"]
    lines += [
        "",
        "Models: MiB needed, separated and tuned, batch 1, 512 tokens",
        f"  card: {memory['usable_mib']:,} MiB usable ({memory['basis']})",
        f"  host: {cpu['available_gib'] * 1024:,.0f} MiB available, for the unquantised checkpoint",
    ]
    head = ["model", "parameters", *(f"card, {bits} bits" for bits in PRECISION_OF_BITS), "host"]
    lines += columns([head] + [_model_row(model) for model in facts["models"]])
    return "\n".join(lines)


def _card_row(card: dict[str, Any]) -> list[str]:
    capability = card["compute_capability"]
    bandwidth = card["memory_bandwidth_gb_per_s"]
    return [
        str(card["index"]),
        card["name"],
        "unknown" if capability is None else ".".join(map(str, capability)),
        *("unknown" if card[k] is None else f"{card[k]:,}" for k in ("total_mib", "free_mib")),
        card["tensor_cores"],
        "unknown" if bandwidth is None else f"{bandwidth:,.0f}",
        card["driver"] or "unknown",
    ]


def _model_row(model: dict[str, Any]) -> list[str]:
    cells = [*model["card"].values(), model["host"]]
    return [
        model["name"],
        f"{model['parameters']:,}",
        *(f"{cell['needed_mib']:,} {'fits' if cell['fits'] else 'no'}" for cell in cells),
    ]
