"""The command line of kvdb-bench. Exit status: 0 fine, 1 a scenario could not run, 2 wrong use."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.bench.plot import draw, need_matplotlib
from kvdb_tools.bench.registry import SCENARIOS
from kvdb_tools.bench.scenario import Cell, MissingError, Result, Settings
from kvdb_tools.daemon import CommandError, DaemonError

PIPE_COLUMNS = 150
TERMINATED = 128 + signal.SIGTERM


@click.command(epilog="\b\nScenarios:\n" + "\n".join(f"  {s.name:<12}{s.summary}" for s in SCENARIOS.values()))
@click.argument("scenarios", nargs=-1, required=True, metavar="SCENARIO...", type=click.Choice(sorted(SCENARIOS)))
@click.option("--json", "as_json", is_flag=True, help="Results as JSON on standard output.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the charts into FILE.png.")
@click.option("--quick", is_flag=True, help="A short version: fewer repetitions, numbers less steady.")
@click.option("--full", is_flag=True, help="The largest sizes too: some scenarios then need 50 GB of disk and an hour.")
@click.option(
    "--traces",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory of traces for replay and eviction (the repository has three agent sessions).",
)
@click.option("--model", default="dsv4-nano", show_default=True, help="Model name or path.")
def main(
    scenarios: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    quick: bool,
    full: bool,
    traces: Path | None,
    model: str,
) -> None:
    """Measure kvdb beside its baselines, in one run on this machine."""
    if plot:
        need_matplotlib()
    # As after Ctrl-C: whoever has started a daemon or a server ends it on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    # A pipe has no width of its own; at rich's 80 columns the wide tables would lose their numbers.
    stream = sys.stderr if as_json else sys.stdout
    console = Console(stderr=as_json, highlight=False, width=None if stream.isatty() else PIPE_COLUMNS)
    results: dict[str, Result] = {}
    failed = False
    for name in scenarios:
        with tempfile.TemporaryDirectory(prefix="kvdb-bench-") as scratch:
            settings = Settings(
                Path(scratch),
                quick,
                model,
                lambda line: console.print(line, style="dim", markup=False),
                full,
                traces,
            )
            try:
                results[name] = SCENARIOS[name].run(settings)
            except (MissingError, CommandError, DaemonError, OSError) as error:
                console.print(f"{name}: {error}", style="red", markup=False)
                failed = True
                continue
        show(console, results[name])
    if as_json:
        print(json.dumps({"machine": machine(), "results": {n: r.as_dict() for n, r in results.items()}}, indent=1))
    else:
        console.print(f"on {machine()}", style="dim")
    if plot and results:
        draw(list(results.values()), plot)
    failed = failed or not all(holds for result in results.values() for _, holds in result.claims)
    raise SystemExit(1 if failed else 0)


def machine() -> str:
    """What the numbers were measured on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def show(console: Console, result: Result) -> None:
    """Print one result."""
    table = Table(title=result.title)
    for number, column in enumerate(result.columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in result.rows:
        table.add_row(*(cell_text(cell) for cell in row))
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False, soft_wrap=True)  # whole lines, to be quoted and searched
    for text, holds in result.claims:
        console.print(
            f"{'holds' if holds else 'DOES NOT HOLD'}: {text}",
            style="" if holds else "red",
            markup=False,
            soft_wrap=True,
        )


def cell_text(cell: Cell) -> str:
    """A table cell for people."""
    match cell:
        case None:
            return ""
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:#.3g}".rstrip(".")
        case str():
            return cell
