"""Many named sessions on one machine: switching from one to the next is a RESTORE, beside prefilling its context."""

from __future__ import annotations

import time

import kvdb
from kvdb_engine.catalog import open_model
from kvdb_tools.bench import flash
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.daemon import Daemon

# Less than one state: the engine holds only the session it works on, so every switch really reads the other one.
CACHE_BYTES = 1
_TEXT = "Project {n}. The notes of the day, page {page}: we walked along the shore and counted the boats. "


def run(settings: Settings) -> Result:
    """Fill the sessions, then go round and round, one token at each stop."""
    n_sessions, n_tokens, rounds = (8, 1024, 3) if settings.quick else (50, 4096, 4)
    tokenizer = open_model(settings.model).tokenizer
    result = Result(f"{n_sessions} sessions of {n_tokens:,} tokens, round-robin", ("what", "p50 ms", "p99 ms"))
    daemon = Daemon(settings.scratch / "kvdb", {"model": settings.model, "engine-cache-bytes": str(CACHE_BYTES)})
    prefill, restore, inside, first = [], [], [], []
    with daemon, kvdb.Client("127.0.0.1", daemon.port) as client:
        for number in range(n_sessions):
            text = "".join(_TEXT.format(n=number, page=page) for page in range(n_tokens // 16))
            prefill.append(client.prefill("work", tokenizer.encode(text)[:n_tokens], reuse="NO").ms)
            client.snapshot("work", f"project:{number}")
            if number % 10 == 9:
                settings.say(f"{number + 1} sessions are filled")
        for turn in range(rounds):
            for number in range(n_sessions):
                began = time.perf_counter()
                done = client.restore(f"project:{number}", "work", replace=True)
                restore.append((time.perf_counter() - began) * 1e3)
                inside.append(done.ms)
                client.generate("work", 1, seed=turn)
                first.append((time.perf_counter() - began) * 1e3)
                if done.recomputed:
                    raise RuntimeError("a switch computed tokens again")
    measured = {
        "switch (RESTORE)": restore,
        "in the daemon": inside,
        "switch and first token": first,
        "prefill": prefill,
    }
    for name, times in measured.items():
        result.rows.append([name, flash.percentile(times, 0.5), flash.percentile(times, 0.99)])
    typical = flash.percentile(prefill, 0.5) / flash.percentile(restore, 0.5)
    slowest = flash.percentile(prefill, 0.5) / flash.percentile(restore, 0.99)
    claim = f"prefilling takes longer than the slowest 1 % of switches ({slowest:,.0f} times; {typical:,.0f} times p50)"
    result.claims.append((claim, slowest > 1))
    result.bars = Bars(
        "ms", ["p50", "p99"], {str(row[0]): [float(row[1] or 0), float(row[2] or 0)] for row in result.rows}
    )
    return result
