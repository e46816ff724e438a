"""The results file: a typed, versioned record of what was measured.

It knows fields, units and JSON, not how anything was measured or judged. What was not measured is
null, and the section's `reasons` says why, under the field's name: `write_results` refuses a null
without a reason, as it refuses NaN and infinity. Secrets have no field here; records appear by id
and by a hash under a salt that stays with their owner.

Units: `ppl` is exp of the mean loss in nats per token; losses are mean nats per secret token;
`low95` and `high95` are the limits of two-sided 95 % intervals.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from libortho.audit_results import AuditResult
from libortho.errors import ArtifactError
from libortho.files import atomic_write_text
from libortho.provenance import Provenance
from libortho.typed_json import FieldError, check_json_values, from_json
from libortho.verdict import VerdictName

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RecordOutcome:
    """One planted record: what became of it, without what it says."""

    id: str  # escaped, see records.safe_id
    salted_hash: str  # HMAC-SHA256, 16 hex digits; the salt is not published
    family: str
    extracted_alpha1: bool
    extracted_alpha0: bool


@dataclass(frozen=True, kw_only=True)
class FamilyHits:
    """Extraction counts of one family of planted records."""

    n_planted: int
    hits_alpha1: int
    hits_alpha0: int


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """One logged step of tuning the private stream."""

    step: int  # optimiser steps done
    secret_loss: float  # nats per secret token
    replay_kl: float  # nats per token of public text
    seconds: float  # since tuning began


@dataclass(frozen=True, kw_only=True)
class KillSwitchResult:
    """Experiment 1: extraction with the private stream on (alpha = 1) and off (alpha = 0)."""

    # What ran
    model: str  # registry name, hub id or folder name
    method: str  # separation method, such as "ortho"
    quantization: bool  # whether the base is on an integer lattice
    quantization_bits: int  # bits of that lattice; 16 = none
    seed: int
    config: dict[str, Any]  # separation and tuning settings
    base_fingerprint: str  # SHA-256 of base and residual, hex
    fingerprint_equal: bool  # the same before tuning, after it, and in the exported base
    alpha0_source: str  # such as "exported base, reloaded from disk"

    # What was planted
    n_planted: int
    n_twins: int
    records_source: str
    record_hashes: tuple[RecordOutcome, ...]
    per_family: dict[str, FamilyHits]

    # Extraction: shares of records, 0 to 1, with Clopper-Pearson limits
    hits_alpha1: int
    hits_alpha0: int
    extraction_rate_alpha1: float | None = None
    extraction_rate_alpha1_low95: float | None = None
    extraction_rate_alpha1_high95: float | None = None
    extraction_rate_alpha0: float | None = None
    extraction_rate_alpha0_low95: float | None = None
    extraction_rate_alpha0_high95: float | None = None
    extraction_rate_never_trained: float | None = None  # planted records, the original model
    extraction_rate_twins_alpha1: float | None = None  # twins, alpha = 1
    privacy_ratio: float | None = None  # rate(1) / rate(0), half a hit for none at alpha = 0
    privacy_ratio_lower95: float | None = None  # score interval; what the gate reads
    privacy_ratio_censored: bool | None = None  # whether half a hit stood in for none
    mcnemar_p: float | None = None  # exact, two-sided, alpha = 1 against 0 on the same records

    # Mean loss per secret token, nats
    loss_planted_alpha1: float | None = None
    loss_twins_alpha1: float | None = None
    loss_planted_alpha0: float | None = None
    loss_twins_alpha0: float | None = None
    loss_planted_never_trained: float | None = None
    loss_planted_never_trained_low95: float | None = None  # Student's t over records
    loss_planted_never_trained_high95: float | None = None
    loss_curve: tuple[LossPoint, ...] = ()

    # Judgement
    min_privacy_ratio: float  # the gate's limit on privacy_ratio_lower95
    verdict: VerdictName
    verdict_reason: str
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Perplexity of one arm of experiment 2 on the same windows as all others."""

    ppl: float | None = None
    ratio: float | None = None  # to the reference's ppl
    ratio_low95: float | None = None  # paired bootstrap over windows
    ratio_high95: float | None = None
    bits_per_linear_weight: float | None = None  # every stream counted
    precision: str  # of weights and computation, such as "INT4 g64, bfloat16 compute"
    note: str = ""
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


@dataclass(frozen=True, kw_only=True)
class NullTestResult:
    """Experiment 2: what separation and the private stream cost on public text."""

    model: str  # registry name, hub id or folder name
    quantization: bool  # whether the base is on an integer lattice
    quantization_bits: int  # bits of that lattice; 16 = none
    seed: int
    config: dict[str, Any]  # separation and tuning settings

    corpus: str  # name of the text that was measured on
    corpus_sha256: str  # of the test split
    calibration_corpus: str
    calibration_sha256: str
    windows: int
    window_tokens: int
    batch_size: int  # the one used; halved where memory ran out

    ppl_quantized: float | None = None  # alpha = 1, as deployed
    ppl_fp16: float | None = None  # the unquantised reference; its precision is in arms
    ppl_int4: float | None = None  # plain round to nearest, no residual, no private stream
    ppl_alpha0: float | None = None
    ppl_nf4: float | None = None  # bitsandbytes
    arms: dict[str, ArmResult]

    max_ppl_ratio: float  # the gate's limit on ppl_quantized / ppl_fp16
    verdict: VerdictName
    verdict_reason: str
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


@dataclass(frozen=True, kw_only=True)
class ThroughputResult:
    """One throughput case."""

    arm: str
    phase: Literal["prefill", "decode", "switch"]
    tokens_per_s: float | None = None  # null for "switch"
    median_s: float | None = None  # median time of one round
    peak_memory_mib: float | None = None  # allocator's peak on CUDA
    outcome: str  # "passed", or what went wrong
    conditions: dict[str, Any]  # device, dtype, batch, lengths, rounds
    reasons: dict[str, str] = field(default_factory=dict)  # field that is null -> why


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that one run measured."""

    schema_version: int = SCHEMA_VERSION
    provenance: Provenance
    exp1_kill_switch: KillSwitchResult | None = None
    exp2_null_test: NullTestResult | None = None
    audits: tuple[AuditResult, ...] = ()  # one for each method that was audited
    throughput: tuple[ThroughputResult, ...] = ()
    # Measurement that an interrupted run of the same job had made -> when, ISO 8601, UTC
    resumed: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # section that is null -> why


# ---------------------------------------------------------------- writing


def results_filename(now: datetime) -> str:
    """Name of the results file of a run that ended at `now`, in the time zone that `now` has."""
    return f"gtx4050_results_{now:%Y%m%d_%H%M%S}.json"


def write_results(results: Results, folder: str | Path, now: datetime | None = None) -> Path:
    """Write a results file, atomically and never over another; returns its path.

    The name is that of `results_filename`, with `_2`, `_3` ... where it is taken.

    Args:
        results: what to write.
        folder: created if it doesn't exist.
        now: time for the name; local time if None.

    Raises:
        ValueError: a value is not finite or no JSON, or null without a reason; names the field.
    """
    text = to_json(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(results_filename(now or datetime.now()))
    path, copy = folder / name, 1
    while True:
        try:
            path.touch(exist_ok=False)  # reserve the name against another process
            break
        except FileExistsError:
            copy += 1
            path = folder / f"{name.stem}_{copy}{name.suffix}"
    try:
        atomic_write_text(path, text)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def to_json(results: Results) -> str:
    """The results file's text.

    Raises:
        ValueError: as for `write_results`.
    """
    content = dataclasses.asdict(results)
    check_json_values(content)
    _check_reasons("", results)
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _check_reasons(where: str, value: Any) -> None:
    """Every field that is None, in a dataclass that has `reasons`, has one there."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_reasons(f"{where}[{key}]", item)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_reasons(f"{where}[{index}]", item)
    elif dataclasses.is_dataclass(value):
        reasons = getattr(value, "reasons", None)
        for part in dataclasses.fields(value):
            item = getattr(value, part.name)
            path = f"{where}.{part.name}" if where else part.name
            if item is None and reasons is not None and not reasons.get(part.name):
                raise ValueError(f"{path} is null, and nothing in reasons says why")
            _check_reasons(path, item)


# ---------------------------------------------------------------- reading


def read_results(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        ArtifactError: missing, not JSON, of another version, or with fields missing, unknown or
            of the wrong type.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise FieldError(
                f"its schema version is {version!r}, and this libortho reads {SCHEMA_VERSION}"
            )
        content.setdefault("resumed", {})  # there were files before there were runs that resume
        results: Results = from_json(Results, content)
    except OSError as error:
        problem = f"it can't be read ({error.strerror or type(error).__name__})"
    except FieldError as error:
        problem = str(error)
    except (ValueError, RecursionError) as error:
        problem = f"it is not valid JSON in UTF-8 ({error})"
    else:
        return results
    raise ArtifactError(
        f"{path} is no results file that can be used: {problem}. Run the suite again, or read the "
        "file with the libortho that wrote it."
    )


def _refuse_constant(name: str) -> float:
    raise FieldError(f"it contains {name}, which is not JSON")
