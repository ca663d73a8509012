"""SNAPSHOT of one agent step at growing context: its time and bytes, which should not grow with it."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import ds4_file_bytes, noise, write_file
from kvdb_tools.bench.redis_bytes import RedisBytes
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int

REPEATS = 7


def run(settings: Settings) -> Result:
    """Grow sessions, snapshot steps of 704 tokens, and write the same bytes in other ways."""
    columns = ("tokens", "first ms", "first MB", "step ms", "step MB", "plain ms", "Redis always", "Redis no")
    result = Result("SNAPSHOT of a step of 704 tokens", (*columns, "ds4 MB", "ds4 ms", "ds4+fsync ms"))
    chunk = noise()
    for n_tokens in flash.sizes_of(settings):
        settings.say(f"{n_tokens:,} tokens ...")
        first_s, first_bytes, steps = _steps(settings, n_tokens, chunk)
        step_s, step_bytes, plain_s = (statistics.median(column) for column in zip(*steps, strict=True))
        step_bytes = int(step_bytes)
        redis_s = [_redis_set(settings, mode, step_bytes, chunk) for mode in ("always", "no")]
        whole = ds4_file_bytes(n_tokens)
        ds4_s = _whole_files(settings.scratch / "ds4" / "state.kv", whole, chunk)
        result.rows.append(
            [
                *(n_tokens, first_s * 1e3, first_bytes / 1e6, step_s * 1e3, step_bytes / 1e6, plain_s * 1e3),
                *(seconds * 1e3 for seconds in redis_s),
                whole / 1e6,
                *(seconds * 1e3 for seconds in ds4_s),
            ]
        )
    result.notes.append(f"step: median of {REPEATS}, durable when answered; first: the whole context at once")
    result.notes.append("plain: append of the step's bytes to a file, fdatasync. Redis: SET of the step's bytes, ms by")
    result.notes.append("appendfsync. ds4: a whole-state file renamed into place, without fsync as ds4 does, and with")
    times = {"kvdb": [row[3] for row in result.rows], "ds4 file": [row[9] for row in result.rows]}
    result.bars = Bars(
        "ms",
        [f"{row[0]:,} tokens" for row in result.rows],
        {name: [float(value) for value in values if isinstance(value, float)] for name, values in times.items()},
    )
    return result


def _steps(settings: Settings, n_tokens: int, chunk: bytes) -> tuple[float, int, list[tuple[float, int, float]]]:
    """(seconds, bytes) of the first snapshot, and of each step's after it with the seconds of a plain write beside."""
    ids = flash.made_up_ids(n_tokens + (REPEATS + 1) * flash.STEP_TOKENS)
    daemon = Daemon(settings.scratch / f"kvdb-{n_tokens}", {"model": flash.model_of(settings)})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        flash.grow(call, "agent", ids[:n_tokens], is_new=True)
        began = time.perf_counter()
        first = call.map("SNAPSHOT", "agent", "step:0")
        first_s = time.perf_counter() - began
        steps = []
        for step in range(REPEATS):
            at = n_tokens + step * flash.STEP_TOKENS
            flash.grow(call, "agent", ids[at : at + flash.STEP_TOKENS], is_new=False)
            began = time.perf_counter()
            reply = call.map("SNAPSHOT", "agent", f"step:{step + 1}")
            step_s = time.perf_counter() - began
            n_bytes = as_int(reply["bytes_new"])
            # In turns, so that whatever else the disk has to do hits both.
            steps.append((step_s, n_bytes, append_plain(settings.scratch / "plain", n_bytes, chunk)))
    return first_s, as_int(first["bytes_new"]), steps


def append_plain(path: Path, n_bytes: int, chunk: bytes) -> float:
    """Append bytes to a file and make them durable: less nobody can do. Returns the seconds."""
    began = time.perf_counter()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        left = n_bytes
        while left:
            left -= os.write(handle, memoryview(chunk)[: min(left, len(chunk))])
        os.fdatasync(handle)
    finally:
        os.close(handle)
    return time.perf_counter() - began


def _whole_files(path: Path, n_bytes: int, chunk: bytes) -> list[float]:
    """Seconds for a whole-state file without and with fsync: the better of two, in turns; of one if it is large."""
    path.parent.mkdir(exist_ok=True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for sync in (False, True, False, True)[: 4 if n_bytes < 4e9 else 2]:
        times[sync].append(write_file(path, n_bytes, chunk, sync=sync))
        # Otherwise the next one would pay for what this one left to be written.
        flash.drop_cache(path.parent)
        path.unlink()
    return [min(times[False]), min(times[True])]


def _redis_set(settings: Settings, appendfsync: str, n_bytes: int, chunk: bytes) -> float:
    """Median seconds of a SET of the step's bytes."""
    with (
        RedisServer(settings.scratch / f"redis-{appendfsync}-{n_bytes}", appendfsync) as server,
        RedisBytes(server.target.port) as redis,
    ):
        return statistics.median(redis.set(f"step:{number}", n_bytes, chunk) for number in range(REPEATS))
