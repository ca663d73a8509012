"""The command line of kvdb-demo: a scratch directory, the acts, the table, the verdict.

Exit status: 0 when every check holds, 1 when one fails or the demo cannot go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvdb_tools.daemon import CommandError, Daemon, DaemonError
from kvdb_tools.demo.acts import DemoError, Stage, run_acts
from kvdb_tools.demo.report import table
from kvdb_tools.demo.text import demo_text


@click.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Work in DIR and leave it there.")
@click.option("--model", default="dsv4-nano", show_default=True, help="Model name or path.")
@click.option(
    "--tokens", default=10_000, show_default=True, type=click.IntRange(1000), help="Cut the text to about so many."
)
@click.option("--json", "as_json", is_flag=True, help="The measurements and checks as JSON on standard output.")
def main(keep: Path | None, model: str, tokens: int, as_json: bool) -> None:
    """Show the whole path: prefill, snapshot, steps, fork, sample, SIGKILL, restore, reuse."""
    console = Console(stderr=as_json, highlight=False)
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"{keep} is not empty")
    with tempfile.TemporaryDirectory(prefix="kvdb-demo-") as scratch:
        raise SystemExit(run(console, (keep or Path(scratch) / "data").resolve(), model, tokens, as_json))


def run(console: Console, directory: Path, model: str, tokens: int, as_json: bool) -> int:
    """Run the demo on an empty directory; returns the exit status."""
    columns = TextColumn("reading"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", visible=False)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=done < total)

        daemon = Daemon(directory, {"model": model})
        stage = Stage(daemon, demo_text(), model, progress.console.print, on_progress, tokens)
        problem = ""
        try:
            run_acts(stage)
        except (CommandError, DaemonError, DemoError, OSError) as error:
            problem = f"{error}\n{daemon.log_tail()}"
        finally:
            stage.drop_connection()
            daemon.stop()
    if not problem:
        stage.check("kvdb-check --deep finds nothing", _is_clean(directory))
    if stage.report.acts:
        console.print(table(stage.report))
    if as_json:
        print(json.dumps(stage.report.as_dict(), indent=1))
    if problem:
        console.print("stopped:", style="bold red", end=" ")
        console.print(problem, markup=False)
        return 1
    n_checks = len(stage.report.checks)
    failed = sum(not check.holds for check in stage.report.checks)
    console.print(f"[bold red]{failed} of {n_checks} checks fail[/]" if failed else f"[green]{n_checks} checks hold[/]")
    return 0 if stage.report.is_good else 1


def _is_clean(directory: Path) -> bool:
    command = [sys.executable, "-P", "-c", "from kvdb_tools.check import main; main()", str(directory), "--deep"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
