"""Hashes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from kvdb.commands.keys import parse_cursor, parse_scan_options
from kvdb.commands.members import for_writing, read, store
from kvdb.commands.numbers import add_decimals, check_decimal
from kvdb.commands.parse import INT_MAX, INT_MIN, SYNTAX, parse_float, parse_int
from kvdb.commands.registry import handler
from kvdb.containers import Fields
from kvdb.errors import KvdbError
from kvdb.glob import matches
from kvdb_protocol.replies import OK, Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

_MAX_REPEATS = 10_000_000  # a negative count may ask for any number of repeats: this many are a reply of 100 MB


@handler("HSET")
def hset(client: Client, args: list[bytes]) -> Reply:
    """How many fields are new."""
    if len(args) == 3:
        server = client.server
        keyspace = server.keyspace
        entry = keyspace.get(client.db, args[0])
        if entry is not None and type(fields := entry[2]) is Fields and fields.round == keyspace.round:
            # Written in this round already: the object in the active layer is ours to change where it is.
            is_new = fields.add(args[1], args[2])
            if server.observers.is_active:
                server.observers.changed(client.db, args[0], "hset", "h")
            return 1 if is_new else 0
    return _set_all(client, args, "hset")


@handler("HMSET")
def hmset(client: Client, args: list[bytes]) -> Reply:
    """OK."""
    _set_all(client, args, "hmset")
    return OK


def _set_all(client: Client, args: list[bytes], command: str) -> int:
    if len(args) % 2 == 0:
        raise KvdbError(f"wrong number of arguments for '{command}' command")
    fields, expire_ms = for_writing(client, args[0], Fields)
    n_new = 0
    for at in range(1, len(args), 2):
        n_new += fields.add(args[at], args[at + 1])
    store(client, args[0], fields, expire_ms, "hset")
    return n_new


@handler("HSETNX")
def hsetnx(client: Client, args: list[bytes]) -> Reply:
    """1 if set, 0 if the field existed."""
    key, field, value = args
    fields, expire_ms = for_writing(client, key, Fields)
    if field in fields:
        return 0
    fields.add(field, value)
    store(client, key, fields, expire_ms, "hset")
    return 1


@handler("HGET")
def hget(client: Client, args: list[bytes]) -> Reply:
    """The value, or null."""
    return read(client, args[0], Fields).get(args[1])


@handler("HMGET")
def hmget(client: Client, args: list[bytes]) -> Reply:
    """The values, null for missing fields."""
    fields = read(client, args[0], Fields)
    return [fields.get(field) for field in args[1:]]


@handler("HGETALL")
def hgetall(client: Client, args: list[bytes]) -> Reply:
    """A map."""
    return dict(read(client, args[0], Fields))


@handler("HKEYS")
def hkeys(client: Client, args: list[bytes]) -> Reply:
    """The fields."""
    return list(read(client, args[0], Fields))


@handler("HVALS")
def hvals(client: Client, args: list[bytes]) -> Reply:
    """The values."""
    return list(read(client, args[0], Fields).values())


@handler("HLEN")
def hlen(client: Client, args: list[bytes]) -> Reply:
    """Number of fields."""
    return len(read(client, args[0], Fields))


@handler("HEXISTS")
def hexists(client: Client, args: list[bytes]) -> Reply:
    """1 or 0."""
    return int(args[1] in read(client, args[0], Fields))


@handler("HSTRLEN")
def hstrlen(client: Client, args: list[bytes]) -> Reply:
    """Length of the value, 0 for a missing field."""
    return len(read(client, args[0], Fields).get(args[1], b""))


@handler("HDEL")
def hdel(client: Client, args: list[bytes]) -> Reply:
    """How many fields were there."""
    fields, expire_ms = for_writing(client, args[0], Fields)
    gone = sum([fields.pop(field, None) is not None for field in args[1:]])
    if gone:
        store(client, args[0], fields, expire_ms, "hdel")
    return gone


@handler("HINCRBY")
def hincrby(client: Client, args: list[bytes]) -> Reply:
    """The new value."""
    key, field, number = args
    increment = parse_int(number)
    fields, expire_ms = for_writing(client, key, Fields)
    value = parse_int(fields.get(field, b"0"), "hash value is not an integer") + increment
    if not INT_MIN <= value <= INT_MAX:
        raise KvdbError("increment or decrement would overflow")
    fields.add(field, b"%d" % value)
    store(client, key, fields, expire_ms, "hincrby")
    return value


@handler("HINCRBYFLOAT")
def hincrbyfloat(client: Client, args: list[bytes]) -> Reply:
    """The new value as text."""
    key, field, number = args
    if b"inf" in number.lower() and abs(parse_float(number)) == float("inf"):
        raise KvdbError("value is NaN or Infinity")
    check_decimal(number)
    fields, expire_ms = for_writing(client, key, Fields)
    value = add_decimals(fields.get(field, b"0"), number, "hash value is not a float")
    fields.add(field, value)
    store(client, key, fields, expire_ms, "hincrbyfloat")
    return value


@handler("HRANDFIELD")
def hrandfield(client: Client, args: list[bytes]) -> Reply:
    """One field; with a count different ones, with a negative count any."""
    with_values = len(args) == 3
    count = parse_random_count(args, b"WITHVALUES") if len(args) > 1 else None
    fields = read(client, args[0], Fields)
    if count is None:
        return random.choice(list(fields)) if fields else None
    chosen = pick(list(fields), count)
    if not with_values:
        return list(chosen)
    if client.resp == 3:
        return [[field, fields[field]] for field in chosen]
    return [item for field in chosen for item in (field, fields[field])]


def parse_random_count(args: list[bytes], option: bytes) -> int:
    """The count of HRANDFIELD and ZRANDMEMBER."""
    count = parse_int(args[1])
    if len(args) > 3 or (len(args) == 3 and args[2].upper() != option):
        raise KvdbError(SYNTAX)
    if len(args) == 3 and not -(INT_MAX // 2) <= count <= INT_MAX // 2:
        raise KvdbError("value is out of range")
    if count == INT_MIN:
        raise KvdbError(f"value is out of range, value must between -{INT_MAX} and {INT_MAX}")
    if count < -_MAX_REPEATS:
        raise KvdbError(f"value is out of range, at most {_MAX_REPEATS} members with repeats")
    return count


def pick(members: list[bytes], count: int) -> list[bytes]:
    """`count` different members, or -count that may repeat."""
    if not members or not count:
        return []
    if count < 0:
        return random.choices(members, k=-count)
    return random.sample(members, min(count, len(members)))


@handler("HSCAN")
def hscan(client: Client, args: list[bytes]) -> Reply:
    """The next cursor, and some fields with their values."""
    cursor = parse_cursor(args[1])
    fields = read(client, args[0], Fields)
    count, pattern, _ = parse_scan_options(args[2:] if fields else [])
    cursor, names = fields.scan(cursor, count)
    items: list[Reply] = []
    for name in names:
        if pattern is None or matches(pattern, name):
            items += [name, fields[name]]
    return [b"%d" % cursor, items]
