"""SIGKILL at random moments under a client that snapshots in a loop: nothing acknowledged is lost.

The client extends a session and snapshots it, over and over, and writes down what was acknowledged with a digest of
the logits at that moment. The daemon is killed at a random moment; kvdb-check --deep looks at what is left; the daemon
starts again; every acknowledged snapshot must be there with its logits, and a few are restored and continued.

    python tests/show/crash_loop.py [--quick] [--kills N] [--seed N]
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon, as_int
from kvdb_tools.demo.text import demo_text

CHECK = [sys.executable, "-P", "-c", "from kvdb_tools.check import main; main()"]


def snapshot_in_a_loop(daemon: Daemon, ids: list[int], acknowledged: dict[str, bytes], rng: random.Random) -> None:
    """Work until the connection breaks."""
    first = len(acknowledged)
    try:
        with Connection(daemon.target, timeout=60) as connection:
            call = Caller(connection)
            name = f"session:{first}"
            start = rng.randrange(len(ids) - 700)
            part = ids[start : start + rng.randint(1, 600)]
            call("PREFILL", name, "TOKENS", len(part), *part)
            for step in range(10_000):
                start = rng.randrange(len(ids) - 40)
                more = ids[start : start + rng.randint(1, 40)]
                call("EXTEND", name, "TOKENS", len(more), *more)
                logits = hashlib.sha256(call.data("LOGITS", name, "RAW")).digest()
                key = f"snap:{first}:{step}"
                call("SNAPSHOT", name, key)
                acknowledged[key] = logits
    except ConnectionError:
        pass


def verify(daemon: Daemon, acknowledged: dict[str, bytes], rng: random.Random) -> list[str]:
    """The keys that are lost or wrong."""
    bad = []
    with Connection(daemon.target, timeout=120) as connection:
        call = Caller(connection)
        for key, logits in acknowledged.items():
            try:
                if hashlib.sha256(call.data("LOGITS", key, "RAW")).digest() != logits:
                    bad.append(f"{key}: other logits")
            except CommandError as error:
                bad.append(f"{key}: {error}")
        for key in rng.sample(sorted(acknowledged), min(2, len(acknowledged))):
            call("RESTORE", key, "probe", "REPLACE")
            if hashlib.sha256(call.data("LOGITS", "probe", "RAW")).digest() != acknowledged[key]:
                bad.append(f"{key}: other logits after RESTORE")
            call("GENERATE", "probe", "MAXTOKENS", 1)
    return bad


@click.command()
@click.option("--quick", is_flag=True, help="3 kills.")
@click.option("--kills", default=30, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, kills: int, seed: int, model: str) -> None:
    """Print one row a kill; exit 1 when anything acknowledged is lost or kvdb-check finds damage."""
    console = Console(highlight=False)
    rng = random.Random(seed)
    kills = 3 if quick else kills
    acknowledged: dict[str, bytes] = {}
    n_bad = 0
    table = Table(title=f"{kills} SIGKILLs, seed {seed}")
    for name in ("kill", "after s", "acknowledged", "lost or wrong", "kvdb-check --deep", "restart s"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", {"model": model}) as daemon:
        with Connection(daemon.target) as connection:
            ids = [as_int(token) for token in Caller(connection).list("TOKENIZE", model, demo_text())]
        for kill in range(kills):
            before = len(acknowledged)
            client = threading.Thread(target=snapshot_in_a_loop, args=(daemon, ids, acknowledged, rng))
            client.start()
            # One kill in five may come before anything is stored: while the engine starts or the prompt is read.
            wanted = before + (0 if kill % 5 == 4 else rng.randint(1, 12))
            while len(acknowledged) < wanted and client.is_alive():
                time.sleep(0.0005)
            delay = rng.uniform(0, 1.0) if wanted == before else rng.uniform(0, 0.05)
            time.sleep(delay)
            daemon.kill()
            client.join()
            check = subprocess.run(
                [*CHECK, str(daemon.directory), "--deep"], capture_output=True, text=True, check=False
            )
            restart_s = daemon.start()
            bad = verify(daemon, acknowledged, rng)
            n_bad += len(bad) + (check.returncode != 0)
            for line in bad:
                console.print(line, markup=False)
            if check.returncode:
                console.print(check.stdout + check.stderr, markup=False)
            verdict = "clean" if check.returncode == 0 else f"exit {check.returncode}"
            row = (kill + 1, f"{delay:.3f}", len(acknowledged), len(bad), verdict, f"{restart_s:.2f}")
            table.add_row(*map(str, row))
    console.print(table)
    console.print(f"{len(acknowledged)} snapshots acknowledged, {n_bad} problems")
    raise SystemExit(1 if n_bad or not acknowledged else 0)


if __name__ == "__main__":
    main()
