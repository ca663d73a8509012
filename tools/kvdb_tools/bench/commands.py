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
CLIENTS = 50
PIPELINES = (1, 16)
REQUESTS = {1: 100_000, 16: 400_000}
QUICK_REQUESTS = {1: 5_000, 16: 20_000}


def run(settings: Settings) -> Result:
    """Measure both servers, test by test, alternating so that a drift of the machine hits both."""
    program = need("redis-benchmark")
    requests = QUICK_REQUESTS if settings.quick else REQUESTS
    rows: list[list[Cell]] = []
    daemon = Daemon(settings.scratch / "kvdb", {"appendfsync": "everysec"})
    with daemon, RedisServer(settings.scratch / "redis", "everysec") as redis:
        for pipeline in PIPELINES:
            for test in TESTS:
                settings.say(f"{test} -P {pipeline} ...")
                ours = _measure(program, daemon.port, test, pipeline, requests[pipeline])
                theirs = _measure(program, redis.target.port, test, pipeline, requests[pipeline])
                name = test.removesuffix("_mbulk").upper()
                rows.append([f"{name} -P {pipeline}", ours[0], theirs[0], ours[0] / theirs[0], *ours[1:], *theirs[1:]])
    labels = [str(row[0]) for row in rows]
    return Result(
        title=f"commands, {CLIENTS} clients",
        columns=(
            "command",
            "kvdb/s",
            "Redis/s",
            "ratio",
            "kvdb p50 ms",
            "kvdb p99 ms",
            "Redis p50 ms",
            "Redis p99 ms",
        ),
        rows=rows,
        notes=["redis-benchmark, 3-byte values, both servers with appendfsync everysec"],
        bars=Bars(
            "requests a second",
            labels,
            {"kvdb": [_float(row[1]) for row in rows], "Redis": [_float(row[2]) for row in rows]},
        ),
    )


def _measure(program: str, port: int, test: str, pipeline: int, requests: int) -> tuple[float, float, float]:
    """Requests a second, p50 and p99 in ms."""
    command = [program, "-p", str(port), "-t", test, "-c", str(CLIENTS), "-n", str(requests), "-P", str(pipeline)]
    done = subprocess.run([*command, "--csv"], capture_output=True, text=True, check=True)
    # A server without CONFIG GET save makes redis-benchmark print a warning first.
    table = done.stdout[done.stdout.index('"test"') :]
    row = next(csv.DictReader(io.StringIO(table)))
    return float(row["rps"]), float(row["p50_latency_ms"]), float(row["p99_latency_ms"])


def _float(cell: Cell) -> float:
    return float(cell or 0)
