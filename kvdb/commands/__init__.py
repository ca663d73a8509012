"""The commands: one declarative table, one module of handlers for each group."""

from __future__ import annotations

import importlib

from kvdb.commands.registry import Bound, build
from kvdb.commands.table import TABLE

_HANDLER_MODULES = (
    "connection",
    "clients",
    "server",
    "configuration",
    "keys",
    "expiry",
    "strings",
    "numbers",
    "hashes",
    "sorted_sets",
    "sorted_set_ranges",
    "transactions",
    "pubsub",
    "describe",
    "info",
    "objects",
    "latency",
    "acl",
    "state",
    "engine",
    "store",
    "transfer",
)


def all_commands() -> dict[bytes, Bound]:
    """Every command with its handler and fresh counters, by upper- and lower-case name."""
    for name in _HANDLER_MODULES:
        importlib.import_module(f"kvdb.commands.{name}")
    bound = build(TABLE)
    return bound | {name.lower(): entry for name, entry in bound.items()}
