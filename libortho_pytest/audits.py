"""Audits of one session: made once, recorded with their cases, written where that was asked for.

Imported at the first audit, and with it libortho, torch and transformers. Measures nothing itself:
an audit is an `AuditRequest` of the library, put together from a case's words and the options.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import libortho
from libortho import hardware
from libortho.audit_request import AuditedArtefact, AuditRequest, NotShownPrivateError
from libortho.corpora import KNOWN
from libortho.errors import HardwareError, OrthoError
from libortho.files import sha256_of
from libortho.layout import BASE_MANIFEST, PRIVATE_MANIFEST
from libortho.records import RecordSet
from libortho.registry import REGISTRY
from libortho.report import write_report
from libortho.results import Results, write_results
from libortho.settings import AUDIT_SETTINGS, Settings, resolve
from libortho.summary import summary_lines

from .plugin import option_sources, visible_progress, why_no_shared_gpu

PROPERTIES = {
    "libortho.artefact": lambda audited: audited.request.artefact.name,
    "libortho.verdict": lambda audited: audited.result.verdict,
    "libortho.privacy_ratio": lambda audited: audited.result.privacy_ratio,
    "libortho.privacy_ratio_lower95": lambda audited: audited.result.privacy_ratio_lower95,
    "libortho.base_fingerprint": lambda audited: audited.result.fingerprint_off,
}
"""JUnit properties of a case, for each artefact that it audits."""


class Audits:
    """The audits of a session; `failures` says what could not be written."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.settings: Settings = resolve(*option_sources(config), AUDIT_SETTINGS)
        self.done: dict[tuple[Any, ...], AuditedArtefact] = {}
        self.failures: list[str] = []
        self.notes: list[str] = []

    def recorded_in(self, properties: list[tuple[str, object]]) -> Callable[..., AuditedArtefact]:
        """What the fixture gives to a case: audits that leave their properties with it."""

        def ortho_audit(
            folder: str | Path, *, records: str | Path | RecordSet, **words: Any
        ) -> AuditedArtefact:
            audited = self.audit(folder, records, **words)
            properties.extend((name, value_of(audited)) for name, value_of in PROPERTIES.items())
            return audited

        return ortho_audit

    def audit(
        self,
        folder: str | Path,
        records: str | Path | RecordSet,
        *,
        model: str | Path | None = None,
        corpus: str | Path | None = None,
        attacks: bool | None = None,
        relearn: bool | None = None,
        seed: int | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> AuditedArtefact:
        """The audit of an artefact; a word of None leaves it to the options.

        Raises `HardwareError` where several processes would share a card, and otherwise as
        `AuditRequest.perform` does.
        """
        cache = self._chosen("cache_dir", cache_dir)
        request = AuditRequest(
            artefact=self._placed(folder),
            records=records if isinstance(records, RecordSet) else self._placed(records),
            model=self._named(self._chosen("model", model), REGISTRY),
            corpus=self._named(self._chosen("corpus", corpus), KNOWN),
            attacks=self._chosen("attacks", attacks),
            relearn=self._chosen("relearn", relearn),
            seed=self._chosen("seed", seed),
            device=self._chosen("device", device),
            cache_dir=None if cache is None else self._placed(cache),
        )
        shared = why_no_shared_gpu(self.config)
        if shared and hardware.resolve_device(request.device) != "cpu":
            raise HardwareError(f"refused: {shared}")
        key = (request, *_contents(request))
        if key not in self.done:
            with visible_progress(self.config):
                self.done[key] = request.perform()
        return self.done[key].held_to(
            min_ratio=self.settings.min_privacy_ratio, required=self.settings.require_verdict
        )

    def _chosen(self, key: str, said: Any) -> Any:
        return self.settings.values[key] if said is None else said

    def _placed(self, path: str | Path) -> Path:
        """A path of a case: relative to the root folder, wherever pytest was started."""
        return self.config.rootpath / Path(path).expanduser()

    def _named(self, name: str | Path, known: Container[str]) -> str:
        """A model or corpus: a known name as it is, else the path if there is one, or a hub id."""
        placed = self._placed(name)
        return str(placed) if str(name) not in known and placed.exists() else str(name)

    # --- the session's end ----------------------------------------------------------------------

    def results(self) -> Results:
        """A results record of all audits; there must be one."""
        first, *others = self.done.values()
        return first.results(("pytest", *self.config.invocation_params.args), *others)

    def finish(self) -> bool:
        """Write the results file and the report that were asked for; False if one wasn't."""
        folder, report = self.settings.results_dir, self.settings.report
        if not self.done:
            return True
        if self.settings.origins["results_dir"] == "default":
            folder = None
        results, name = self.results(), "this run"
        try:
            if folder is not None:
                name = write_results(results, folder).name
                self.notes.append(f"results: {folder / name}")
            if report is not None:
                self.notes.append(f"report: {write_report([(name, results)], report)}")
        except (OSError, ValueError, OrthoError) as error:
            self.failures.append(f"what was measured was not written: {error}")
        return not self.failures

    def closing_lines(self) -> list[str]:
        """The closing table, and what was written."""
        results = self.results()
        lines = []
        for audited in self.done.values():
            lines += [audited.request.artefact.name]
            lines += [*summary_lines(replace(results, audits=(audited.result,))), ""]
        return [*lines, *self.notes]


def _contents(request: AuditRequest) -> Iterator[str | None]:
    """Hashes of what a request's paths hold, for they may be written anew between two cases."""
    paths = [request.artefact / name for name in (BASE_MANIFEST, PRIVATE_MANIFEST)]
    if isinstance(request.records, Path):
        paths.append(request.records)
    return (sha256_of(path) if path.is_file() else None for path in paths)


def explain(report: Any, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Make the report of a failure that came out of the library show no value of a variable.

    Its frames hold records: pytest would print their arguments, and with --showlocals all of them.
    An error that explains itself is shown as its paragraph, any other with lines of code alone.
    """
    error = excinfo.value
    library = Path(libortho.__file__).parent
    inside = any(Path(str(entry.path)).is_relative_to(library) for entry in excinfo.traceback)
    if isinstance(error, OrthoError):
        report.longrepr = f"{excinfo.typename}: {error}"
    elif inside and not isinstance(error, NotShownPrivateError):
        report.longrepr = "".join(traceback.format_exception(error))
