"""Counters for INFO."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvdb.net.service import Server

_SAMPLES = 16


class Statistics:
    """What has happened since the start or since CONFIG RESETSTAT."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set everything to zero."""
        self.connections_received = 0
        self.connections_rejected = 0
        self.output_limit_disconnections = 0
        self.auth_failures = 0
        self.keyspace_hits = 0
        self.keyspace_misses = 0
        self.expired_keys = 0
        self.commands_of_gone_clients = 0
        self.input_bytes = 0
        self.output_bytes = 0
        self.errors: dict[str, int] = {}
        self.http_requests: Counter[tuple[str, int]] = Counter()  # by path, `other` for unknown ones, and status
        self.ops_per_second = 0
        self._ops: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def sample(self, server: Server) -> None:
        """Take one of the samples that `instantaneous_ops_per_sec` is computed from."""
        self._ops.append((time.monotonic(), total_commands(server)))
        (first, before), (last, after) = self._ops[0], self._ops[-1]
        self.ops_per_second = round((after - before) / (last - first)) if last > first else 0


def total_commands(server: Server) -> int:
    """Commands run so far."""
    seen = {id(bound): bound for bound in server.commands.values()}
    return sum(bound.calls + sum(sub.calls for sub in set(bound.subcommands.values())) for bound in seen.values())
