"""SAMPLE and LOGITS from a stored snapshot: the next token without a forward pass, and without a worker."""

from __future__ import annotations

import time

from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import noise
from kvdb_tools.bench.redis_bytes import RedisBytes
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon

REPEATS = 200
N_TOKENS = 25_000
CLAIMED = ("SAMPLE state", "LOGITS state TOP 20")
MOST_MS = 2


def run(settings: Settings) -> Result:
    """Time the commands on a snapshot of 25,000 tokens; the engine is put to rest first."""
    result = Result("SAMPLE and LOGITS, 129,280 logits", ("command", "p50 ms", "p99 ms", "in the daemon ms"))
    daemon = Daemon(settings.scratch / "kvdb", {"model": flash.model_of(settings)})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        flash.grow(call, "agent", flash.made_up_ids(N_TOKENS), is_new=True)
        call("SNAPSHOT", "agent", "state")
        call("ENGINE", "UNLOAD")
        for words in (
            ("SAMPLE", "state"),
            ("SAMPLE", "state", "COUNT", "16", "TEMPERATURE", "1", "MINP", "0.05"),
            ("SAMPLE", "state", "TOPK", "40", "TOPP", "0.9"),
            ("LOGITS", "state", "TOP", "20"),
            ("LOGITS", "state", "RAW"),
        ):
            call("CONFIG", "RESETSTAT")
            times = []
            for _ in range(REPEATS // 10 if settings.quick else REPEATS):
                began = time.perf_counter()
                call(*words)
                times.append((time.perf_counter() - began) * 1e3)
            inside = flash.daemon_ms(call, words[0].lower())
            result.rows.append([" ".join(words), flash.percentile(times, 0.5), flash.percentile(times, 0.99), inside])
    for row in map(result.named, result.rows):
        if row["command"] in CLAIMED:
            took = row["p50 ms"]
            claim = f"{row['command']}: under {MOST_MS} ms: {took:.2f}"
            result.claims.append((claim, isinstance(took, float) and took < MOST_MS))
    with RedisServer(settings.scratch / "redis", "no") as server, RedisBytes(server.target.port) as redis:
        redis.set("logits", 4 * flash.VOCAB, noise())
        times = [redis.get("logits")[1] * 1e3 for _ in range(REPEATS)]
    result.rows.append(
        ["Redis GET of the logits alone", flash.percentile(times, 0.5), flash.percentile(times, 0.99), None]
    )
    result.notes.append(
        "each call reads and checks the head of the snapshot's tail, 0.5 MB; in the daemon: mean by INFO commandstats"
    )
    return result
