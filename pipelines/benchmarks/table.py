"""What a benchmark found: tables for a terminal and for a README, and a JSON file with every single run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipelines.benchmarks.machine import Machine


class Table(BaseModel):
    """Rows of text under columns, printed as Markdown: a README takes it as it is."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = []
    """What a reader must know to take the figures for no more than they are."""

    def text(self) -> str:
        """The table, with its columns lined up."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

        def line(cells: list[str]) -> str:
            aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
            return f"| {' | '.join(aligned)} |"

        lines = [f"{self.title}:", "", *map(line, [self.columns, rule, *self.rows])]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


class Bound(BaseModel):
    """A claim with its figure."""

    name: str
    sense: Literal["at least", "at most"]
    wanted: float
    measured: float

    @property
    def is_met(self) -> bool:
        """Whether the claim holds."""
        return self.measured >= self.wanted if self.sense == "at least" else self.measured <= self.wanted

    def text(self) -> str:
        """One line."""
        verdict = "met" if self.is_met else "NOT MET"
        return f"{verdict}: {self.name}: {self.measured:.3g} ({self.sense} {self.wanted:g} wanted)"


class Report(BaseModel):
    """A finished benchmark."""

    name: str
    """It is stored as NAME.json."""
    machine: Machine
    settings: dict[str, Any]
    tables: list[Table]
    bounds: list[Bound]
    measured: dict[str, Any]
    """Every run of every part, unrounded."""

    def text(self) -> str:
        """Tables and bounds, for a terminal."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        where = (
            f"{machine.time}: {machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, "
            f"{', '.join(machine.gpus) or 'no GPU'}, {machine.torch_threads} torch threads, load "
            f"{machine.load_average[0]} when it began; Python {machine.python}, {versions}"
        )
        bounds = "\n".join(bound.text() for bound in self.bounds)
        return "\n\n".join(part for part in (*(table.text() for table in self.tables), bounds, where) if part)

    def save(self, folder: str) -> Path:
        """Write the JSON file below the local folder `folder`, replacing the last one; returns its path."""
        path = Path(folder) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path
