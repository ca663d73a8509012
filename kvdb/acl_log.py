"""ACL LOG: the latest refusals, equal ones counted together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvdb.net.client import Client

_SAME_SECONDS = 60.0  # a refusal like one of the last minute only raises that one's count


@dataclass(slots=True)
class AclLogEntry:
    """One kind of refusal. reason: auth, command, key or channel. context: toplevel or multi."""

    id: int
    count: int
    reason: str
    context: str
    thing: bytes
    user: bytes
    client_info: str
    created: float
    updated: float


class AclLog:
    """Newest first."""

    def __init__(self) -> None:
        self.entries: list[AclLogEntry] = []
        self._next_id = 0

    def add(self, client: Client, reason: str, context: str, thing: bytes, user: bytes) -> None:
        """Log a refusal."""
        from kvdb.commands.clients import describe

        now = time.time()
        for entry in self.entries:
            same = (entry.reason, entry.context, entry.thing, entry.user) == (reason, context, thing, user)
            if same and now - entry.updated < _SAME_SECONDS:
                entry.count += 1
                entry.updated = now
                self.entries.remove(entry)
                self.entries.insert(0, entry)
                return
        entry = AclLogEntry(self._next_id, 1, reason, context, thing, user, describe(client), now, now)
        self._next_id += 1
        self.entries.insert(0, entry)
        del self.entries[client.server.config.number("acllog-max-len") :]
