"""Figures of the READMEs' tables about a card, from `gpu_kernels.py`'s and `gpu_decode.py`'s files.

Knows the layout of the files, and formats figures; the words around them are `readme_texts`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Found = Mapping[str, Any]

FAMILIES = ("8B", "3B")
MODELS = {
    "ortho": ("ortho", ""),
    "ortho at 0": ("ortho", ", alpha 0"),
    "capped": ("ortho, INT8 head, capped", ""),
    "int4pack model": ("int4pack", ""),
    "gemlite": ("gemlite", ""),
    "nf4 captured": ("nf4", ""),
    "nf4 eager": ("nf4, eager", ""),
    "dense": ("dense", ""),
}
"""Rows of the table on decoding: the section of the file, and which of its figures."""


def kernel_facts(found: Found) -> dict[str, object]:
    """What the sentence above the kernels' table is filled with."""
    where = found["environment"]
    # A file of before the sections had their present names is read as well.
    checks = found["random cases"] if "random cases" in found else found["checks"]
    return {
        "card": where["card"],
        "torch": where["torch"],
        "triton": where["triton"],
        "date": where["date_utc"][:10],
        "bandwidth": f"{found['bandwidth']['copy_gb_per_s']:.0f}",
        "checked": checks["checked"],
        "missed": len(checks["failures"]),
    }


def kernel_rows(found: Found) -> list[list[str]]:
    """Layer, base in µs, its share of copy bandwidth, streams to base, and the peers in µs.

    Streams to base twice: of launches one after the other, and of ones that overlap.
    """
    rows = []
    for family in (*FAMILIES, "fused"):
        for name, case in found.get(f"{family}, 1 token", {}).items():
            if "us" not in case:
                continue  # no candidate could be timed
            share = case.get("base_share_of_copy", case.get("base_share_of_copy_bandwidth"))
            peers = (_figure(case["peers"][f"{peer}_us"], ".1f") for peer in ("int4pack", "dense"))
            ratios = (f"{case[f'ratio_{n}']:.2f} ×" for n in ("streams_to_base", "overlapped"))
            layer = name if family == "fused" else f"{family} {name}"
            rows.append([layer, f"{case['us']['base']:.1f}", f"{share:.0%}", *ratios, *peers])
    return rows


def decode_facts(found: Found) -> dict[str, object]:
    """What the sentence above the table on decoding is filled with."""
    where, conditions = found["environment"], found["conditions"]
    switches = [
        found[f"{family} switching"]["switch_ms"]
        for family in FAMILIES
        if "switch_ms" in found.get(f"{family} switching", {})
    ]
    return {
        "card": where["card"],
        "torch": where["torch"],
        "date": where["date_utc"][:10],
        "bandwidth": f"{found['bandwidth']['copy_gb_per_s']:.0f}",
        "dtype": conditions["dtype"],
        "context": conditions["context_tokens"],
        "switch": _figure(max(switches, default=None), ".2f"),
    }


def decode_rows(found: Found, names: Mapping[str, str]) -> list[list[str]]:
    """Model, tokens/s and range, share of copy bandwidth, ms to the first token, MiB, projection.

    names: what the rows of `MODELS` are called; rows that were not measured are left out
    """
    return list(_decode_rows(found, names))


def _decode_rows(found: Found, names: Mapping[str, str]) -> Iterator[list[str]]:
    for family in FAMILIES:
        for row, (section, suffix) in MODELS.items():
            case = found.get(f"{family} {section}", {})
            if case.get(f"tokens_per_s{suffix}") is None:
                if "OutOfMemory" in case.get("failed", ""):
                    yield [f"{family} {names[row]}", names["ran out of memory"], *"––––"]
                continue

            def of(key: str, form: str, case: Found = case, suffix: str = suffix) -> str:
                return _figure(case.get(f"{key}{suffix}"), form)

            yield [
                f"{family} {names[row]}",
                f"{of('tokens_per_s', '.0f')} {_range(case[f'token_ms_spread{suffix}'])}",
                of("share_of_copy", ".0%"),
                _figure(_times(case.get(f"first_token_s{suffix}"), 1e3), ".0f"),
                _figure(case.get("reserved_mib"), ".0f"),
                of("projected_tokens_per_s_at_192_gb_per_s", ".1f"),
            ]


def _range(token_ms: list[float]) -> str:
    """The slowest and the fastest of the timings, tokens/s."""
    fastest, slowest = token_ms
    return f"[{1e3 / slowest:.0f}, {1e3 / fastest:.0f}]"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
