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


@dataclass(slots=True)
class Result:
    """A table of measurements, what one must know to read it, and maybe a chart."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: Bars | None = None

    def as_dict(self) -> dict[str, object]:
        """For --json: rows as maps by column name."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        bars = asdict(self.bars) if self.bars else None
        return {"title": self.title, "rows": rows, "notes": self.notes, "bars": bars}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A name for the command line, what it shows, and the function that runs it."""

    name: str
    summary: str
    run: Callable[[Settings], Result]
