"""What a scenario is and what it returns. Each scenario lives in a file of its own and is named in registry.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


class MissingError(RuntimeError):
    """The scenario needs a program or package that is not here."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run. `scratch` is an empty directory that goes away; `quick` asks for a short version, `full` for the

    sizes that take many gigabytes and minutes. `traces`: a directory of traces, where the user named one.
    """

    scratch: Path
    quick: bool
    model: str
    say: Callable[[str], None]
    full: bool = False
    traces: Path | None = None


Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Bars:
    """A chart of a result: groups of bars, one colour a series."""

    unit: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over x. low, high: the interval of each value where it was measured; none for a prediction."""

    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Curves:
    """A chart of panels side by side, with the same axes and the same names of curves in each."""

    unit: str
    x_unit: str
    x: Sequence[float]
    panels: Mapping[str, Mapping[str, Curve]]


@dataclass(slots=True)
class Result:
    """A table of measurements, what one must know to read it, and maybe a chart.

    claims: what this measurement is meant to show, each with whether it does. One that fails is an exit status of 1.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: Bars | None = None
    curves: Curves | None = None
    claims: list[tuple[str, bool]] = field(default_factory=list)

    def named(self, row: list[Cell]) -> dict[str, Cell]:
        """A row's cells by column."""
        return dict(zip(self.columns, row, strict=True))

    def as_dict(self) -> dict[str, object]:
        """For --json: rows as maps by column name."""
        rows = [self.named(row) for row in self.rows]
        found: dict[str, object] = {"title": self.title, "rows": rows, "notes": self.notes}
        found["bars"] = asdict(self.bars) if self.bars else None
        found["curves"] = asdict(self.curves) if self.curves else None
        return {**found, "claims": [{"claim": text, "holds": holds} for text, holds in self.claims]}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A name for the command line, what it shows, and the function that runs it."""

    name: str
    summary: str
    run: Callable[[Settings], Result]
