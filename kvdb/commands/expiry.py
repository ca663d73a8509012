"""When keys expire: EXPIRE, TTL and their relatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.access import changed, delete
from kvdb.commands.parse import absolute_ms, now_ms, parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client


@handler("EXPIRE")
def expire(client: Client, args: list[bytes]) -> Reply:
    """In seconds from now."""
    return _expire(client, args, 1000, False, "expire")


@handler("PEXPIRE")
def pexpire(client: Client, args: list[bytes]) -> Reply:
    """In milliseconds from now."""
    return _expire(client, args, 1, False, "pexpire")


@handler("EXPIREAT")
def expireat(client: Client, args: list[bytes]) -> Reply:
    """At a Unix time in seconds."""
    return _expire(client, args, 1000, True, "expireat")


@handler("PEXPIREAT")
def pexpireat(client: Client, args: list[bytes]) -> Reply:
    """At a Unix time in milliseconds."""
    return _expire(client, args, 1, True, "pexpireat")


def _expire(client: Client, args: list[bytes], unit: int, absolute: bool, command: str) -> int:
    key = args[0]
    options = set()
    for word in args[2:]:
        option = word.upper()
        if option not in (b"NX", b"XX", b"GT", b"LT"):
            raise KvdbError(f"Unsupported option {word.decode('utf-8', 'surrogateescape')}")
        options.add(option)
    if b"NX" in options and len(options) > 1:
        raise KvdbError("NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= options:
        raise KvdbError("GT and LT options at the same time are not compatible")
    moment = absolute_ms(parse_int(args[1]), unit, absolute, command)
    keyspace = client.server.keyspace
    entry = keyspace.get(client.db, key)
    if entry is None:
        return 0
    old = entry.expire_ms
    # A key without expiry counts as one that expires at infinity.
    if (
        (b"NX" in options and old)
        or (b"XX" in options and not old)
        or (b"GT" in options and (not old or moment <= old))
        or (b"LT" in options and old and moment >= old)
    ):
        return 0
    if moment <= now_ms():
        delete(client, key)
    else:
        keyspace.expire_at(client.db, key, moment)
        changed(client, key, "expire", "g")
    return 1


@handler("PERSIST")
def persist(client: Client, args: list[bytes]) -> Reply:
    """1 if the key had an expiry."""
    keyspace = client.server.keyspace
    entry = keyspace.get(client.db, args[0])
    if entry is None or not entry.expire_ms:
        return 0
    keyspace.expire_at(client.db, args[0], None)
    changed(client, args[0], "persist", "g")
    return 1


@handler("TTL")
def ttl(client: Client, args: list[bytes]) -> Reply:
    """Seconds left, rounded; -1 without expiry, -2 without key."""
    left = _moment(client, args[0])
    return left if left < 0 else (max(left - now_ms(), 0) + 500) // 1000


@handler("PTTL")
def pttl(client: Client, args: list[bytes]) -> Reply:
    """Milliseconds left; -1 without expiry, -2 without key."""
    left = _moment(client, args[0])
    return left if left < 0 else max(left - now_ms(), 0)


@handler("EXPIRETIME")
def expiretime(client: Client, args: list[bytes]) -> Reply:
    """Unix seconds; -1 without expiry, -2 without key."""
    moment = _moment(client, args[0])
    return moment if moment < 0 else (moment + 500) // 1000


@handler("PEXPIRETIME")
def pexpiretime(client: Client, args: list[bytes]) -> Reply:
    """Unix milliseconds; -1 without expiry, -2 without key."""
    return _moment(client, args[0])


def _moment(client: Client, key: bytes) -> int:
    entry = client.server.keyspace.get(client.db, key)
    if entry is None:
        return -2
    return entry.expire_ms or -1
