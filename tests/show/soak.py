"""10,000 idle connections and 100 active ones: memory, descriptors and latency stay where they are.

python tests/show/soak.py [--quick] [--seconds 600]

The active clients write and read strings, hashes and sorted sets in a bounded set of keys, some with an expiry. Every
tenth of the time resident memory, open descriptors and the latency since the last look are noted. In the end each idle
connection must still answer PING.
"""

from __future__ import annotations

import asyncio
import random
import resource
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.reply import encode_command
from kvdb_tools.daemon import Daemon

N_KEYS = 50
PAUSE_S = 0.05
GROWTH_LIMIT_BYTES = 16 << 20
LATENCY_GROWTH_LIMIT = 5.0


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def n_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Line:
    """One connection that sends a command and waits for one line of answer, or for a bulk string."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, *words: str | bytes | int) -> bytes:
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        self.writer.write(encode_command(encoded))
        line = await self.reader.readline()
        if line[:1] == b"$" and line != b"$-1\r\n":
            return await self.reader.readexactly(int(line[1:]) + 2)
        if line[:1] not in b"+:$,":
            raise AssertionError(f"{words[0]!r} answered {line!r}")
        return line


async def connect(port: int, number: int) -> Line:
    # A source address has some 28,000 ports to give.
    source = (f"127.0.0.{1 + number // 5000}", 0)
    line = Line(*await asyncio.open_connection("127.0.0.1", port, local_addr=source))
    # The kernel calls a connection open that nobody has accepted yet; this one has been.
    await line.ask("PING")
    return line


async def be_active(line: Line, number: int, times: list[float], until: float) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        key = f"c{number}:{rng.randrange(N_KEYS)}"
        value = rng.randbytes(rng.choice((10, 100, 1000)))
        words: tuple[str | bytes | int, ...] = rng.choice([
            ("SET", f"s{key}", value), ("SET", f"s{key}", value, "EX", 5), ("GET", f"s{key}"),
            ("HSET", f"h{key}", f"f{rng.randrange(20)}", value), ("HGET", f"h{key}", "f1"),
            ("ZADD", f"z{key}", rng.random(), f"m{rng.randrange(20)}"), ("ZSCORE", f"z{key}", "m1"), ("DEL", f"h{key}"),
            ("INCR", f"n{key}"), ("PING",),
        ])  # fmt: skip
        began = time.perf_counter()
        await line.ask(*words)
        times.append(time.perf_counter() - began)
        await asyncio.sleep(PAUSE_S * rng.uniform(0.5, 1.5))


async def soak(console: Console, daemon: Daemon, n_idle: int, n_active: int, seconds: float) -> bool:
    table = Table(title=f"{n_idle:,} idle and {n_active} active connections for {seconds:.0f} s")
    for name in ("second", "resident MB", "descriptors", "commands/s", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    idle: list[Line] = []
    empty = rss_bytes(daemon.pid)
    for start in range(0, n_idle, 200):
        numbers = range(start, min(start + 200, n_idle))
        idle += await asyncio.gather(*(connect(daemon.port, number) for number in numbers))
    active = [await connect(daemon.port, n_idle + number) for number in range(n_active)]
    full = rss_bytes(daemon.pid)
    began = time.monotonic()
    times: list[float] = []
    work = [asyncio.create_task(be_active(line, n, times, began + seconds)) for n, line in enumerate(active)]
    looks: list[tuple[int, int, float]] = []
    for _ in range(10):
        n_before, at = len(times), time.monotonic()
        await asyncio.sleep(seconds / 10)
        seen = sorted(times[n_before:])
        look = (rss_bytes(daemon.pid), n_descriptors(daemon.pid), seen[int(len(seen) * 0.99)] * 1e3)
        looks.append(look)
        table.add_row(
            f"{time.monotonic() - began:.0f}", f"{look[0] / 1e6:.1f}", str(look[1]),
            f"{len(seen) / (time.monotonic() - at):.0f}", f"{seen[len(seen) // 2] * 1e3:.2f}", f"{look[2]:.2f}",
        )  # fmt: skip
    await asyncio.gather(*work)
    answered = 0
    for line in idle:
        try:
            answered += await line.ask("PING") == b"+PONG\r\n"
        except OSError:
            continue  # reset meanwhile: not counted as an answer
    for line in [*idle, *active]:
        line.writer.close()
    await asyncio.sleep(1)
    after = n_descriptors(daemon.pid)
    console.print(table)
    # The first two looks are while caches fill.
    growth = looks[-1][0] - looks[1][0]
    slower = sum(p99 for *_, p99 in looks[-3:]) / max(sum(p99 for *_, p99 in looks[1:4]), 0.1)
    claims = [
        (f"a connection takes {(full - empty) / (n_idle + n_active) / 1e3:.1f} kB of the daemon", True),
        (f"resident memory from the second look to the last: {growth / 1e6:+.1f} MB", growth < GROWTH_LIMIT_BYTES),
        (f"descriptors: {looks[1][1]} and {looks[-1][1]}; {after} after all have left",
         abs(looks[1][1] - looks[-1][1]) <= 4 and after < 100),
        (f"p99 of the last looks is {slower:.2f} of that of the first", slower < LATENCY_GROWTH_LIMIT or seconds < 60),
        (f"idle connections that answer PING in the end: {answered:,} of {n_idle:,}", answered == n_idle),
    ]  # fmt: skip
    for text, holds in claims:
        console.print(f"{'holds' if holds else 'DOES NOT HOLD'}: {text}")
    return all(holds for _, holds in claims)


@click.command()
@click.option("--quick", is_flag=True, help="500 and 20 connections, 2 seconds.")
@click.option("--idle", "n_idle", default=10_000, show_default=True)
@click.option("--active", "n_active", default=100, show_default=True)
@click.option("--seconds", default=600.0, show_default=True)
def main(quick: bool, n_idle: int, n_active: int, seconds: float) -> None:
    """Print ten looks and the claims; exit 1 when something grows."""
    console = Console(highlight=False, soft_wrap=True)
    if quick:
        n_idle, n_active, seconds = 500, 20, 2.0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < n_idle + n_active + 200:
        console.print(f"only {hard} open files are allowed here (ulimit -Hn)")
        raise SystemExit(2)
    options = {"model": "", "maxclients": str(n_idle + n_active + 50), "loglevel": "warning"}
    with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", options) as daemon:
        holds = asyncio.run(soak(console, daemon, n_idle, n_active, seconds))
    console.print("no growth" if holds else "GROWTH")
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
