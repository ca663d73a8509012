"""A tail record as bytes: `hexdump -C` shows DSV4 and readable text.

python tests/show/hexdump_tail.py [--quick]
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import click
from records import tail_of

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon

TEXT = "Quel ramo del lago di Como, che volge a mezzogiorno"
N_BYTES = 320


@click.command()
@click.option("--quick", is_flag=True, help="The same; it is quick.")
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, model: str) -> None:
    """Print the first bytes of the record; exit 1 unless magic and text are in them."""
    with tempfile.TemporaryDirectory() as scratch:
        daemon = Daemon(Path(scratch) / "data", {"model": model})
        with daemon, Connection(daemon.target) as connection:
            call = Caller(connection)
            call("PREFILL", "s", "TEXT", TEXT)
            snapshot_id = call.map("SNAPSHOT", "s", "snap")["id"]
        text_id = snapshot_id.decode() if isinstance(snapshot_id, bytes) else str(snapshot_id)
        record = tail_of(daemon.directory, bytes.fromhex(text_id))
        if shutil.which("hexdump"):
            words = ["hexdump", "-C", "-s", str(record.offset), "-n", str(N_BYTES), str(record.path)]
            print("$ hexdump -C -s", record.offset, "-n", N_BYTES, f"segments/{record.path.name}", flush=True)
            subprocess.run(words, check=True)
        data = record.path.read_bytes()[record.offset : record.offset + N_BYTES]
    is_readable = b"DSV4" in data and TEXT[:20].encode() in data
    print("magic and text are there" if is_readable else "magic or text is missing")
    raise SystemExit(0 if is_readable else 1)


if __name__ == "__main__":
    main()
