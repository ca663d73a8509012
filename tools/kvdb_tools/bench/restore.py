"""RESTORE of whole states, warm and cold, beside plain reads of the same bytes, whole-state files and Redis."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import ds4_file_bytes, noise, write_file
from kvdb_tools.bench.redis_bytes import RedisBytes
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon, as_float, as_int

REPEATS = 11
COLD_REPEATS = 5
REDIS_TOKENS = 25_000
LEAST_SHARE = 70
LEAST_FACTOR = 3


def run(settings: Settings) -> Result:
    """Measure each size on a daemon of its own, so that the state lies alone in its segments."""
    warm = ("warm ms", "in the daemon ms", "GB/s", "of plain %", "of kept %", "of 1 MiB %")
    cold = ("cold ms", "cold GB/s", "cold of kept %")
    others = ("ds4 warm ms", "ds4 cold ms", "Redis GET ms", "daemon MB", "worker MB")
    result = Result("RESTORE", ("tokens", "MB", *warm, *cold, *others))
    for n_tokens in (2048, *flash.sizes_of(settings)):
        settings.say(f"{n_tokens:,} tokens ...")
        _measure(settings, result, n_tokens)
    result.notes += [
        f"medians of {REPEATS} (cold: of {COLD_REPEATS}), every byte read and checked into a live session; of: share of"
        " the speed of",
        "a plain read of the same bytes into memory, as read() does it (plain), into memory that an earlier read left",
        "(kept), or through one buffer that stays in the processor's cache: no state lies in memory then (1 MiB). ds4:",
        "plain read of a whole-state file. Redis GET: ds4's payload over loopback into a kept buffer. MB: most",
        "resident memory ever",
    ]
    for row in map(result.named, result.rows):
        for heat, what in (("warm", "of plain %"), ("cold", "cold of kept %")):
            share = f"{row['tokens']:,} tokens, {heat}: at least {LEAST_SHARE} % of a plain read into memory"
            claim = f"{share}: {_float(row[what]):.0f}"
            result.claims.append((claim, _float(row[what]) >= LEAST_SHARE))
        if row["Redis GET ms"]:
            factor = _float(row["Redis GET ms"]) / _float(row["warm ms"])
            claim = f"{row['tokens']:,} tokens: at least {LEAST_FACTOR} times Redis' GET of ds4's payload: {factor:.0f}"
            result.claims.append((claim, factor >= LEAST_FACTOR))
    result.bars = Bars(
        "GB/s",
        [f"{row[0]:,} tokens" for row in result.rows],
        {"warm": [_float(row[4]) for row in result.rows], "cold": [_float(row[9]) for row in result.rows]},
    )
    return result


def _measure(settings: Settings, result: Result, n_tokens: int) -> None:
    directory = settings.scratch / f"kvdb-{n_tokens}"
    daemon = Daemon(directory, {"model": flash.model_of(settings)})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        flash.grow(call, "agent", flash.made_up_ids(n_tokens), is_new=True)
        call("SNAPSHOT", "agent", "state")
        call("DEL", "agent")
        call("ENGINE", "UNLOAD")
        n_bytes = as_int(call.map("RESTORE", "state", "again", "REPLACE")["bytes_read"])
        segments = flash.segments_of(directory)
        memory = memoryview(bytearray(n_bytes))
        flash.read_kept(segments, memory)

        def restore() -> float:
            call("DEL", "again")  # onto a session that stands there nothing would be read
            began = time.perf_counter()
            reply = call.map("RESTORE", "state", "again")
            took_s = time.perf_counter() - began
            if as_int(reply["bytes_read"]) != n_bytes:
                raise CommandError(f"RESTORE read {reply['bytes_read']!r} bytes, not {n_bytes}")
            inside.append(as_float(reply["ms"]))
            return took_s

        # Alternating, so that a drift of the machine hits all alike.
        inside: list[float] = []
        warm, plain, kept, small = [], [], [], []
        for _ in range(REPEATS):
            warm.append(restore())
            kept.append(flash.read_kept(segments, memory))
            plain.append(flash.read_into_memory(segments, n_bytes))
            small.append(flash.read_plain(segments, n_bytes))
        inside_ms = statistics.median(inside)
        cold, kept_cold = [], []
        for _ in range(COLD_REPEATS):
            flash.drop_cache(directory)
            cold.append(restore())
            flash.drop_cache(directory)
            kept_cold.append(flash.read_kept(segments, memory))
        peaks = [flash.peak_rss(daemon.pid), *map(flash.peak_rss, flash.children_of(daemon.pid))]
    del memory
    warm_s, plain_s, kept_s, small_s = map(statistics.median, (warm, plain, kept, small))
    cold_s, kept_cold_s = map(statistics.median, (cold, kept_cold))
    ds4_warm, ds4_cold, redis_s = _baselines(settings, n_tokens)
    result.rows.append(
        [
            *(n_tokens, n_bytes / 1e6, warm_s * 1e3, inside_ms, n_bytes / warm_s / 1e9),
            *(100 * plain_s / warm_s, 100 * kept_s / warm_s, 100 * small_s / warm_s),
            *(cold_s * 1e3, n_bytes / cold_s / 1e9, 100 * kept_cold_s / cold_s, ds4_warm * 1e3, ds4_cold * 1e3),
            *(redis_s * 1e3 if redis_s else None, peaks[0] / 1e6, sum(peaks[1:]) / 1e6),
        ]
    )


def _baselines(settings: Settings, n_tokens: int) -> tuple[float, float, float | None]:
    """Seconds to read a whole-state file warm and cold, and of Redis' GET of it at one size."""
    n_bytes = ds4_file_bytes(n_tokens)
    folder = settings.scratch / "ds4"
    folder.mkdir(exist_ok=True)
    path = folder / "state.kv"
    write_file(path, n_bytes, noise(), sync=True)
    flash.read_plain([path], n_bytes)
    warm_s = flash.median_s(lambda: flash.read_plain([path], n_bytes), 3)
    flash.drop_cache(folder)
    cold_s = flash.read_plain([path], n_bytes)
    path.unlink()
    if n_tokens != REDIS_TOKENS:
        return warm_s, cold_s, None
    return warm_s, cold_s, _redis_get(settings.scratch / "redis", n_bytes)


def _redis_get(directory: Path, n_bytes: int) -> float:
    with RedisServer(directory, "no") as server, RedisBytes(server.target.port) as redis:
        redis.set("state", n_bytes, noise())
        return statistics.median(redis.get("state")[1] for _ in range(REPEATS))


def _float(cell: object) -> float:
    return float(cell) if isinstance(cell, int | float) else 0.0
