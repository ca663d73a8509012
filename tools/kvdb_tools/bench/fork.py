"""FORK of a long state: its time, durable when answered, and the bytes a fork takes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import ds4_file_bytes
from kvdb_tools.bench.scenario import Cell, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, disk_bytes

FORKS = 10_000
QUICK_FORKS = 500
BATCH = 100
MOST_MS = 1
BLOCK = 4096
FLOOR_BYTES = 4 << 20


def run(settings: Settings) -> Result:
    """Fork a snapshot and a live session one by one, then in commands of a hundred."""
    n_tokens = flash.sizes_of(settings)[-1]
    n_forks = QUICK_FORKS if settings.quick else FORKS
    directory = settings.scratch / "kvdb"
    result = Result(
        f"FORK at {n_tokens:,} tokens",
        ("what", "forks", "p50 ms", "p99 ms", "in the daemon p50", "p99", "bytes a fork"),
    )
    daemon = Daemon(directory, {"model": flash.model_of(settings)})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        settings.say(f"prefilling {n_tokens:,} tokens ...")
        flash.grow(call, "agent", flash.made_up_ids(n_tokens), is_new=True)
        call("SNAPSHOT", "agent", "state")
        floor: list[float] = []
        for source in ("state", "agent"):
            what = "of the snapshot" if source == "state" else "of the live session"
            settings.say(f"{n_forks:,} forks {what} ...")
            result.rows.append([what, *_forks(call, directory, source, n_forks, floor)])
        began = time.perf_counter()
        before = disk_bytes(directory)
        for number in range(0, n_forks, BATCH):
            call("FORK", "state", *(f"many:{number + one}" for one in range(BATCH)))
        each = (time.perf_counter() - began) / n_forks * 1e3
        grown = (disk_bytes(directory) - before) / n_forks
        result.rows.append([f"of the snapshot, {BATCH} a command", n_forks, each, None, None, None, grown])
    result.rows.append(["floor: overwrite 4 KiB + fdatasync", len(floor), flash.percentile(floor, 0.5) * 1e3,
                        flash.percentile(floor, 0.99) * 1e3, None, None, None])  # fmt: skip
    result.rows.append(["a copy of ds4's file would be", None, None, None, None, None, float(ds4_file_bytes(n_tokens))])
    for row in map(result.named, result.rows[:2]):
        for share in ("in the daemon p50", "p99"):
            took = row[share]
            claim = f"FORK {row['what']}, {share}: under {MOST_MS} ms: {took:.2f}"
            result.claims.append((claim, isinstance(took, float) and took < MOST_MS))
    result.notes.append("one client, one fork at a time, each on disk when it is answered (in the change log);")
    result.notes.append("in the daemon: ms by SLOWLOG, syncs included. bytes: growth of the directory")
    return result


def _forks(call: Caller, directory: Path, source: str, n_forks: int, floor: list[float]) -> list[Cell]:
    flash.log_commands(call, n_forks)
    before = disk_bytes(directory)
    times = []
    other = _file_of(directory.with_name("floor"), FLOOR_BYTES)
    for number in range(n_forks):
        began = time.perf_counter()
        call("FORK", source, f"fork:{source}:{number}")
        times.append((time.perf_counter() - began) * 1e3)
        if number % 20 == 0:
            # In between, so that whatever else the disk has to do hits both.
            floor.append(_sync_s(other, len(floor) * BLOCK % FLOOR_BYTES))
    os.close(other)
    grown = (disk_bytes(directory) - before) / n_forks
    inside = flash.logged_ms(call, "fork")
    return [n_forks, *(flash.percentile(column, share) for column in (times, inside) for share in (0.5, 0.99)), grown]


def _file_of(path: Path, n_bytes: int) -> int:
    """A descriptor of a file of this length, all of it written."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(handle, bytes(n_bytes), 0)
    os.fsync(handle)
    return handle


def _sync_s(handle: int, offset: int) -> float:
    """Seconds for what nothing durable can do without: one small write and its sync, here into a file that is there."""
    began = time.perf_counter()
    os.pwrite(handle, bytes(BLOCK), offset)
    os.fdatasync(handle)
    return time.perf_counter() - began
