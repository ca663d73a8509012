"""What needs no model: SAMPLE, LOGITS, PREFIX on tokens, FORK, kvdb-dump, kvdb-check; no engine process, no MLX.

python tests/show/no_engine.py [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int
from kvdb_tools.demo.text import demo_text

# Runs a program's main and says afterwards which parts of MLX the process has loaded.
PROBE = """
import importlib, sys
try:
    importlib.import_module(sys.argv.pop(1)).main()
except SystemExit as error:
    status = error.code or 0
else:
    status = 0
print("mlx modules:", sorted(name for name in sys.modules if name.split(".")[0] == "mlx"), "status:", status)
"""


def children(pid: int) -> list[str]:
    """Command lines of the child processes."""
    done = subprocess.run(["ps", "-A", "-o", "ppid=,args="], capture_output=True, text=True, check=True)
    rows = (line.split(None, 1) for line in done.stdout.splitlines())
    return [row[1] for row in rows if len(row) == 2 and row[0] == str(pid)]


def maps_mlx(pid: int) -> str:
    """Whether an MLX library is mapped into the process, where the system tells."""
    maps = Path(f"/proc/{pid}/maps")
    if not maps.exists():
        return "unknown here"
    return "yes" if "mlx" in maps.read_text() else "no"


@click.command()
@click.option("--quick", is_flag=True, help="The same; it is quick.")
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, model: str) -> None:
    """Print each command, what it answered, and that no engine was there."""
    console = Console(highlight=False)
    table = Table(title="without an engine")
    for name in ("what", "answer", "child processes", "MLX in the process"):
        table.add_column(name, overflow="fold")
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        daemon = Daemon(Path(scratch) / "data", {"model": model})
        with daemon, Connection(daemon.target) as connection:
            call = Caller(connection)
            ids = [as_int(token) for token in call.list("TOKENIZE", model, demo_text())][:700]
            call("PREFILL", "s", "TOKENS", len(ids), *ids)
            call("SNAPSHOT", "s", "snap")
        with daemon, Connection(daemon.target) as connection:
            call = Caller(connection)
            commands: list[tuple[str | int, ...]] = [
                ("SAMPLE", "snap", "COUNT", 3, "SEED", 1),
                ("LOGITS", "snap", "TOP", 2),
                ("LOGITS", "s", "TOP", 1),
                ("PREFIX", "TOKENS", len(ids) + 1, *ids, 5),
                ("FORK", "snap", "a", "b"),
                ("FORK", "s", "c"),
                ("REWIND", "a", "TO", "snap"),
                ("SNAPINFO", "snap"),
                ("STORE", "VERIFY", "DEEP"),
            ]
            for words in commands:
                answer = repr(call(*words))
                found, mapped = children(daemon.pid), maps_mlx(daemon.pid)
                good = good and not found and mapped != "yes"
                name = " ".join(map(str, words[:6])) + (" ..." if len(words) > 6 else "")
                table.add_row(name, answer[:100].replace("[", "\\["), str(len(found)), mapped)
            status = call.map("ENGINE", "STATUS")
            good = good and status["starts"] == 0
            table.add_row("ENGINE STATUS", f"{status['state']!r}, starts {status['starts']}", "", "")
        programs = (("dump", "ls"), ("dump", "tree"), ("dump", "show"), ("check", "--deep"))
        for module, word in programs:
            arguments = {"ls": ["ls", str(daemon.directory)], "tree": ["tree", str(daemon.directory)]}
            arguments |= {"show": ["show", str(daemon.directory), "snap"], "--deep": [str(daemon.directory), "--deep"]}
            command = [sys.executable, "-P", "-c", PROBE, f"kvdb_tools.{module}", *arguments[word]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
            fine = last == "mlx modules: [] status: 0"
            good = good and fine
            head = done.stdout.splitlines()[0] if done.stdout else ""
            table.add_row(f"kvdb-{module} {word}", head[:100].replace("[", "\\["), "", "no" if fine else last)
    console.print(table)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
