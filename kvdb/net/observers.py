"""Who wants to know what is run and what changes: slow log, MONITOR, WATCH, keyspace events.

Invariant: with nobody watching, a change costs one test of `is_active`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.commands.registry import Bound
    from kvdb.config import Config
    from kvdb.net.client import Client
    from kvdb.net.pubsub import PubSub

_ALL_EVENTS = "g$lshzxetd"
_LOGGED_ARGUMENTS = 32
_LOGGED_BYTES = 128
_LATENCY_SAMPLES = 160


@dataclass(frozen=True, slots=True)
class SlowEntry:
    """One entry of the slow log."""

    id: int
    time_s: int
    took_us: int
    request: tuple[bytes, ...]
    peer: str
    name: bytes


class SlowLog:
    """The latest commands that took long, newest first."""

    def __init__(self) -> None:
        self.entries: deque[SlowEntry] = deque()
        self.max_entries = 0
        self._next_id = 0

    def add(self, client: Client, request: Request, seconds: float, now: float) -> None:
        """Log a command; long requests are cut as in Redis."""
        kept = [_cut(argument) for argument in redacted(request)[:_LOGGED_ARGUMENTS]]
        if len(request) > _LOGGED_ARGUMENTS:
            kept[-1] = b"... (%d more arguments)" % (len(request) - _LOGGED_ARGUMENTS + 1)
        entry = SlowEntry(self._next_id, int(now), int(seconds * 1e6), tuple(kept), client.peer, client.name)
        self._next_id += 1
        self.entries.appendleft(entry)
        self.trim()

    def trim(self) -> None:
        """Drop what is over the limit."""
        while len(self.entries) > self.max_entries:
            self.entries.pop()


def redacted(request: Request) -> Request:
    """The request without what may be a password."""
    words = [word.upper() for word in request[:2]]
    if words[0] not in (b"AUTH", b"HELLO") and words not in ([b"ACL", b"SETUSER"], [b"CONFIG", b"SET"]):
        return request
    return [request[0]] + [b"(redacted)"] * (len(request) - 1)


def _cut(argument: bytes) -> bytes:
    if len(argument) <= _LOGGED_BYTES:
        return argument
    return argument[:_LOGGED_BYTES] + b"... (%d more bytes)" % (len(argument) - _LOGGED_BYTES)


class Observers:
    """Everyone who looks on."""

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub
        self.slow_log = SlowLog()
        self.monitors: dict[Client, None] = {}
        self.watchers: dict[tuple[int, bytes], dict[Client, None]] = {}
        self.latency: dict[str, deque[tuple[int, int]]] = {}  # event -> (Unix s, ms), the latest 160
        self._events: frozenset[str] = frozenset()
        self._keyspace = self._keyevent = False
        self.is_active = False

    def configure(self, config: Config) -> None:
        """Take over notify-keyspace-events and slowlog-max-len."""
        letters = config.text("notify-keyspace-events")
        self._keyspace, self._keyevent = "K" in letters, "E" in letters
        wanted = letters.replace("A", _ALL_EVENTS)
        self._events = frozenset(wanted) if self._keyspace or self._keyevent else frozenset()
        self.slow_log.max_entries = config.number("slowlog-max-len")
        self.slow_log.trim()
        self._update()

    def _update(self) -> None:
        self.is_active = bool(self._events or self.watchers)

    # changes ---------------------------------------------------------------------------------------------------

    def changed(self, db: int, key: bytes, event: str, letter: str) -> None:
        """A key changed: transactions that watch it will fail; the event is published if its class is wanted."""
        if not self.is_active:
            return
        if event:
            self.notify(db, key, event, letter)
        for client in self.watchers.get((db, key), ()):
            client.watch_broken = True

    def notify(self, db: int, key: bytes, event: str, letter: str) -> None:
        """Publish a keyspace event that changes nothing (`keymiss`, `evicted` ...)."""
        if letter not in self._events:
            return
        if self._keyspace:
            self._pubsub.publish(b"__keyspace@%d__:%b" % (db, key), event.encode())
        if self._keyevent:
            self._pubsub.publish(b"__keyevent@%d__:%b" % (db, event.encode()), key)

    def database_flushed(self, db: int) -> None:
        """All keys of a database are gone: break every transaction that watches one of them that existed."""
        for (watched_db, key), clients in self.watchers.items():
            if watched_db == db:
                for client in clients:
                    client.watch_broken |= client.watched[watched_db, key]

    def watch(self, client: Client, key: bytes, exists: bool) -> None:
        """WATCH: tell `client` when this key of its database changes."""
        place = (client.db, key)
        if place not in client.watched:
            client.watched[place] = exists
            self.watchers.setdefault(place, {})[client] = None
            self._update()

    def unwatch(self, client: Client) -> None:
        """Forget all keys a client watches."""
        for place in client.watched:
            clients = self.watchers[place]
            del clients[client]
            if not clients:
                del self.watchers[place]
        client.watched.clear()
        client.watch_broken = False
        self._update()

    def note_latency(self, event: str, moment: float, seconds: float) -> None:
        """A sample for LATENCY; the largest one of a second is kept."""
        rows = self.latency.setdefault(event, deque(maxlen=_LATENCY_SAMPLES))
        took_ms = int(seconds * 1000)
        if rows and rows[-1][0] == int(moment):
            rows[-1] = (int(moment), max(took_ms, rows[-1][1]))
        else:
            rows.append((int(moment), took_ms))

    def forget(self, client: Client) -> None:
        """A client is gone."""
        self.unwatch(client)
        self.monitors.pop(client, None)

    # MONITOR ---------------------------------------------------------------------------------------------------

    @property
    def is_watching(self) -> bool:
        """Whether requests have to be shown or held."""
        return bool(self.monitors)

    def show(self, client: Client, bound: Bound, request: Request) -> None:
        """Send a request to all monitors, except commands that carry passwords or belong to administrators."""
        flags = bound.command.flag_set
        if "skip_monitor" in flags or "admin" in flags or not self.monitors or bound.command.name == "QUIT":
            return
        where = "unix:" + client.local if client.listener == "unix" else client.peer
        words = b" ".join(quoted(argument) for argument in redacted(request))
        line = b"+%.6f [%d %b] %b\r\n" % (time.time(), client.db, where.encode(), words)
        for monitor in list(self.monitors):
            monitor.push_encoded(line)


def quoted(data: bytes) -> bytes:
    """Bytes in double quotes with escapes, as MONITOR and redis-cli show them."""
    out = bytearray(b'"')
    for byte in data:
        if byte in b'\\"':
            out += b"\\" + bytes((byte,))
        elif 0x20 <= byte < 0x7F:
            out.append(byte)
        else:
            out += _NAMED.get(byte) or b"\\x%02x" % byte
    return bytes(out + b'"')


_NAMED = {0x0A: b"\\n", 0x0D: b"\\r", 0x09: b"\\t", 0x07: b"\\a", 0x08: b"\\b"}
