"""What the demo measured and checked, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Act:
    """One row of the table. None: the column does not apply.

    prefills: how often the text must be prefilled to do the same where nothing but prefilling gives a state back.
    """

    name: str
    seconds: float
    bytes_written: int | None = None
    bytes_shared: int | None = None
    recomputed: int | None = None
    prefills: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and whether it did."""

    name: str
    holds: bool
    detail: str = ""


@dataclass(slots=True)
class Report:
    """All acts and checks of one run."""

    n_tokens: int = 0
    prefill_s: float = 0.0
    acts: list[Act] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether every check holds, and there was something to check."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "tokens": self.n_tokens,
            "prefill_s": self.prefill_s,
            "acts": [asdict(act) for act in self.acts],
            "checks": [asdict(check) for check in self.checks],
            "ok": self.is_good,
        }


def table(report: Report) -> Table:
    """The acts as one table."""
    shown = Table(
        title=f"a text of {report.n_tokens:,} tokens",
        caption=f"written, shared: bytes of pages and tails\n"
        f"without kvdb: prefill again, {duration(report.prefill_s)} each time, measured in this run",
        caption_justify="left",
    )
    shown.add_column("act")
    for name in ("time", "written", "shared", "tokens\ncomputed", "without\nkvdb"):
        shown.add_column(name, justify="right")
    for act in report.acts:
        shown.add_row(
            act.name,
            duration(act.seconds),
            size(act.bytes_written),
            size(act.bytes_shared),
            "" if act.recomputed is None else f"{act.recomputed:,}",
            "" if act.prefills is None else duration(act.prefills * report.prefill_s),
        )
    return shown


def duration(seconds: float | None) -> str:
    """Seconds for people: three digits that matter."""
    if seconds is None:
        return ""
    if seconds < 0.0995:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.5 else f"{seconds:.0f} s"


def size(n_bytes: int | None) -> str:
    """Bytes for people."""
    if n_bytes is None:
        return ""
    if n_bytes < 1 << 10:
        return f"{n_bytes} B"
    if n_bytes < 1 << 20:
        return f"{n_bytes / (1 << 10):.0f} KiB"
    return f"{n_bytes / (1 << 20):.1f} MiB"
