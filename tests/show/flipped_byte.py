"""One flipped byte in a page or a tail: the key answers CORRUPT, everything else keeps serving, kvdb-check names it.

python tests/show/flipped_byte.py [--quick]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from records import Found, leaf_of, tail_of
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import ErrorReply
from kvdb_tools.daemon import Caller, Daemon, as_int
from kvdb_tools.demo.text import demo_text

CHECK = [sys.executable, "-P", "-c", "from kvdb_tools.check import main; main()"]


def flip(record: Found, rng: random.Random) -> int:
    """Change one bit of one byte of the payload; returns the byte's offset in the payload."""
    at = rng.randrange(len(record.payload))
    with record.path.open("r+b") as file:
        file.seek(record.payload_at + at)
        file.write(bytes([record.payload[at] ^ (1 << rng.randrange(8))]))
    return at


def restore_byte(record: Found, at: int) -> None:
    with record.path.open("r+b") as file:
        file.seek(record.payload_at + at)
        file.write(record.payload[at : at + 1])


@click.command()
@click.option("--quick", is_flag=True, help="2 flips in each kind of record instead of 10.")
@click.option("--seed", default=1, show_default=True)
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, seed: int, model: str) -> None:
    """Print what each flip leads to; exit 1 when one goes unnoticed or hurts another key."""
    console = Console(highlight=False)
    rng = random.Random(seed)
    table = Table(title="one flipped bit")
    for name in ("record", "payload byte", "RESTORE", "other key", "kvdb-check", "names it"):
        table.add_column(name, overflow="fold")
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        daemon = Daemon(Path(scratch) / "data", {"model": model})
        with daemon, Connection(daemon.target) as connection:
            call = Caller(connection)
            ids = [as_int(token) for token in call.list("TOKENIZE", model, demo_text())]
            for name, part in (("hurt", ids[:1100]), ("other", ids[2000:3100])):
                call("PREFILL", name, "TOKENS", len(part), *part)
                call("SNAPSHOT", name, f"snap:{name}")
            snapshot_id = bytes.fromhex(str(call.map("SNAPINFO", "snap:hurt")["id"], "ascii"))  # type: ignore[call-overload]
            call("DEL", "hurt", "other")
        targets = {"page": leaf_of(daemon.directory, snapshot_id), "tail": tail_of(daemon.directory, snapshot_id)}
        for kind, record in targets.items():
            for _ in range(2 if quick else 10):
                at = flip(record, rng)
                check = subprocess.run(
                    [*CHECK, str(daemon.directory), "--deep"], capture_output=True, text=True, check=False
                )
                named = record.id16.hex()[:12] in check.stdout
                with daemon, Connection(daemon.target) as connection:
                    reply = connection.call("RESTORE", "snap:hurt", "a", "REPLACE")
                    other = connection.call("RESTORE", "snap:other", "b", "REPLACE")
                answer = reply.text if isinstance(reply, ErrorReply) else "restored"
                fine = answer.startswith("CORRUPT") and record.path.name in answer and str(record.offset) in answer
                fine = fine and not isinstance(other, ErrorReply) and check.returncode == 1 and named
                good = good and fine
                other_text = other.text if isinstance(other, ErrorReply) else "restored"
                table.add_row(kind, str(at), answer, other_text, f"exit {check.returncode}", "yes" if named else "NO")
                restore_byte(record, at)
        check = subprocess.run([*CHECK, str(daemon.directory), "--deep"], capture_output=True, text=True, check=False)
        good = good and check.returncode == 0
    console.print(table)
    console.print(f"with the bytes put back: kvdb-check exit {check.returncode}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
