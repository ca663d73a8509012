"""PREFIX of a long prompt in a store with many snapshots."""

from __future__ import annotations

import time

from kvdb_tools.bench import flash
from kvdb_tools.bench.scenario import Cell, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon, as_int

# The lookup sees tokens and hashes, never rows: a geometry with tiny tails makes room for many snapshots.
MODEL = "synthetic:dsv4-flash,layers=3,head_dim=128,index_dim=64,window=4,vocab=1000,page_tokens=256"
VOCAB = 1000
PROMPT_TOKENS = 1_000_000
SNAPSHOTS = 10_000
FULL_SNAPSHOTS = 100_000
BRANCHES = 64
STEPS = 400
REPEATS = 7
MOST_MS = 20


def run(settings: Settings) -> Result:
    """Store a long state and many that branch off it, then look prompts up."""
    n_tokens = 100_000 if settings.quick else PROMPT_TOKENS
    n_snapshots = 500 if settings.quick else FULL_SNAPSHOTS if settings.full else SNAPSHOTS
    result = Result(
        f"PREFIX, {n_snapshots:,} snapshots stored",
        ("prompt", "tokens", "of them stored", "in the daemon ms", "round trip ms"),
    )
    daemon = Daemon(settings.scratch / "kvdb", {"model": MODEL, "appendfsync": "everysec"})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        ids = flash.made_up_ids(n_tokens, vocab=VOCAB)
        settings.say(f"prefilling {n_tokens:,} tokens ...")
        step = n_tokens // BRANCHES
        for branch in range(BRANCHES):
            flash.grow(call, "trunk", ids[branch * step : (branch + 1) * step], is_new=branch == 0)
            call("SNAPSHOT", "trunk", f"trunk:{branch}")
        flash.grow(call, "trunk", ids[BRANCHES * step :], is_new=False)
        call("SNAPSHOT", "trunk", "trunk:end")
        _branches(settings, call, n_snapshots)
        other = flash.made_up_ids(n_tokens, seed=2, vocab=VOCAB)
        half = ids.copy()
        half[n_tokens // 2 :] = other[n_tokens // 2 :]
        for name, prompt in (("stored whole", ids), ("stored to the half", half), ("not stored", other)):
            result.rows.append([name, n_tokens, *_look_up(call, flash.ids_words(prompt))])
        result.rows.append(["stored whole, ids as words", n_tokens, *_look_up(call, flash.token_words(ids))])
    slowest = max(float(row[3] or 0) for row in result.rows[:3])
    result.claims.append((f"under {MOST_MS} ms in the daemon: {slowest:.1f}", slowest < MOST_MS))
    result.notes.append(
        f"PREFIX IDS bytes; the last row: PREFIX TOKENS n id ... . Round trip: median of {REPEATS}, client"
    )
    result.notes.append("included. In the daemon: mean by INFO commandstats, without reading from the socket")
    return result


def _branches(settings: Settings, call: Caller, n_snapshots: int) -> None:
    """Many snapshots: sessions that go on from snapshots of the trunk, stored side by side so that they share syncs."""
    began = time.perf_counter()
    n_left = n_snapshots - BRANCHES - 1
    for number in range(0, n_left, BRANCHES):
        keys = range(number, min(number + BRANCHES, n_left))
        for key in keys:
            branch = key % BRANCHES
            if number // BRANCHES % STEPS == 0:
                call("RESTORE", f"trunk:{branch}", f"branch:{branch}", "REPLACE")
            # A first token that tells this visit to the trunk's snapshot from the others.
            call("EXTEND", f"branch:{branch}", "TOKENS", 2, number // BRANCHES // STEPS % VOCAB, key % VOCAB)
            call("SNAPSHOT", f"branch:{branch}", f"stored:{key}", "ASYNC")
        for key in keys:
            call("WAITSNAP", f"stored:{key}")
        if number // BRANCHES % 50 == 49:
            settings.say(f"{number:,} snapshots, {time.perf_counter() - began:.0f} s")


def _look_up(call: Caller, words: list[bytes]) -> list[Cell]:
    call("CONFIG", "RESETSTAT")
    times = []
    found = 0
    for _ in range(REPEATS):
        began = time.perf_counter()
        reply = call("PREFIX", *words)
        times.append((time.perf_counter() - began) * 1e3)
        if isinstance(reply, dict):
            found = as_int(reply["tokens"])
        elif reply is not None:
            raise CommandError(f"PREFIX answered {reply!r}")
    return [found, flash.daemon_ms(call, "prefix"), flash.percentile(times, 0.5)]
