"""INFO: facts and counters, in Redis' sections and with Redis' field names where it has them."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvdb import __version__
from kvdb.commands.connection import REDIS_VERSION
from kvdb.commands.registry import handler
from kvdb.net.metrics import rss_bytes
from kvdb.net.statistics import total_commands
from kvdb_protocol.replies import Reply, Verbatim

if TYPE_CHECKING:
    from asyncio import Future

    from kvdb.net.client import Client
    from kvdb.net.service import Server

Fields = dict[str, object]


def human(n_bytes: int) -> str:
    """`1.50M`, as Redis prints sizes for people."""
    size = float(n_bytes)
    for unit in "BKMGT":
        if size < 1024 or unit == "T":
            return f"{size:.2f}{unit}"
        size /= 1024
    return str(n_bytes)


def _server(server: Server) -> Fields:
    up = int(time.time() - server.started)
    return {
        "redis_version": REDIS_VERSION,
        "redis_mode": "standalone",
        "kvdb_version": __version__,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64,
        "multiplexing_api": "uvloop",
        "python_version": platform.python_version(),
        "process_id": os.getpid(),
        "run_id": server.run_id,
        "tcp_port": server.config.number("port"),
        "server_time_usec": time.time_ns() // 1000,
        "uptime_in_seconds": up,
        "uptime_in_days": up // 86400,
        "hz": server.config.number("hz"),
        "configured_hz": server.config.number("hz"),
        "config_file": server.config.file or "",
        "data_directory": server.directory,
    }


def _clients(server: Server) -> Fields:
    clients = server.clients.values()
    return {
        "connected_clients": len(clients),
        "cluster_connections": 0,
        "maxclients": server.config.number("maxclients"),
        "client_recent_max_input_buffer": max((c.parser.buffered_bytes for c in clients), default=0),
        "client_recent_max_output_buffer": max((c.output_buffer_bytes for c in clients), default=0),
        "blocked_clients": sum(c.is_blocked for c in clients),
        "tracking_clients": 0,
    }


def _memory(server: Server) -> Fields:
    rss = rss_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "used_memory": rss,
        "used_memory_human": human(rss),
        "used_memory_rss": rss,
        "used_memory_rss_human": human(rss),
        "used_memory_peak": max(peak, rss),
        "used_memory_peak_human": human(max(peak, rss)),
        "maxmemory": server.config.number("maxmemory"),
        "maxmemory_human": human(server.config.number("maxmemory")),
        "maxmemory_policy": server.config.text("maxmemory-policy"),
        "mem_allocator": "python",
    }


def _persistence(server: Server) -> Fields:
    return {
        "loading": 0,
        "async_loading": 0,
        "rdb_changes_since_last_save": int(server.keyspace.is_dirty),
        "rdb_bgsave_in_progress": 0,
        "rdb_last_save_time": int(server.last_save),
        "rdb_last_bgsave_status": "ok",
        "aof_enabled": 1,
        "aof_rewrite_in_progress": 0,
        "aof_last_write_status": "ok" if server.store.write_error is None else "err",
        "appendfsync": server.config.text("appendfsync"),
        "index_status": _index_status(server.store.checking),
    }


def _index_status(checking: Future[str] | None) -> str:
    """ok; checking, while a large index is checked; or what is wrong with it."""
    if checking is None:
        return "ok"
    return (checking.result() or "ok") if checking.done() else "checking"


def _stats(server: Server) -> Fields:
    counts = server.statistics
    clients = server.clients.values()
    return {
        "total_connections_received": counts.connections_received,
        "total_commands_processed": total_commands(server),
        "instantaneous_ops_per_sec": counts.ops_per_second,
        "total_net_input_bytes": counts.input_bytes + sum(c.input_bytes for c in clients),
        "total_net_output_bytes": counts.output_bytes + sum(c.output_bytes for c in clients),
        "rejected_connections": counts.connections_rejected,
        "expired_keys": counts.expired_keys,
        "evicted_keys": server.store.budget.evicted_keys,
        "keyspace_hits": counts.keyspace_hits,
        "keyspace_misses": counts.keyspace_misses,
        "pubsub_channels": len(server.pubsub.channels),
        "pubsub_patterns": len(server.pubsub.patterns),
        "client_output_buffer_limit_disconnections": counts.output_limit_disconnections,
        "total_error_replies": sum(counts.errors.values()),
        "total_http_requests": counts.http_requests.total(),
        "acl_access_denied_auth": counts.auth_failures,
    }


def _replication(server: Server) -> Fields:
    return {"role": "master", "connected_slaves": 0, "master_replid": server.run_id, "master_repl_offset": 0}


def _cpu(server: Server) -> Fields:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "used_cpu_sys": f"{own.ru_stime:.6f}",
        "used_cpu_user": f"{own.ru_utime:.6f}",
        "used_cpu_sys_children": f"{children.ru_stime:.6f}",
        "used_cpu_user_children": f"{children.ru_utime:.6f}",
    }


def _commandstats(server: Server) -> Fields:
    fields: Fields = {}
    for name, top in sorted(server.commands.items()):
        if not name.isupper():
            continue
        for bound in (top, *top.subcommands.values()):
            if bound.calls or bound.rejected_calls:
                fields["cmdstat_" + bound.command.name.lower().replace(" ", "|")] = (
                    f"calls={bound.calls},usec={int(bound.seconds * 1e6)},"
                    f"usec_per_call={bound.seconds * 1e6 / max(bound.calls, 1):.2f},"
                    f"rejected_calls={bound.rejected_calls},failed_calls={bound.failed_calls}"
                )
    return fields


def _errorstats(server: Server) -> Fields:
    return {f"errorstat_{word}": f"count={count}" for word, count in sorted(server.statistics.errors.items())}


def _cluster(server: Server) -> Fields:
    return {"cluster_enabled": 0}


def _keyspace(server: Server) -> Fields:
    sizes = {db: server.keyspace.size(db) for db in range(server.config.number("databases"))}
    return {f"db{db}": f"keys={size},expires=0,avg_ttl=0" for db, size in sizes.items() if size}


_DEFAULT: dict[str, Callable[[Server], Fields]] = {
    "server": _server,
    "clients": _clients,
    "memory": _memory,
    "persistence": _persistence,
    "stats": _stats,
    "replication": _replication,
    "cpu": _cpu,
    "errorstats": _errorstats,
    "cluster": _cluster,
    "keyspace": _keyspace,
}
_TITLES = {"cpu": "CPU"}
SECTIONS = _DEFAULT | {"commandstats": _commandstats}


@handler("INFO")
def info(client: Client, args: list[bytes]) -> Reply:
    """The sections asked for; `default`, `all` and `everything` are groups of them."""
    chosen: dict[str, Callable[[Server], Fields]] = {}
    for word in [arg.decode("utf-8", "replace").lower() for arg in args] or ["default"]:
        if word in ("all", "everything"):
            chosen |= SECTIONS
        elif word == "default":
            chosen |= _DEFAULT
        elif word in SECTIONS:
            chosen[word] = SECTIONS[word]
    parts = []
    for name, make in SECTIONS.items():
        if name in chosen:
            lines = [f"# {_TITLES.get(name, name.capitalize())}"]
            lines += [f"{field}:{value}" for field, value in make(client.server).items()]
            parts.append("".join(line + "\r\n" for line in lines))
    return Verbatim("\r\n".join(parts))
