"""An audit as it is asked for, by names and paths, and what it must come to.

What the command `audit` and the pytest fixture `ortho_audit` share: neither knows more than where
the words came from. How an audit is made is `audit_artefact`'s business.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from . import hardware
from .audit import AuditVerdictName
from .audit_artefact import audit_artefact, check_enough
from .audit_results import AuditResult
from .contrast import ALL_FAMILIES
from .corpora import load_corpus
from .methods import check_tuned
from .models import resolve_model
from .precision import dtype_name
from .provenance import collect_provenance
from .records import RecordSet, load_records
from .results import Results
from .statistics import privacy_ratio
from .verdict import DEFAULT_MIN_PRIVACY_RATIO

Required = Literal["tested", "construction"]
ENOUGH: dict[Required, tuple[AuditVerdictName, ...]] = {
    "tested": ("private by construction", "private as far as tested"),
    "construction": ("private by construction",),
}
"""Verdicts that are good enough, by what is asked for."""


class NotShownPrivateError(AssertionError):
    """An audit did not come to what was asked of it: the artefact leaks, or it can't be told."""


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What is to be audited, and how.

    artefact: folder that `save` wrote after tuning, with the private stream
    records: what it was tuned on: a file, for which twins are generated if it has none, or a set
    model: the public model that it was made from, as `load_model` takes it
    corpus: the text that it was calibrated on, as `load_corpus` takes it
    attacks, relearn: as in `audit_artefact`
    seed: of generated twins and attacks
    device: `auto`, `cpu`, `cuda` or `cuda:N`
    cache_dir: where downloads and the control are kept; None is the default
    """

    artefact: Path
    records: Path | RecordSet
    model: str = "smollm2"
    corpus: str = "enwiki"
    attacks: bool = True
    relearn: bool = False
    seed: int = 0
    device: str = "auto"
    cache_dir: Path | None = None

    def perform(self) -> AuditedArtefact:
        """Make the audit; what is wrong with the user's own files is said before any download.

        Raises as `load_records`, `audit_artefact`, `resolve_model` and `load_corpus` do.
        """
        records = self.records
        if not isinstance(records, RecordSet):
            records = load_records(records, seed=self.seed)
        check_enough(records)
        check_tuned(self.artefact)
        device = hardware.resolve_device(self.device)
        dtype, _ = hardware.default_compute_dtype(device)
        result = audit_artefact(
            self.artefact,
            records,
            public_model=resolve_model(self.model, self.cache_dir),
            corpus=load_corpus(self.corpus, cache_dir=self.cache_dir),
            attacks=self.attacks,
            relearn=self.relearn,
            compute_dtype=dtype,
            device=device,
            cache_dir=self.cache_dir,
        )
        return AuditedArtefact(request=self, result=result, device=device)

    def command(self, *more: str) -> str:
        """The command line that makes this audit again, with `more` options of its own."""
        plain = AuditRequest(artefact=self.artefact, records=self.records)
        records = "FILE" if isinstance(self.records, RecordSet) else _shown(self.records)
        words = ["python", "-m", "libortho", "audit", _shown(self.artefact), "--records", records]
        for name in ("model", "corpus", "seed", "device", "cache_dir"):
            value = getattr(self, name)
            if value != getattr(plain, name):
                words += [f"--{name.replace('_', '-')}", _shown(value)]
        words += [] if self.attacks else ["--no-attacks"]
        words += ["--relearn"] if self.relearn else []
        return shlex.join([*words, *more])


@dataclass(frozen=True, kw_only=True)
class AuditedArtefact:
    """An audit that was made, and the limits that it is held to unless others are given.

    min_ratio: least lower limit of the privacy ratio's 95 % interval
    required: the verdict that is enough, a key of `ENOUGH`
    """

    request: AuditRequest
    result: AuditResult
    device: str
    min_ratio: float = DEFAULT_MIN_PRIVACY_RATIO
    required: Required = "tested"

    def assert_private(
        self, *, min_ratio: float | None = None, verdict: Required | None = None
    ) -> None:
        """Raise unless this artefact's alpha = 0 is private enough to be handed out.

        min_ratio: least lower limit of the 95 % interval of the privacy ratio; the audit's own
            limit if None
        verdict: "tested" takes private by construction and private as far as tested,
            "construction" only the first; the audit's own if None

        Raises:
            NotShownPrivateError: an `AssertionError` with value, interval, limit and the command
                that makes the audit again; for a leak and for evidence that carries no verdict.
            ValueError: a verdict that there isn't.
        """
        __tracebackhide__ = True
        limit = self.min_ratio if min_ratio is None else min_ratio
        required = verdict or self.required
        problem = self.shortfall(min_ratio=limit, verdict=required)
        if problem:
            again = self.request.command(
                "--min-privacy-ratio", f"{limit:g}", "--require-verdict", required
            )
            raise NotShownPrivateError(
                f"{self.request.artefact.name} is not shown to be private: {problem}. Audit it "
                f"again with: {again}"
            )

    def shortfall(self, *, min_ratio: float | None, verdict: Required) -> str:
        """In which ways this is not enough, or nothing; a ratio of None is not asked about."""
        if verdict not in ENOUGH:
            raise ValueError(f"verdict is one of {', '.join(ENOUGH)}; found {verdict!r}")
        result, problems = self.result, []
        if result.verdict not in ENOUGH[verdict]:
            problems.append(
                f"it is judged {result.verdict!r}, and {' or '.join(ENOUGH[verdict])} is asked "
                f"for: {result.verdict_reason}"
            )
        low, ratio = result.privacy_ratio_lower95, result.privacy_ratio
        if min_ratio is not None and (low is None or low < min_ratio):
            problems.append(
                f"its privacy ratio is {_number(ratio)}, 95 % interval {self._interval()}, and at "
                f"least {min_ratio:g} is asked for at the lower limit{self._at_best(min_ratio)}"
            )
        return "; and ".join(problems)

    def results(self, command: Sequence[str], *others: AuditedArtefact) -> Results:
        """A results record of this audit and others of the same run; `command` is what ran."""
        facts = hardware.cpu_facts()
        why = "an audit alone was asked for"
        return Results(
            provenance=collect_provenance(
                command=command,
                cpu_model=facts.model,
                cpu_cores=facts.logical_cores,
                device_name=hardware.device_name(self.device),
                compute_dtype=dtype_name(hardware.default_compute_dtype(self.device)[0]),
            ),
            audits=(self.result, *(other.result for other in others)),
            reasons=dict.fromkeys(("exp1_kill_switch", "exp2_null_test"), why),
        )

    def held_to(self, *, min_ratio: float, required: Required) -> AuditedArtefact:
        """The same audit with other limits."""
        return replace(self, min_ratio=min_ratio, required=required)

    def _interval(self) -> str:
        """The ratio's interval, its upper limit recomputed from the shares extracted."""
        n, hits = self.result.n_planted, dict[str, int]()
        for row in sorted(self.result.metrics, key=lambda row: row.family != ALL_FAMILIES):
            share = row.metrics["extraction, planted"].value
            if share is not None:
                hits.setdefault(row.state, round(n * share))
        if not {"on", "off"} <= hits.keys():
            return "not measured"
        upper = privacy_ratio(hits["on"], n, hits["off"], n).upper
        shown = "unbounded" if math.isinf(upper) else f"{upper:.1f}"
        return f"[{_number(self.result.privacy_ratio_lower95)}, {shown}]"

    def _at_best(self, min_ratio: float) -> str:
        """That no model could pass with so few records, if that is so."""
        n = self.result.n_planted
        best = privacy_ratio(n, n, 0, n).lower
        if best >= min_ratio:
            return ""
        return f" ({n} planted records can prove {best:.1f} at best: give more)"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _shown(value: object) -> str:
    """A value as one would type it here: a path below this folder without what is above."""
    here = Path.cwd()
    return (
        f"./{Path(str(value)).relative_to(here)}"
        if str(value).startswith(f"{here}/")
        else str(value)
    )
