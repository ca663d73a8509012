"""The server's counters as Prometheus text (version 0.0.4)."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvdb import __version__
from kvdb.net.statistics import total_commands

if TYPE_CHECKING:
    from kvdb.net.service import Server

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, str, dict[str, str], float]  # name, type, help, labels, value


def render(server: Server) -> str:
    """All metrics."""
    lines: list[str] = []
    described: set[str] = set()
    for name, kind, text, labels, value in _samples(server):
        if name not in described:
            described.add(name)
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        pairs = ",".join(f'{label}="{_escaped(given)}"' for label, given in labels.items())
        lines.append(f"{name}{{{pairs}}} {value:.17g}" if pairs else f"{name} {value:.17g}")
    return "\n".join(lines) + "\n"


def health(server: Server) -> tuple[bool, str]:
    """Whether the server can do its work, and a word on it: `ok`, or why writes are refused."""
    refusal = server.refusal
    return refusal is None, "ok" if refusal is None else refusal.wire


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def rss_bytes() -> int:
    """Resident memory of this process; its peak where the system tells no more."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _samples(server: Server) -> Iterator[Sample]:
    counts, clients = server.statistics, list(server.clients.values())
    yield "kvdb_info", "gauge", "Version, as a label", {"version": __version__}, 1
    yield "kvdb_uptime_seconds", "gauge", "Seconds since the start", {}, time.time() - server.started
    yield (
        "kvdb_writes_refused",
        "gauge",
        "1 while writes are refused: disk or maxstore full",
        {},
        server.refusal is not None,
    )
    yield "kvdb_connected_clients", "gauge", "Open connections", {}, len(clients)
    yield (
        "kvdb_blocked_clients",
        "gauge",
        "Connections whose command is waiting",
        {},
        sum(c.is_blocked for c in clients),
    )
    yield (
        "kvdb_client_output_bytes",
        "gauge",
        "Replies that wait to be sent",
        {},
        sum(c.output_buffer_bytes for c in clients),
    )
    yield "kvdb_connections_total", "counter", "Connections accepted or refused", {}, counts.connections_received
    yield "kvdb_connections_rejected_total", "counter", "Connections refused", {}, counts.connections_rejected
    yield "kvdb_commands_total", "counter", "Commands run", {}, total_commands(server)
    yield "kvdb_expired_keys_total", "counter", "Keys deleted because their time had come", {}, counts.expired_keys
    yield "kvdb_evicted_keys_total", "counter", "Keys deleted to make room", {}, server.store.budget.evicted_keys
    yield "kvdb_keyspace_hits_total", "counter", "Reads that found their key", {}, counts.keyspace_hits
    yield "kvdb_keyspace_misses_total", "counter", "Reads that did not", {}, counts.keyspace_misses
    yield "kvdb_store_bytes", "gauge", "Bytes that count against maxstore", {}, server.store.used_bytes
    yield "kvdb_store_limit_bytes", "gauge", "maxstore, 0 for none", {}, server.config.number("maxstore")
    yield "kvdb_resident_memory_bytes", "gauge", "Resident memory of the daemon", {}, rss_bytes()
    cpu = os.times()
    yield "kvdb_cpu_seconds_total", "counter", "Processor time of the daemon", {"mode": "user"}, cpu.user
    yield "kvdb_cpu_seconds_total", "counter", "Processor time of the daemon", {"mode": "system"}, cpu.system
    for db in range(server.config.number("databases")):
        if size := server.keyspace.size(db):
            yield "kvdb_keys", "gauge", "Keys of a database", {"db": str(db)}, size
    for word, count in sorted(counts.errors.items()):
        yield "kvdb_errors_total", "counter", "Error replies by their first word", {"word": word}, count
    for (path, status), count in sorted(counts.http_requests.items()):
        labels = {"path": path, "status": str(status)}
        yield "kvdb_http_requests_total", "counter", "HTTP requests answered", labels, count
    for name, model in server.models.items():
        labels = {"model": name}
        yield "kvdb_engine_running", "gauge", "1 while the model's worker runs", labels, model.client.running
        yield "kvdb_engine_requests", "gauge", "Requests the worker has not answered", labels, model.client.pending
        yield "kvdb_engine_starts_total", "counter", "Starts of the worker", labels, model.client.starts
        yield "kvdb_engine_resident_bytes", "gauge", "Live states in the worker", labels, model.client.resident_bytes
    yield from _commands(server)


def _commands(server: Server) -> Iterator[Sample]:
    tops = [bound for name, bound in server.commands.items() if name.isupper()]
    for top in tops:
        for bound in (top, *top.subcommands.values()):
            if bound.calls:
                labels = {"command": bound.command.name.lower()}
                yield "kvdb_command_calls_total", "counter", "Calls of a command", labels, bound.calls
    for top in tops:
        for bound in (top, *top.subcommands.values()):
            if bound.calls:
                labels = {"command": bound.command.name.lower()}
                yield "kvdb_command_seconds_total", "counter", "Seconds spent in a command", labels, bound.seconds
