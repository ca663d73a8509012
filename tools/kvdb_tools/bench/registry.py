"""All scenarios, by name."""

from __future__ import annotations

from kvdb_tools.bench import commands, eviction, session50
from kvdb_tools.bench.scenario import Scenario

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("commands", "PING SET GET HSET against redis-server, by redis-benchmark", commands.run),
        Scenario("session50", "a 50-step session: bytes against whole-state files, FORK at 100 and 16,000 tokens",
                 session50.run),
        Scenario("eviction", "simulated: tokens saved by each eviction policy on traces", eviction.run),
    )
}  # fmt: skip
