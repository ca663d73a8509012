"""Replies beside those of a real redis-server: random commands of every kind, in both protocols, counted.

python tests/show/compat.py [--quick] [--commands 100000] [--seed 1] [--least 10]

The comparison is that of tests/kvdb/server/test_compat.py. Printed are the commands that were compared least often,
those that Redis does not have, what may differ by design, and every difference found.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from rich.console import Console

from kvdb_tools.daemon import Daemon

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.kvdb.server.compat import DIFFERENCES, NAMES, WITHOUT_REDIS, run
from tests.kvdb.server.conftest import Wire


def start_redis(folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "redis.sock"
    words = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(path))
                return process
            except OSError:
                time.sleep(0.05)
    raise RuntimeError("redis-server did not start")


@click.command()
@click.option("--quick", is_flag=True, help="4,000 commands, and no least count.")
@click.option("--commands", default=100_000, show_default=True, help="Half of them in each protocol.")
@click.option("--least", default=10, show_default=True, help="How often each command must have been compared.")
@click.option("--seed", default=1, show_default=True)
def main(quick: bool, commands: int, least: int, seed: int) -> None:
    """Print counts and differences; exit 1 after a difference, or when a command was compared too seldom."""
    console = Console(highlight=False, soft_wrap=True)
    if shutil.which("redis-server") is None:
        console.print("redis-server is not installed: nothing to compare with")
        raise SystemExit(0 if quick else 2)
    commands, least = (4_000, 0) if quick else (commands, least)
    counts: Counter[str] = Counter()
    differences: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        redis = start_redis(folder)
        try:
            with Daemon(folder / "data", {"model": "", "unixsocket": str(folder / "kvdb.sock")}):
                for resp in (2, 3):
                    connect = (lambda: Wire(str(folder / "kvdb.sock")), lambda: Wire(str(folder / "redis.sock")))
                    result = run(connect, resp, commands // 2, seed)
                    counts += result.counts
                    differences += result.differences
        finally:
            redis.terminate()
            redis.wait()
    shared = NAMES - WITHOUT_REDIS
    known = {name: counts[name] for name in shared}
    console.print(
        "compared least often: " + ", ".join(f"{n} {c}" for n, c in sorted(known.items(), key=lambda i: i[1])[:20])
    )
    seldom = sorted(name for name, count in known.items() if count < least)
    console.print(f"compared fewer than {least} times: {', '.join(seldom) or 'none'}")
    console.print(f"without a counterpart in Redis: {', '.join(sorted(WITHOUT_REDIS))}")
    console.print("may differ:")
    for word, reason in DIFFERENCES.items():
        console.print(f"    {word}: {reason}", markup=False)
    for text in differences[:50]:
        console.print(text, markup=False)
    total = sum(counts.values())
    console.print(
        f"{total:,} commands, {len(shared)} kinds, RESP2 and RESP3, in {time.monotonic() - began:.0f} s:"
        f" {len(differences)} differences"
    )
    raise SystemExit(1 if differences or (seldom and not quick) else 0)


if __name__ == "__main__":
    main()
