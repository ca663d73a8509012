"""What handlers do with the keyspace: typed reads, writes that are seen by WATCH and keyspace events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.errors import WrongTypeError
from kvdb.store.entries import Entry, EntryType, HeldString, LargeValue, StringRef, place_of

if TYPE_CHECKING:
    from kvdb.net.client import Client

_STRING = EntryType.STRING


def find_string(client: Client, key: bytes) -> bytes | LargeValue | None:
    """A string's value, or None; a large one is not read. Counts a hit or a miss. Raises WrongTypeError."""
    server = client.server
    entry = server.keyspace.get(client.db, key)
    if entry is None:
        server.statistics.keyspace_misses += 1
        if server.observers.is_active:
            server.observers.notify(client.db, key, "keymiss", "m")
        return None
    server.statistics.keyspace_hits += 1
    if entry.type != _STRING:
        raise WrongTypeError
    return entry.value  # type: ignore[return-value]


def string_length(value: bytes | LargeValue) -> int:
    """How many bytes a string has."""
    return len(value) if isinstance(value, bytes) else place_of(value).n_bytes


def string_entry(client: Client, key: bytes) -> Entry | None:
    """A string's entry for a write command, or None; a large string is read. Raises WrongTypeError."""
    entry = client.server.keyspace.get(client.db, key)
    if entry is not None and entry.type != _STRING:
        raise WrongTypeError
    if entry is not None and isinstance(entry.value, StringRef | HeldString):
        return entry._replace(value=client.server.store.strings.read(entry.value))
    return entry


def write_string(client: Client, key: bytes, value: bytes, expire_ms: int, event: str = "set") -> None:
    """Store a string."""
    server = client.server
    server.keyspace.put(client.db, key, Entry(_STRING, expire_ms, value))
    if server.observers.is_active:
        server.observers.changed(client.db, key, event, "$")


def changed(client: Client, key: bytes, event: str, letter: str) -> None:
    """Tell WATCH and keyspace events that a key of the client's database changed."""
    observers = client.server.observers
    if observers.is_active:
        observers.changed(client.db, key, event, letter)


def delete(client: Client, key: bytes) -> bool:
    """Delete a key; whether it existed."""
    server = client.server
    if not server.keyspace.delete(client.db, key):
        return False
    if server.observers.is_active:
        server.observers.changed(client.db, key, "del", "g")
    return True
