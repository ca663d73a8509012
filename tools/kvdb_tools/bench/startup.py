"""Start-up with much stored: seconds to the first PONG, and the daemon's memory, beside redis-server."""

from __future__ import annotations

import time
from pathlib import Path

from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import noise
from kvdb_tools.bench.redis_bytes import RedisBytes
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import Cell, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int, disk_bytes, rss_bytes

MiB = 1 << 20
STATE_TOKENS = 100_000
QUICK_BYTES = 5 * 10**8
MOST_S = 1
REDIS_BYTES = 2 * 10**9  # redis-server keeps everything in memory


def run(settings: Settings) -> Result:
    """Fill a directory with states, restart, and do the same with redis-server's append-only file."""
    wanted = QUICK_BYTES if settings.quick else 10**10 if settings.full else 2 * 10**9
    result = Result(
        "start-up", ("server", "GB stored", "fill s", "to PONG s", "after SIGKILL s", "RSS MB", "first RESTORE ms")
    )
    directory = settings.scratch / "kvdb"
    daemon = Daemon(directory, {"model": flash.model_of(settings)})
    with daemon:
        empty_s = daemon.restart()
        empty_rss = daemon.rss_bytes()
        began = time.perf_counter()
        n_states = 0
        with Connection(daemon.target) as connection:
            call = Caller(connection)
            stored = 0
            while stored < wanted:
                flash.grow(call, "agent", flash.made_up_ids(STATE_TOKENS, seed=n_states), is_new=True)
                stored += as_int(call.map("SNAPSHOT", "agent", f"state:{n_states}")["bytes_new"])
                n_states += 1
                settings.say(f"{stored / 1e9:.1f} GB")
        fill_s = time.perf_counter() - began
        ready_s = daemon.restart()
        daemon.kill()
        after_kill_s = daemon.start()
        with Connection(daemon.target) as connection:
            call = Caller(connection)
            call("DBSIZE")
            rss = daemon.rss_bytes()
            began = time.perf_counter()
            call("RESTORE", "state:0", "again")
            restore_ms = (time.perf_counter() - began) * 1e3
        on_disk = disk_bytes(directory)
        result.rows.append(["kvdb, empty", 0, None, empty_s, None, empty_rss / 1e6, None])
        result.rows.append(["kvdb", on_disk / 1e9, fill_s, ready_s, after_kill_s, rss / 1e6, restore_ms])
    slowest = max(ready_s, after_kill_s)
    result.claims.append((f"with {on_disk / 1e9:.1f} GB up in {MOST_S} s: {slowest:.2f}", slowest < MOST_S))
    result.rows.append(_redis(settings.scratch / "redis", min(wanted, REDIS_BYTES)))
    result.notes.append(f"kvdb: states of {STATE_TOKENS:,} tokens; first RESTORE starts the engine worker too")
    result.notes.append("redis-server: values of 1 MiB, appendonly, loaded from its append-only file after SIGKILL")
    return result


def _redis(directory: Path, wanted: int) -> list[Cell]:
    chunk = noise()
    server = RedisServer(directory, "no")
    began = time.perf_counter()
    n_values = wanted // MiB
    with server, RedisBytes(server.target.port) as redis:
        for number in range(n_values):
            redis.set(f"value:{number}", MiB, chunk)
        fill_s = time.perf_counter() - began
    began = time.perf_counter()
    with server:  # entered at the first PONG: until everything is in memory, the answer is -LOADING
        ready_s = time.perf_counter() - began
        rss = rss_bytes(server.pid)
    return ["redis-server", n_values * MiB / 1e9, fill_s, None, ready_s, rss / 1e6, None]
