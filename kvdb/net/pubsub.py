"""Channels, patterns, and who listens to them.

Invariant: a client is in `channels[name]` exactly if `name` is in `client.channels`; likewise for patterns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.glob import matches
from kvdb_protocol.replies import Push, encode

if TYPE_CHECKING:
    from kvdb.net.client import Client


class PubSub:
    """All subscriptions of the server."""

    def __init__(self) -> None:
        self.channels: dict[bytes, dict[Client, None]] = {}
        self.patterns: dict[bytes, dict[Client, None]] = {}

    def publish(self, channel: bytes, payload: bytes) -> int:
        """Send a message to everyone who listens; answers how many got it."""
        n_sent = 0
        listeners = self.channels.get(channel)
        if listeners:
            frames = [encode(Push((b"message", channel, payload)), resp) for resp in (2, 3)]
            for client in list(listeners):
                client.push_encoded(frames[client.resp - 2])
            n_sent += len(listeners)
        for pattern, clients in list(self.patterns.items()):
            if matches(pattern, channel):
                frames = [encode(Push((b"pmessage", pattern, channel, payload)), resp) for resp in (2, 3)]
                for client in list(clients):
                    client.push_encoded(frames[client.resp - 2])
                n_sent += len(clients)
        return n_sent

    def subscribe(self, client: Client, name: bytes, *, is_pattern: bool) -> None:
        """Add a subscription."""
        own, table = self._of(client, is_pattern)
        own[name] = None
        table.setdefault(name, {})[client] = None

    def unsubscribe(self, client: Client, name: bytes, *, is_pattern: bool) -> None:
        """Remove a subscription if there is one."""
        own, table = self._of(client, is_pattern)
        if own.pop(name, 0) is None:
            listeners = table[name]
            del listeners[client]
            if not listeners:
                del table[name]

    def forget(self, client: Client) -> None:
        """Remove all subscriptions of a client."""
        for is_pattern in (False, True):
            for name in list(client.patterns if is_pattern else client.channels):
                self.unsubscribe(client, name, is_pattern=is_pattern)

    def _of(self, client: Client, is_pattern: bool) -> tuple[dict[bytes, None], dict[bytes, dict[Client, None]]]:
        return (client.patterns, self.patterns) if is_pattern else (client.channels, self.channels)
