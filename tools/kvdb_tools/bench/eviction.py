"""Eviction policies on real traces: which share of all prompt tokens is answered from snapshots under a budget.

A simulation (cachesim.py): no bytes are written. The scores are the store's own functions. `clairvoyant` sees the
future: it evicts what is never used again, then what loses least per byte and second until its next use. It is greedy,
so a little below the true optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvdb.store import score
from kvdb_engine.catalog import open_model
from kvdb_tools.bench.cachesim import F64, CacheSim, Columns, Outcome, Policy, Workload, build_workload
from kvdb_tools.bench.ds4_files import ds4_file_bytes
from kvdb_tools.bench.scenario import MissingError, Result, Settings
from kvdb_tools.traces import read_agent_traces, read_mooncake

GB = 1e9
BUDGETS_GB = (4, 16, 64)
# All sessions at once: spread out, only a few compete for the budget at any time, and every policy keeps nearly all.
SPACING_S = 0.0
EVERY_TOKENS = 10240  # ds4's distance between continued checkpoints
MOONCAKE = "mooncake_synthetic.jsonl.gz"


def lru(columns: Columns, now: float) -> F64:
    """Least recently used."""
    return columns.used


def lfu(columns: Columns, now: float) -> F64:
    """Fewest decayed hits, then least recently used."""
    return score.decayed_hits(columns.hits, now - columns.used) + 1e-12 * columns.used


def ttl(columns: Columns, now: float) -> F64:
    """Nearest to its expiry; all live equally long, so this is first in, first out."""
    return columns.created


def ds4(columns: Columns, now: float) -> F64:
    """ds4's score of the whole state."""
    return score.ds4_score(score.decayed_hits(columns.hits, now - columns.used), columns.n_tokens, columns.total)


def value(columns: Columns, now: float) -> F64:
    """The store's `value`."""
    idle_s = now - columns.used
    return score.value(
        score.decayed_hits(columns.hits, idle_s),
        idle_s,
        columns.children,
        (columns.children == 0).astype(np.float64),
        columns.n_tokens - columns.covered,
        columns.freed,
    )


def clairvoyant(columns: Columns, now: float) -> F64:
    """Sees when each snapshot would be used next."""
    is_never = np.isinf(columns.next_use)
    wait_s = np.where(is_never, 1.0, columns.next_use - now + 1)
    return np.where(is_never, -columns.freed, (columns.n_tokens - columns.covered) / (wait_s * columns.freed))


POLICIES: Mapping[str, Policy] = {
    "lru": lru,
    "lfu": lfu,
    "ttl": ttl,
    "ds4 score": ds4,
    "value": value,
    "clairvoyant": clairvoyant,
}


def trace_directory(settings: Settings) -> Path:
    """Where the agent traces are: what --traces names, else the three of the repository. Raises MissingError."""
    if settings.traces is not None:
        return settings.traces
    ours = Path(__file__).parents[3] / "tests" / "vectors" / "traces"
    if not ours.is_dir():
        raise MissingError("no traces here: name a directory of agent traces with --traces")
    return ours


def run(settings: Settings) -> Result:
    """Replay every policy at every budget on the agent traces and, where it lies beside them, on Mooncake's."""
    layout = open_model("synthetic:dsv4-flash").layout
    directory = trace_directory(settings)
    agents = read_agent_traces(directory)
    works = {f"{len(agents)} agents": build_workload(agents, layout, spacing_s=SPACING_S, every_tokens=EVERY_TOKENS)}
    for path in (directory / MOONCAKE, directory.parent / MOONCAKE):
        if path.is_file():
            works["mooncake"] = build_workload([read_mooncake(path)], layout, spacing_s=0, every_tokens=EVERY_TOKENS)
            break
    result = Result(
        title="prompt tokens answered from snapshots, %",
        columns=("trace", "GB", *POLICIES, "ds4 files", "no limit"),
    )
    for name, work in works.items():
        unlimited = CacheSim(work, float("inf"), lru).run()
        for budget in BUDGETS_GB:
            settings.say(f"{name}, {budget} GB ...")
            outcomes = play(work, budget * GB)
            files = CacheSim(as_whole_files(work), budget * GB, ds4).run()
            shares = [*(outcome.share for outcome in outcomes.values()), files.share, unlimited.share]
            result.rows.append([name, budget, *(f"{100 * share:.2f}" for share in shares)])
        result.notes.append(
            f"{name}: {len(work.events):,} requests, {work.n_tokens:,} prompt tokens, {len(work.points):,} snapshots, "
            f"{unlimited.peak_bytes / GB:.1f} GB if nothing is evicted"
        )
    result.notes.append("simulated at DeepSeek V4 Flash geometry with the store's scores and sizes, pages shared;")
    result.notes.append("ds4 files: ds4's score over whole-state files of ds4's sizes, nothing shared")
    return result


def play(work: Workload, budget_bytes: float) -> dict[str, Outcome]:
    """Each policy's outcome."""
    return {name: CacheSim(work, budget_bytes, policy).run() for name, policy in POLICIES.items()}


def as_whole_files(work: Workload) -> Workload:
    """The same snapshots as files of their own, of the sizes ds4's format gives them."""
    points = tuple(replace(point, pages=(), tail_bytes=ds4_file_bytes(point.n_tokens)) for point in work.points)
    return replace(work, points=points)
