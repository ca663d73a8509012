"""What hashes and sorted sets have in common: typed reads, copies to change, and putting them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from kvdb.commands.access import changed
from kvdb.containers import Fields, Members
from kvdb.errors import WrongTypeError
from kvdb.store.entries import Entry, EntryType

if TYPE_CHECKING:
    from kvdb.net.client import Client

_Container = TypeVar("_Container", Fields, Members)
# Type of the entry, class of its keyspace events.
_KINDS: dict[type, tuple[EntryType, str]] = {Fields: (EntryType.HASH, "h"), Members: (EntryType.ZSET, "z")}
_EMPTY = {Fields: Fields(), Members: Members()}


def read(client: Client, key: bytes, of: type[_Container]) -> _Container:
    """What a hash or sorted set holds, nothing for a missing key; not to be changed. Raises WrongTypeError."""
    server = client.server
    entry = server.keyspace.get(client.db, key)
    if entry is None:
        server.statistics.keyspace_misses += 1
        if server.observers.is_active:
            server.observers.notify(client.db, key, "keymiss", "m")
        return _EMPTY[of]  # type: ignore[return-value]
    server.statistics.keyspace_hits += 1
    if not isinstance(entry.value, of):
        raise WrongTypeError
    return entry.value


def for_writing(client: Client, key: bytes, of: type[_Container]) -> tuple[_Container, int]:
    """(container, expiry) of a key or of a new one; it may be changed and must then be `store`d."""
    keyspace = client.server.keyspace
    entry = keyspace.get(client.db, key)
    if entry is None:
        container = of()
        container.round = keyspace.round
        return container, 0
    if not isinstance(entry.value, of):
        raise WrongTypeError
    return entry.value.writable(keyspace.round), entry.expire_ms


def store(client: Client, key: bytes, container: Fields | Members, expire_ms: int, event: str) -> None:
    """Put a changed container back; an empty one is deleted."""
    keyspace = client.server.keyspace
    kind, letter = _KINDS[type(container)]
    if len(container):
        keyspace.put(client.db, key, Entry(kind, expire_ms, container))
        changed(client, key, event, letter)
    else:
        keyspace.delete(client.db, key)
        changed(client, key, event, letter)
        changed(client, key, "del", "g")
