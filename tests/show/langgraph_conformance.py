"""The LangGraph checkpointer against LangGraph's own conformance tests: every group, base and extended, with its count.

`langgraph-checkpoint-conformance` runs its tests on a saver over the synchronous client and on one over the
asynchronous client, against a daemon of this program's own. Every group must be there and every test must pass.

    python tests/show/langgraph_conformance.py [--quick]
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import BASE_CAPABILITIES, Capability
from rich.console import Console
from rich.table import Table

import kvdb
from kvdb.langgraph import KVDBSaver
from kvdb_tools.daemon import Daemon


def report_of(daemon: Daemon, make: Callable[..., Any]) -> Any:
    """The conformance report of a saver over this kind of client."""

    @checkpointer_test(name=f"KVDBSaver({make.__name__})")
    async def savers() -> AsyncIterator[BaseCheckpointSaver[str]]:
        yield KVDBSaver(make("127.0.0.1", daemon.port))

    return asyncio.run(validate(savers))


@click.command()
@click.option("--quick", is_flag=True, help="Nothing is left out: this takes seconds.")
def main(quick: bool) -> None:
    """Run the conformance tests and print how many of each group passed."""
    kinds = (kvdb.Client, kvdb.AsyncClient)
    with tempfile.TemporaryDirectory(prefix="kvdb-show-") as scratch, Daemon(Path(scratch) / "data") as daemon:
        reports = [report_of(daemon, kind) for kind in kinds]
    packages = ("langgraph", "langgraph-checkpoint", "langgraph-checkpoint-conformance")
    table = Table(title=", ".join(f"{name} {version(name)}" for name in packages))
    for column in ("group", "kind", *(kind.__name__ for kind in kinds)):
        table.add_column(column)
    totals, failed = [0] * len(kinds), 0
    for group in Capability:
        cells = []
        for number, report in enumerate(reports):
            found = report.results.get(group.value)
            passed, wrong = (found.tests_passed, found.tests_failed) if found is not None else (0, 1)
            totals[number] += passed
            failed += wrong + (passed == 0)
            cells.append(f"{passed} passed" + (f", {wrong} FAILED" if wrong else ""))
        table.add_row(group.value, "base" if group in BASE_CAPABILITIES else "extended", *cells)
    table.add_row("all", "", *(f"{total} passed" for total in totals))
    console = Console(highlight=False)
    console.print(table)
    is_full = not failed and all(report.conformance_level() == "FULL" for report in reports)
    console.print(
        f"{'every group passed' if is_full else 'NOT EVERY GROUP PASSED'}: {', '.join(map(str, totals))} tests"
    )
    raise SystemExit(0 if is_full else 1)


if __name__ == "__main__":
    main()
