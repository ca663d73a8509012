"""All scenarios, by name."""

from __future__ import annotations

from kvdb_tools.bench import (
    commands,
    compression,
    engine,
    eviction,
    fork,
    http_choices,
    http_replay,
    prefix,
    reliability,
    replay,
    restore,
    sample,
    session50,
    snapshot,
    startup,
    switch,
    values,
)
from kvdb_tools.bench.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("commands", "PING SET GET HSET against redis-server, by redis-benchmark", commands.run),
        Scenario("values", "SET and GET of 1 to 256 MiB against redis-server; memory with 1 GiB and unread replies",
                 values.run),
        Scenario("session50", "a 50-step session: bytes against whole-state files, FORK at 100 and 16,000 tokens",
                 session50.run),
        Scenario("snapshot", "SNAPSHOT of a step at growing context, against whole-state files", snapshot.run),
        Scenario("restore", "RESTORE warm and cold, against plain reads, whole-state files and Redis", restore.run),
        Scenario("fork", "10,000 forks of a long state: time and bytes", fork.run),
        Scenario("prefix", "PREFIX of a prompt of 1,000,000 tokens among many snapshots", prefix.run),
        Scenario("sample", "SAMPLE and LOGITS from a stored snapshot of 129,280 logits", sample.run),
        Scenario("startup", "seconds to PONG and memory with gigabytes stored", startup.run),
        Scenario("replay", "agent traces, a snapshot a request: bytes against whole-state files", replay.run),
        Scenario("reliability", "a task of N steps: success without going back and with k tries a step",
                 reliability.run),
        Scenario("switch", "50 sessions of 4,096 tokens round-robin: RESTORE against prefill", switch.run),
        Scenario("choices", "8 choices of an 8k prompt over HTTP, against one", http_choices.run),
        Scenario("http", "agent traces over HTTP: share of prompt tokens served from states", http_replay.run),
        Scenario("compression", "bytes and quality of each layer of compression: rows, rounding, weights",
                 compression.run),
        Scenario("engine", "the engine alone: prefill and decode, with and without a fast BLAS", engine.run),
        Scenario("eviction", "simulated: tokens saved by each eviction policy on traces", eviction.run),
    )
}  # fmt: skip
