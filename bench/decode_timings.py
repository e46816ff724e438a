"""How fast a model decodes by `generate`, what a step reads, and whether alpha is followed.

Each section fills a dictionary of its own and adds lines to the table. Times are medians, in
seconds of the host's clock around work that the device has finished.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.decode_models import bytes_per_token, random_model, why_not
from bench.gpu_run import Run
from libortho.decoding import accelerate_decoding
from libortho.switch import set_alpha

GB = 1e9
MIB = 1 << 20
GIB = 1 << 30
PROJECTED_GB_PER_S = 192.0
"""Bandwidth of an RTX 4050 laptop's memory."""
SWITCH_AT = 8
"""Decoded tokens after which alpha is switched."""
AWAY = -1000.0
"""An alpha at which random weights' logits resemble those at 1 no more."""


@dataclass(frozen=True)
class Conditions:
    """What all models are timed under: `context` is the mean over the decoded tokens."""

    device: torch.device
    dtype: torch.dtype
    context: int
    new: int
    repeats: int

    @property
    def prompt(self) -> int:
        return self.context - self.new // 2

    def described(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": 1,
            "context_tokens": self.context,
            "prompt_tokens": self.prompt,
            "new_tokens": self.new,
            "repeats": self.repeats,
        }


def decode(
    conditions: Conditions,
    geometry: str,
    run: Run,
    found: dict[str, Any],
    *,
    kind: str,
    captured: bool = True,
    head_bits: int = 16,
    cap: float | None = None,
) -> None:
    """Prefill, time to first token and tokens a second of one kind of model."""
    found.update(kind=kind, geometry=geometry, head_bits=head_bits, cap_gib=cap, captured=captured)
    reason = why_not(kind, head_bits)
    if reason is not None:
        found.update(tokens_per_s=None, reason=reason)
        return
    with capped(conditions.device, cap), torch.no_grad():
        began = time.perf_counter()
        model = random_model(
            geometry, kind, dtype=conditions.dtype, device=conditions.device, head_bits=head_bits
        )
        found["made_s"] = time.perf_counter() - began
        found["weights_mib"] = allocated_mib(conditions.device)
        if captured:
            longest = conditions.prompt + conditions.new + 1
            accelerate_decoding(model, max_cache_len=longest, fuse=cap is None)
        ids = prompt_of(conditions, model)
        began = time.perf_counter()
        generated(model, ids, conditions.new)
        found["first_generate_s"] = time.perf_counter() - began
        found["prefill_s"] = median_s(
            conditions, lambda: model(ids, use_cache=False, logits_to_keep=1)
        )
        timings = [("", 1.0), (", alpha 0", 0.0)] if kind == "ortho" else [("", None)]
        for suffix, alpha in timings:
            if alpha is not None:
                set_alpha(model, alpha)
            read = bytes_per_token(model, conditions.context, private=alpha != 0.0)
            found |= {
                f"{key}{suffix}": value for key, value in rates(run, conditions, model, ids, read)
            }
        found["reserved_mib"] = reserved_mib(conditions.device)
    share = found["share_of_copy"]
    run.lines.append(
        f"{geometry} {kind}{'' if captured else ', eager'}, head {head_bits}: "
        f"{found['tokens_per_s']:.1f} tokens/s"
        + (f", {share:.0%} of copy" if share else "")
        + (f", alpha 0 {found['tokens_per_s, alpha 0']:.1f}" if kind == "ortho" else "")
        + f"; first token {1e3 * found['first_token_s']:.1f} ms, prefill "
        f"{1e3 * found['prefill_s']:.1f} ms, first generate {found['first_generate_s']:.1f} s, "
        f"reserved {found['reserved_mib']} MiB"
    )


def rates(
    run: Run, conditions: Conditions, model: Any, ids: Tensor, read: int
) -> Iterator[tuple[str, Any]]:
    """Names and values: what one decoded token takes, and what that is of the card's bandwidth."""
    first, whole = [], []
    for _ in range(conditions.repeats):
        first.append(seconds(conditions, lambda: generated(model, ids, 1)))
        whole.append(seconds(conditions, lambda: generated(model, ids, 1 + conditions.new)))
    each = [(b - a) / conditions.new for a, b in zip(first, whole, strict=True)]
    token = statistics.median(each)
    bandwidth = run.found.get("bandwidth", {}).get("copy_gb_per_s")
    yield "first_token_s", statistics.median(first)
    yield "token_ms", 1e3 * token
    yield "token_ms_spread", [1e3 * min(each), 1e3 * max(each)]
    yield "tokens_per_s", 1 / token
    yield "bytes_per_token", read
    yield "gb_per_s", read / token / GB
    yield "share_of_copy", read / token / GB / bandwidth if bandwidth else None
    # At the same share of the bandwidth: not measured on such a card.
    projected = PROJECTED_GB_PER_S / bandwidth / token if bandwidth else None
    yield "projected_tokens_per_s_at_192_gb_per_s", projected


def switching(conditions: Conditions, geometry: str, run: Run, found: dict[str, Any]) -> None:
    """alpha set in the middle of `generate` on captured steps, beside plain forwards."""
    device = conditions.device
    with torch.no_grad():
        model = random_model(geometry, "ortho", dtype=conditions.dtype, device=device)
        ids = prompt_of(conditions, model)[:, :64]
        plain = {alpha: switched(model, ids, alpha) for alpha in (1.0, 0.0, AWAY)}
        accelerate_decoding(model)
        captured = {alpha: switched(model, ids, alpha) for alpha in (1.0, 0.0, AWAY)}
        again = switched(model, ids, 1.0)
        took = []
        for alpha in (0.0, 1.0) * 10:
            took.append(seconds(conditions, lambda a=alpha: set_alpha(model, a)))
    unswitched, changes = captured[1.0], {}
    for alpha in (0.0, AWAY):
        tokens, logits = captured[alpha]
        # The step after the switch is the first whose logits can differ.
        at = SWITCH_AT
        assert torch.equal(tokens[:at], unswitched[0][:at])
        changes[f"alpha {alpha:g}"] = {
            "tokens_before_are_the_same": True,
            "next_logits_change": distance(logits[at], unswitched[1][at]),
            "next_token_changes": bool(tokens[at] != unswitched[0][at]),
            "logits_before_beside_plain": distance(logits[at - 1], plain[alpha][1][at - 1]),
            "next_logits_beside_plain": distance(logits[at], plain[alpha][1][at])
            if torch.equal(tokens[:at], plain[alpha][0][:at])
            else None,
        }
    found |= {
        "changes": changes,
        "switched_back_is_the_same": bool(torch.equal(again[0], unswitched[0])),
        "switch_ms": 1e3 * statistics.median(took),
        "plain_tokens_are_the_same": {
            f"alpha {alpha:g}": int((plain[alpha][0] == captured[alpha][0]).sum())
            for alpha in plain
        },
        "tokens": len(again[0]),
    }
    run.lines.append(
        f"{geometry} switching: {found['switch_ms']:.3f} ms; "
        + "; ".join(
            f"{name}: next logits change by {c['next_logits_change']:.2f}, next token "
            f"{'changes' if c['next_token_changes'] else 'stays'}"
            for name, c in changes.items()
        )
    )


def switched(model: Any, ids: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Tokens `[new]` and logits `[new, vocabulary]`, alpha being set once SWITCH_AT are there."""
    set_alpha(model, 1.0)
    begins = ids.shape[1]

    def switch(seen: Tensor, scores: Tensor) -> Tensor:
        if seen.shape[1] == begins + SWITCH_AT - 1:  # the next forward is the one that follows
            set_alpha(model, alpha)
        return scores

    out = generated(
        model,
        ids,
        2 * SWITCH_AT,
        logits_processor=[switch],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, begins:], torch.cat(out.logits).float()


def transformers_compile(
    conditions: Conditions, geometry: str, run: Run, found: dict[str, Any]
) -> None:
    """The same model by transformers' own static cache and torch.compile, nothing of ours added."""
    with torch.no_grad():
        model = random_model(geometry, "ortho", dtype=conditions.dtype, device=conditions.device)
        ids = prompt_of(conditions, model)
        began = time.perf_counter()
        for _ in range(2):
            generated(model, ids, conditions.new + 1, cache_implementation="static")
        found["first_two_generates_s"] = time.perf_counter() - began
        options = {"cache_implementation": "static"}
        whole = seconds(conditions, lambda: generated(model, ids, 1 + conditions.new, **options))
        first = seconds(conditions, lambda: generated(model, ids, 1, **options))
        found["tokens_per_s"] = conditions.new / (whole - first)
    run.lines.append(
        f"{geometry} ortho by transformers' compile: {found['tokens_per_s']:.1f} tokens/s after "
        f"{found['first_two_generates_s']:.1f} s"
    )


# --- helpers ------------------------------------------------------------------------------------


def generated(model: Any, ids: Tensor, new: int, **options: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        **options,
    )


def prompt_of(conditions: Conditions, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, conditions.prompt)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    return ids.to(conditions.device)


def seconds(conditions: Conditions, call: Callable[[], Any]) -> float:
    """Of a call, until the device has finished it."""
    wait = torch.cuda.synchronize if conditions.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def median_s(conditions: Conditions, call: Callable[[], Any]) -> float:
    call()
    return statistics.median(seconds(conditions, call) for _ in range(conditions.repeats))


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


@contextmanager
def capped(device: torch.device, gib: float | None) -> Iterator[None]:
    """Let PyTorch reserve no more than `gib`; what it had cached before is given back."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if gib is None else gib * GIB / total
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def allocated_mib(device: torch.device) -> float | None:
    return None if device.type != "cuda" else torch.cuda.memory_allocated(device) / MIB


def reserved_mib(device: torch.device) -> float | None:
    return None if device.type != "cuda" else torch.cuda.max_memory_reserved(device) / MIB
