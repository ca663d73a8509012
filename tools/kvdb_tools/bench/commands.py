"""Plain commands against redis-server: the same redis-benchmark, the same durability, one after the other.

Both servers sync once a second. The load generator shares the machine with the server under test, so at high pipelining
it is often the limit; the ratio is what can be compared.
"""

from __future__ import annotations

import csv
import io
import subprocess

from kvdb_tools.bench.redis_server import RedisServer, need
from kvdb_tools.bench.scenario import Bars, Cell, Result, Settings
from kvdb_tools.daemon import Daemon

TESTS = ("ping_mbulk", "set", "get", "hset")
LOADS = ((50, 1), (50, 16), (1, 1))  # clients, requests in a pipeline
REQUESTS = {(50, 1): 200_000, (50, 16): 800_000, (1, 1): 40_000}
QUICK_DIVISOR = 20
# The least that is good enough of Redis' rate; with one client, the most of its median latency.
TARGETS = {(50, 1): dict.fromkeys(TESTS, 0.9), (50, 16): {"ping_mbulk": 0.4, "get": 0.4, "set": 0.25, "hset": 0.25}}
LATENCY_TARGET = 1.5


def run(settings: Settings) -> Result:
    """Measure both servers, test by test, alternating so that a drift of the machine hits both."""
    program = need("redis-benchmark")
    rows: list[list[Cell]] = []
    daemon = Daemon(settings.scratch / "kvdb", {"appendfsync": "everysec"})
    with daemon, RedisServer(settings.scratch / "redis", "everysec") as redis:
        for load in LOADS:
            for test in TESTS:
                name = f"{test.removesuffix('_mbulk').upper()} -c {load[0]} -P {load[1]}"
                settings.say(f"{name} ...")
                requests = REQUESTS[load] // (QUICK_DIVISOR if settings.quick else 1)
                ours = _measure(program, daemon.port, test, load, requests)
                theirs = _measure(program, redis.target.port, test, load, requests)
                ratio = ours[0] / theirs[0]
                if load in TARGETS:
                    target, holds = f">= {TARGETS[load][test]}", ratio >= TARGETS[load][test]
                else:
                    target, holds = f"p50 <= {LATENCY_TARGET} x", ours[1] <= LATENCY_TARGET * theirs[1]
                rows.append([name, ours[0], theirs[0], ratio, *ours[1:], *theirs[1:], target, "yes" if holds else "no"])
    labels = [str(row[0]) for row in rows]
    return Result(
        title="commands",
        columns=(
            "command",
            "kvdb/s",
            "Redis/s",
            "ratio",
            "kvdb p50 ms",
            "kvdb p99 ms",
            "Redis p50 ms",
            "Redis p99 ms",
            "target",
            "holds",
        ),
        rows=rows,
        notes=["redis-benchmark, 3-byte values, both servers with appendfsync everysec"],
        bars=Bars(
            "requests a second",
            labels,
            {"kvdb": [_float(row[1]) for row in rows], "Redis": [_float(row[2]) for row in rows]},
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


def _float(cell: Cell) -> float:
    return float(cell or 0)
