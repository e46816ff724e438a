"""One run as the sections of a report see it.

Sections take a `Run` and give a `Section`; none reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from libortho.config import NO_LATTICE
from libortho.figures import Figure, figures
from libortho.results import Results

from .blocks import Cell, figure_cell


@dataclass(frozen=True)
class Run:
    """Results, what their file is called, and their figures by name."""

    results: Results
    name: str
    figures: dict[str, Figure] = field(repr=False)

    @classmethod
    def of(cls, results: Results, name: str) -> Run:
        """A run with its figures looked up."""
        return cls(results, name, figures(results))

    def cell(self, name: str, *, interval: bool = False, counts: bool = False) -> Cell:
        """The cell of a figure."""
        return figure_cell(self.figures.get(name), interval=interval, counts=counts)

    def value(self, name: str) -> float | None:
        """The figure's value; None if it was not measured."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    @property
    def model(self) -> str | None:
        """The model that was examined; None if nothing finished but throughput."""
        results = self.results
        finished = (results.exp1_kill_switch, results.exp2_null_test, *results.audits[:1])
        return next((result.model for result in finished if result is not None), None)

    @property
    def bits(self) -> int | None:
        """Bits of the lattice, 16 for none; None if the file doesn't say."""
        result = self.results.exp1_kill_switch or self.results.exp2_null_test
        if result is not None:
            return result.quantization_bits
        for audit in self.results.audits:
            separation = audit.config.get("separation")
            if isinstance(separation, dict) and type(separation.get("bits")) is int:
                return int(separation["bits"])
        return None

    @property
    def subject(self) -> str:
        """The model and its bits in words."""
        if self.model is None:
            return "This run"
        if self.bits is None:
            return self.model
        lattice = "without a lattice" if self.bits == NO_LATTICE else f"at {self.bits} bits"
        return f"{self.model} {lattice}"

    @property
    def device(self) -> str:
        """The card, or the processor by its own name."""
        where = self.results.provenance
        return where.cpu_model if where.device_name == "cpu" else where.device_name
