"""Memory of the idle daemon, without and with an engine, and the time from start to the first PONG.

python tests/show/footprint.py [--quick]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int, rss_bytes

MiB = 1 << 20


@click.command()
@click.option("--quick", is_flag=True, help="2 starts instead of 7.")
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, model: str) -> None:
    """Print the numbers."""
    starts = []
    with tempfile.TemporaryDirectory() as scratch:
        daemon = Daemon(Path(scratch) / "data", {"model": model})
        for _ in range(2 if quick else 7):
            starts.append(daemon.start())
            daemon.stop()
        with daemon, Connection(daemon.target) as connection:
            call = Caller(connection)
            time.sleep(0.5)
            idle = daemon.rss_bytes()
            began = time.perf_counter()
            call("ENGINE", "LOAD")
            load_s = time.perf_counter() - began
            with_engine = daemon.rss_bytes()
            pid = call.map("ENGINE", "STATUS")["pid"]
            worker = rss_bytes(as_int(pid))
            call("PREFILL", "s", "TEXT", "Quel ramo del lago di Como")
            call("GENERATE", "s", "MAXTOKENS", 8)
            used = rss_bytes(as_int(pid))
            call("ENGINE", "UNLOAD")
            after = daemon.rss_bytes()
    table = Table(title=f"footprint with {model}")
    table.add_column("what")
    table.add_column("value", justify="right")
    median, slowest = statistics.median(starts), max(starts)
    table.add_row(
        "start to first PONG, median of " + str(len(starts)), f"{median * 1e3:.0f} ms (slowest {slowest * 1e3:.0f})"
    )
    table.add_row("daemon, idle, no engine", f"{idle / MiB:.0f} MiB")
    table.add_row("ENGINE LOAD", f"{load_s:.2f} s")
    table.add_row("daemon, engine loaded", f"{with_engine / MiB:.0f} MiB")
    table.add_row("engine worker, loaded", f"{worker / MiB:.0f} MiB")
    table.add_row("engine worker after its first tokens", f"{used / MiB:.0f} MiB")
    table.add_row("daemon, engine unloaded again", f"{after / MiB:.0f} MiB")
    Console(highlight=False).print(table)
    raise SystemExit(0 if idle > 0 and worker > 0 else 1)


if __name__ == "__main__":
    main()
