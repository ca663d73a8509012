"""Replays agent traces through the daemon, a snapshot for each request, and counts every byte.

The session follows the trace: a prompt that continues the last one is appended to it, any other goes through PREFILL,
which finds the longest stored prefix; the answer is appended, then the session is snapshotted. The baseline is ds4's
way, a whole-state file for each of the same snapshots, in bytes by its format and in seconds by a measured write rate.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

import numpy as np

from kvdb_engine.catalog import open_model
from kvdb_protocol.layout import Layout, Part
from kvdb_tools.bench import flash
from kvdb_tools.bench.ds4_files import ds4_file_bytes, noise, write_file
from kvdb_tools.bench.eviction import trace_directory
from kvdb_tools.bench.scenario import Bars, Cell, Result, Settings
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_int, disk_bytes
from kvdb_tools.traces import Trace, read_agent_traces, token_ids

PROBE_BYTES = 10**9
_TOKEN_BYTES = 10  # an id, and the synthetic tokenizer's six bytes of text


@dataclass(slots=True)
class Tally:
    """What one trace, or all of them, came to. Bytes and seconds; `n` are counts."""

    n_snapshots: int = 0
    n_tokens: int = 0
    unique_rows: int = 0
    unique_tails: int = 0
    records: int = 0
    written: int = 0
    on_disk: int = 0
    snapshot_s: float = 0.0
    prefill_s: float = 0.0
    whole_files: int = 0
    reused: int = 0
    prompt_tokens: int = 0

    def add(self, other: Tally) -> None:
        """Sum up."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def cells(self, name: str) -> list[Cell]:
        """A row of the table."""
        unique = self.unique_rows + self.unique_tails
        return [
            *(name, self.n_snapshots, self.whole_files / 1e9, self.written / 1e9, self.on_disk / 1e9, unique / 1e9),
            *(self.whole_files / self.written, self.written / unique, self.written / max(self.unique_rows, 1)),
            *(self.snapshot_s, self.prefill_s, 100 * self.reused / self.prompt_tokens),
        ]


def run(settings: Settings) -> Result:
    """Replay every trace on a fresh directory, which is deleted afterwards: all together would fill a disk."""
    traces = read_agent_traces(trace_directory(settings))
    sizes = ("trace", "snapshots", "ds4 GB", "written GB", "on disk GB", "unique GB")
    ratios = ("ds4 / written", "written / unique", "written / rows", "SNAPSHOT s", "PREFILL s", "reused %")
    result = Result("agent traces, a snapshot a request", (*sizes, *ratios))
    total = Tally()
    for trace in traces[:1] if settings.quick else traces:
        tally = _replay(settings, trace)
        total.add(tally)
        result.rows.append(tally.cells(trace.name))
        settings.say(f"{trace.name}: {tally.n_snapshots} snapshots, {tally.written / 1e9:.2f} GB written")
    result.rows.append(total.cells("all"))
    rate = {}
    for sync in (False, True):
        path = settings.scratch / "probe"
        rate[sync] = PROBE_BYTES / write_file(path, PROBE_BYTES, noise(), sync=sync)
        path.unlink()
    per_file = total.whole_files / total.n_snapshots
    result.notes += [
        f"ds4's files, {per_file / 1e9:.2f} GB each, would take {total.whole_files / rate[False]:,.0f} s without and "
        f"{total.whole_files / rate[True]:,.0f} s with, at {rate[False] / 1e9:.2f} and {rate[True] / 1e9:.2f} GB/s",
        "written: what daemon and worker handed to the block layer, index and journal included; unique: every row,",
        "token id and text once, and each snapshot's own window, frontier and logits; rows: without the latter",
    ]
    result.bars = Bars(
        "GB",
        [f"{total.n_snapshots} snapshots"],
        {"ds4 files": [total.whole_files / 1e9], "kvdb written": [total.written / 1e9]},
    )
    return result


def _replay(settings: Settings, trace: Trace) -> Tally:
    directory = settings.scratch / trace.name
    tally = Tally()
    prefixes: set[int] = set()
    daemon = Daemon(directory, {"model": flash.model_of(settings)})
    with daemon, Connection(daemon.target) as connection:
        call = Caller(connection)
        layout = open_model(flash.model_of(settings)).layout
        before: flash.U32 = np.zeros(0, np.uint32)
        for number in range(len(trace.requests)):
            prompt, answer = token_ids(trace, number, layout.vocab)
            began = time.perf_counter()
            n_before = len(before)
            if n_before and n_before <= len(prompt) and np.array_equal(prompt[:n_before], before):
                flash.grow(call, "agent", prompt[n_before:], is_new=False)
                tally.reused += n_before
            else:
                reply = call.map("PREFILL", "agent", *flash.ids_words(prompt))
                tally.reused += as_int(reply["reused"])
            flash.grow(call, "agent", answer, is_new=False)
            tally.prefill_s += time.perf_counter() - began
            began = time.perf_counter()
            reply = call.map("SNAPSHOT", "agent", f"step:{number}")
            tally.snapshot_s += time.perf_counter() - began
            tally.records += as_int(reply["bytes_new"])
            before = np.concatenate([prompt, answer])
            _count_unique(tally, layout, before, prefixes)
            tally.prompt_tokens += len(prompt)
            tally.n_snapshots += 1
            tally.whole_files += ds4_file_bytes(len(before))
        tally.written = flash.io_written([daemon.pid, *flash.children_of(daemon.pid)]) or tally.records
        tally.on_disk = disk_bytes(directory)
    shutil.rmtree(directory)
    return tally


def _count_unique(tally: Tally, layout: Layout, ids: flash.U32, prefixes: set[int]) -> None:
    """Add what this state has that no earlier one had, counted in groups of 128 tokens."""
    group = 128
    n_new = 0
    step = ids[: len(ids) // group * group].reshape(-1, group)
    key = 0
    for one in step:
        key = hash((key, one.tobytes()))
        if key not in prefixes:
            prefixes.add(key)
            n_new += group
    n_new += len(ids) % group
    per_group = sum(
        layout.section_bytes(stream, stream.codec, group // layout.ratios[stream.layer]) for stream in layout.streams
    )
    tally.unique_rows += n_new * per_group // group + _TOKEN_BYTES * n_new
    own = [part for part in layout.tail_sections if part.part not in (Part.COMPRESSED, Part.INDEX)]
    tails = sum(layout.section_bytes(part, part.codec, layout.tail_rows(part, len(ids))) for part in own)
    tally.unique_tails += tails + 4 * layout.vocab
