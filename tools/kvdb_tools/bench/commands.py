"""Plain commands against redis-server: the same redis-benchmark, the same durability, one after the other.

Both servers sync once a second. The load generator shares the machine with the server under test, so at high pipelining
it is often the limit; the ratio is what can be compared. A bare server of uvloop, hiredis and a dict (bare_server.py)
shows what Python can reach at all; the daemon's processor time a command, and what of it its handlers take, show where
the difference to it goes.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import subprocess
from pathlib import Path

from kvdb_tools.bench import flash
from kvdb_tools.bench.bare_server import BareServer
from kvdb_tools.bench.redis_server import RedisServer, need
from kvdb_tools.bench.scenario import Bars, Cell, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon

TESTS = ("ping_mbulk", "set", "get", "hset")
LOADS = ((50, 1), (50, 16), (1, 1))  # clients, requests in a pipeline
REQUESTS = {(50, 1): 100_000, (50, 16): 400_000, (1, 1): 20_000}  # a turn
TURNS = 3
QUICK_DIVISOR = 20
# The least that is good enough of Redis' rate; with one client, the most of its median latency.
TARGETS = {(50, 1): dict.fromkeys(TESTS, 0.9), (50, 16): {"ping_mbulk": 0.4, "get": 0.4, "set": 0.25, "hset": 0.25}}
LATENCY_TARGET = 1.5


def run(settings: Settings) -> Result:
    """Measure the servers, test by test, in turns so that a drift of the machine hits all; medians of the turns."""
    program = need("redis-benchmark")
    rows: list[list[Cell]] = []
    daemon = Daemon(settings.scratch / "kvdb", {"appendfsync": "everysec", "model": ""})
    with daemon, RedisServer(settings.scratch / "redis", "everysec") as redis, BareServer() as bare:
        for load in LOADS:
            for test in TESTS:
                name = test.removesuffix("_mbulk").upper() + (f" -P {load[1]}" if load[0] > 1 else " -c 1")
                settings.say(f"{name} ...")
                requests = REQUESTS[load] // (QUICK_DIVISOR if settings.quick else 1)
                with Connection(daemon.target) as connection:
                    Caller(connection)("CONFIG", "RESETSTAT")
                turns: list[list[tuple[float, float, float]]] = [[], [], []]
                used_s = [0.0, 0.0]
                for _ in range(TURNS):
                    before = _processor_s(daemon.pid)
                    turns[0].append(_measure(program, daemon.port, test, load, requests))
                    after = _processor_s(daemon.pid)
                    used_s = [used + end - begin for used, end, begin in zip(used_s, after, before, strict=True)]
                    turns[1].append(_measure(program, redis.target.port, test, load, requests))
                    turns[2].append(_measure(program, bare.target.port, test, load, requests))
                took = [1e6 * used / (TURNS * requests) for used in used_s]
                with Connection(daemon.target) as connection:
                    handler_us = 1e3 * flash.daemon_ms(Caller(connection), test.removesuffix("_mbulk"))
                ours, theirs, least = (
                    [statistics.median(column) for column in zip(*turn, strict=True)] for turn in turns
                )
                ratio = ours[0] / theirs[0]
                if load in TARGETS:
                    target, holds = f">= {TARGETS[load][test]}", ratio >= TARGETS[load][test]
                else:
                    target, holds = f"p50 <= {LATENCY_TARGET}", ours[1] <= LATENCY_TARGET * theirs[1]
                rates = [ours[0], theirs[0], ratio, ours[0] / least[0]]
                rows.append([name, *rates, *took, handler_us, *ours[1:], theirs[1], target, "yes" if holds else "no"])
    labels = [str(row[0]) for row in rows]
    return Result(
        title="commands",
        columns=(
            "command",
            "kvdb/s",
            "Redis/s",
            "ratio",
            "of bare",
            "user us",
            "system us",
            "handler us",
            "p50 ms",
            "p99 ms",
            "Redis p50 ms",
            "target",
            "holds",
        ),
        rows=rows,
        notes=[
            "redis-benchmark, 3-byte values, medians of 3 turns, appendfsync everysec. -c 50 but for the last",
            "four. of bare: rate beside that of uvloop, hiredis and a dict, without rules, clock or disk.",
            "user, system: the daemon's processor time a command; handler: of it, in the command's own function",
        ],
        bars=Bars(
            "requests a second",
            labels,
            {
                "kvdb": [_float(row[1]) for row in rows],
                "Redis": [_float(row[2]) for row in rows],
                "bare": [_float(row[1]) / _float(row[4]) for row in rows],
            },
        ),
    )


def _measure(program: str, port: int, test: str, load: tuple[int, int], requests: int) -> tuple[float, float, float]:
    """Requests a second, p50 and p99 in ms."""
    clients, pipeline = load
    command = [program, "-p", str(port), "-t", test, "-c", str(clients), "-n", str(requests), "-P", str(pipeline)]
    done = subprocess.run([*command, "--csv"], capture_output=True, text=True, check=True)
    # A server without CONFIG GET save makes redis-benchmark print a warning first.
    table = done.stdout[done.stdout.index('"test"') :]
    row = next(csv.DictReader(io.StringIO(table)))
    return float(row["rps"]), float(row["p50_latency_ms"]), float(row["p99_latency_ms"])


def _processor_s(pid: int) -> tuple[float, float]:
    """Seconds a process has computed, of its own and in the kernel; zeros where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


def _float(cell: Cell) -> float:
    return float(cell or 0)
