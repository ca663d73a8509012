"""A session of 50 steps, a snapshot after each: what it takes on the disk, and what a fork costs.

Beside it: the same 50 states as whole-state files in ds4's layout (DSV4 version 1, really written), and the least that
any store could take that shares every row once: unique rows plus what each state needs for itself.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

from kvdb_engine.catalog import open_model
from kvdb_protocol.dsv4 import Dsv4Header, Dsv4Layer, Dsv4Payload, encode_payload, frontier_shape
from kvdb_protocol.layout import Layout, Part
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int, disk_bytes
from kvdb_tools.demo.text import demo_text

STEPS = 50
STEP_TOKENS = 60
FORK_TOKENS = (100, 16_000)
QUICK_FORK_TOKENS = (100, 1_000)
FORKS = 50
QUICK_FORKS = 10


def run(settings: Settings) -> Result:
    """Run the session and the forks on one daemon."""
    layout = open_model(settings.model).layout
    result = Result(title="a session of 50 steps, 3,000 tokens", columns=("what", "value", "unit", "x kvdb"))
    daemon = Daemon(settings.scratch / "data", {"model": settings.model})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        ids = [as_int(token) for token in call.list("TOKENIZE", settings.model, demo_text())]
        before = disk_bytes(daemon.directory)
        counts, records, times = _session(settings, call, ids)
        on_disk = disk_bytes(daemon.directory) - before
        forks = _forks(settings, call, ids)
    whole = _write_whole_states(settings.scratch / "whole", layout, counts)
    least = unique_bytes(layout, counts)
    mean = statistics.fmean(times)
    result.rows += [
        ["records kvdb wrote", records, "bytes", 1.0],
        ["growth of kvdb's directory", on_disk, "bytes", on_disk / records],
        [f"{len(counts)} whole-state files, ds4 layout", whole, "bytes", whole / records],
        ["unique rows + windows, frontiers, logits", least, "bytes", least / records],
        ["SNAPSHOT of a step, mean", mean * 1e3, "ms", None],
    ]
    for name, seconds in forks.items():
        result.rows.append([f"FORK of {name}, median", seconds * 1e3, "ms", None])
    result.notes.append(
        f"model {settings.model}, {len(counts)} steps of {STEP_TOKENS} tokens, pages of {layout.page_tokens}"
    )
    result.notes.append("FORK is durable when it is answered: its time is one synced commit")
    sizes = {"kvdb": [on_disk / 1e6], "whole-state files": [whole / 1e6], "unique bytes": [least / 1e6]}
    result.bars = Bars("MB on disk", [f"{len(counts)} steps"], sizes)
    return result


def _session(settings: Settings, call: Caller, ids: list[int]) -> tuple[list[int], int, list[float]]:
    """Grow a session step by step; returns the token counts, the record bytes written and the time of each SNAPSHOT."""
    counts, times = [], []
    records = 0
    steps = 10 if settings.quick else STEPS
    for step in range(steps):
        part = ids[step * STEP_TOKENS : (step + 1) * STEP_TOKENS]
        call("PREFILL" if step == 0 else "EXTEND", "agent", "TOKENS", len(part), *part)
        began = time.perf_counter()
        reply = call.map("SNAPSHOT", "agent", f"step:{step}")
        times.append(time.perf_counter() - began)
        counts.append(as_int(reply["tokens"]))
        records += as_int(reply["bytes_new"])
    settings.say(f"{steps} steps, {counts[-1]} tokens")
    return counts, records, times


def _forks(settings: Settings, call: Caller, ids: list[int]) -> dict[str, float]:
    """Median seconds of FORK of snapshots and live sessions of different lengths."""
    sources = {}
    for n_tokens in QUICK_FORK_TOKENS if settings.quick else FORK_TOKENS:
        part = (ids * (n_tokens // len(ids) + 1))[:n_tokens]
        settings.say(f"prefilling {n_tokens:,} tokens for the forks ...")
        call("PREFILL", f"long:{n_tokens}", "TOKENS", n_tokens, *part)
        call("SNAPSHOT", f"long:{n_tokens}", f"snap:{n_tokens}")
        sources[f"a snapshot, {n_tokens:,} tokens"] = f"snap:{n_tokens}"
        sources[f"a session, {n_tokens:,} tokens"] = f"long:{n_tokens}"
    times: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(QUICK_FORKS if settings.quick else FORKS):
        # One of each in turn, so that whatever else the machine does hits all of them.
        for name, source in sources.items():
            began = time.perf_counter()
            call("FORK", source, f"fork:{source}:{number}")
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def _write_whole_states(directory: Path, layout: Layout, counts: list[int]) -> int:
    """Write a whole-state file for each token count; returns the bytes they take on the disk."""
    directory.mkdir()
    for number, n_tokens in enumerate(counts):
        with (directory / f"{number}.payload").open("wb") as file:
            file.writelines(encode_payload(whole_state(layout, n_tokens)))
    return disk_bytes(directory)


def whole_state(layout: Layout, n_tokens: int) -> Dsv4Payload:
    """A whole state in ds4's layout: its arrays have the right shapes; their values do not matter for a size."""
    window_rows = min(n_tokens, layout.window)
    head = Dsv4Header(
        version=1,
        context=layout.context,
        prefill_chunk=min(layout.context, 2048),
        ring_rows=layout.window,
        window=layout.window,
        compressed_capacity=layout.context // 4 + 2,
        n_tokens=n_tokens,
        n_layers=len(layout.ratios),
        head_dim=layout.head_dim,
        index_dim=layout.index_dim,
        vocab=layout.vocab,
        window_rows=window_rows,
    )

    def floats(*shape: int) -> memoryview:
        return memoryview(bytes(4 * math.prod(shape)))

    layers = []
    for ratio in layout.ratios:
        window = floats(window_rows, layout.head_dim)
        if not ratio:
            layers.append(Dsv4Layer(0, window))
            continue
        rows = n_tokens // ratio
        frontier = frontier_shape(ratio, layout.head_dim)
        parts = [floats(rows, layout.head_dim), floats(*frontier), floats(*frontier)]
        if ratio == 4:
            frontier = frontier_shape(ratio, layout.index_dim)
            parts += [floats(rows, layout.index_dim), floats(*frontier), floats(*frontier)]
        layers.append(Dsv4Layer(ratio, window, *parts))
    return Dsv4Payload(head, floats(n_tokens), floats(layout.vocab), tuple(layers))


def unique_bytes(layout: Layout, counts: list[int]) -> int:
    """Every row once, packed, and the window, frontier and logits of each state: no store of them needs less."""
    longest = max(counts)
    rows = sum(
        layout.section_bytes(stream, stream.codec, longest // layout.ratios[stream.layer]) for stream in layout.streams
    )
    own = [part for part in layout.tail_sections if part.part not in (Part.COMPRESSED, Part.INDEX)]
    tails = sum(
        4 * layout.vocab + sum(layout.section_bytes(part, part.codec, layout.tail_rows(part, n)) for part in own)
        for n in counts
    )
    return 4 * longest + rows + tails
