"""Strings: GET, SET and their relatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.access import changed, delete, find_string, string_entry, string_length, write_string
from kvdb.commands.parse import SYNTAX, expiry_ms, is_expiry_option, now_ms, parse_int
from kvdb.commands.registry import batch_handler, handler
from kvdb.errors import KvdbError, WrongTypeError
from kvdb.net import bulk
from kvdb.store.entries import Entry, EntryType
from kvdb_protocol.replies import BULK_HEADERS, OK, SHORT_BYTES, Reply
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client

_STRING = EntryType.STRING
_new_tuple = tuple.__new__  # makes an entry in half the time that Entry() takes: for SET


@handler("GET")
def get(client: Client, args: list[bytes]) -> Reply:
    """The value, or null."""
    entry = client.server.keyspace.get(client.db, args[0])
    if entry is None or entry[0] is not _STRING:
        return find_string(client, args[0])  # type: ignore[return-value]  # counts, or raises
    client.server.statistics.keyspace_hits += 1
    return entry[2]  # type: ignore[return-value]


@batch_handler("GET")
def get_batch(client: Client, requests: list[Request]) -> tuple[int, bytes]:
    """Short values that are in memory and do not expire."""
    newest, others = client.server.keyspace.in_memory(client.db)
    parts: list[bytes] = []
    headers = BULK_HEADERS
    for request in requests:
        if len(request) != 2 or request[0] != b"GET":
            break
        key = request[1]
        entry = newest[key] if key in newest else others.get(key)
        if entry is None or entry[1] or type(value := entry[2]) is not bytes or len(value) >= SHORT_BYTES:
            break
        parts += headers[len(value)], value, b"\r\n"
    n_found = len(parts) // 3
    client.server.statistics.keyspace_hits += n_found
    return n_found, b"".join(parts)


@handler("SET")
def set_(client: Client, args: list[bytes]) -> Reply:
    """Store a value under the conditions and with the expiry asked for."""
    if len(args) == 2:
        key, value = args
        server = client.server
        server.keyspace.put(client.db, key, _new_tuple(Entry, (_STRING, 0, value)))
        if server.observers.is_active:
            server.observers.changed(client.db, key, "set", "$")
        return OK
    return _set_with_options(client, args)


def _set_with_options(client: Client, args: list[bytes]) -> Reply:
    key, value = args[0], args[1]
    condition = b""
    keep = answers_old = False
    expire_ms = 0
    rest = iter(args[2:])
    for word in rest:
        option = word.upper()
        if option in (b"NX", b"XX") and condition in (b"", option):
            condition = option
        elif option == b"GET":
            answers_old = True
        elif option == b"KEEPTTL" and not expire_ms:
            keep = True
        elif is_expiry_option(option) and not keep and not expire_ms:
            number = next(rest, None)
            if number is None:
                raise KvdbError(SYNTAX)
            expire_ms = expiry_ms(option, number, "set")
        else:
            raise KvdbError(SYNTAX)
    old = client.server.keyspace.get(client.db, key)
    if answers_old and old is not None and old.type != _STRING:
        raise WrongTypeError
    before = old.value if answers_old and old is not None else None
    if (condition == b"NX" and old is not None) or (condition == b"XX" and old is None):
        return before  # type: ignore[return-value]
    if keep and old is not None:
        write_string(client, key, value, old.expire_ms)
    elif expire_ms and expire_ms <= now_ms():
        # A moment in the past: the key is gone at once, as after EXPIREAT.
        write_string(client, key, value, 0)
        delete(client, key)
    else:
        write_string(client, key, value, expire_ms)
        if expire_ms:
            changed(client, key, "expire", "g")
    return before if answers_old else OK  # type: ignore[return-value]


@handler("SETNX")
def setnx(client: Client, args: list[bytes]) -> Reply:
    """1 if the key was set, 0 if it existed."""
    if client.server.keyspace.get(client.db, args[0]) is not None:
        return 0
    write_string(client, args[0], args[1], 0)
    return 1


@handler("SETEX")
def setex(client: Client, args: list[bytes]) -> Reply:
    """Set with a time to live in seconds."""
    return _set_expiring(client, args, b"EX", "setex")


@handler("PSETEX")
def psetex(client: Client, args: list[bytes]) -> Reply:
    """Set with a time to live in milliseconds."""
    return _set_expiring(client, args, b"PX", "psetex")


def _set_expiring(client: Client, args: list[bytes], option: bytes, command: str) -> Reply:
    key, number, value = args
    write_string(client, key, value, expiry_ms(option, number, command))
    changed(client, key, "expire", "g")
    return OK


@handler("GETSET")
def getset(client: Client, args: list[bytes]) -> Reply:
    """The old value; the expiry is dropped."""
    old = find_string(client, args[0])
    write_string(client, args[0], args[1], 0)
    return old  # type: ignore[return-value]


@handler("GETDEL")
def getdel(client: Client, args: list[bytes]) -> Reply:
    """The value; the key is deleted."""
    old = find_string(client, args[0])
    if old is not None:
        delete(client, args[0])
    return old  # type: ignore[return-value]


@handler("GETEX")
def getex(client: Client, args: list[bytes]) -> Reply:
    """The value; the expiry is changed as asked."""
    key = args[0]
    moment: int | None = None
    if len(args) > 1:
        option = args[1].upper()
        if option == b"PERSIST" and len(args) == 2:
            moment = 0
        elif is_expiry_option(option) and len(args) == 3:
            moment = -1
        else:
            raise KvdbError(SYNTAX)
    value: Reply = find_string(client, key)  # type: ignore[assignment]
    if value is None:
        return None
    if moment == -1:
        moment = expiry_ms(args[1].upper(), args[2], "getex")
    if moment is None:
        return value
    keyspace = client.server.keyspace
    if moment == 0:
        if (entry := keyspace.get(client.db, key)) is not None and entry.expire_ms:
            keyspace.expire_at(client.db, key, None)
            changed(client, key, "persist", "g")
    elif moment <= now_ms():
        delete(client, key)
    else:
        keyspace.expire_at(client.db, key, moment)
        changed(client, key, "expire", "g")
    return value


@handler("MGET")
def mget(client: Client, args: list[bytes]) -> Reply:
    """The values; null for keys that are missing or no strings."""
    found: list[object] = []
    for key in args:
        try:
            found.append(find_string(client, key))
        except WrongTypeError:
            found.append(None)
    return bulk.encode_array(client, found)  # type: ignore[return-value]


@handler("MSET")
def mset(client: Client, args: list[bytes]) -> Reply:
    """Set all."""
    if len(args) % 2:
        raise KvdbError("wrong number of arguments for 'mset' command")
    for at in range(0, len(args), 2):
        write_string(client, args[at], args[at + 1], 0)
    return OK


@handler("MSETNX")
def msetnx(client: Client, args: list[bytes]) -> Reply:
    """Set all, or none if any key exists."""
    if len(args) % 2:
        raise KvdbError("wrong number of arguments for 'msetnx' command")
    if any(client.server.keyspace.get(client.db, key) is not None for key in args[::2]):
        return 0
    mset(client, args)
    return 1


@handler("APPEND")
def append(client: Client, args: list[bytes]) -> Reply:
    """The new length."""
    entry = string_entry(client, args[0])
    old: bytes = entry.value if entry is not None else b""  # type: ignore[assignment]
    check_length(client, len(old) + len(args[1]))
    write_string(client, args[0], old + args[1], entry.expire_ms if entry is not None else 0, "append")
    return len(old) + len(args[1])


@handler("STRLEN")
def strlen(client: Client, args: list[bytes]) -> Reply:
    """The length in bytes, 0 for a missing key."""
    value = find_string(client, args[0])
    return 0 if value is None else string_length(value)


@handler("GETRANGE", "SUBSTR")
def getrange(client: Client, args: list[bytes]) -> Reply:
    """Bytes from start to end, both inclusive; negative numbers count from the end."""
    start, end = parse_int(args[1]), parse_int(args[2])
    value = find_string(client, args[0])
    if not value:
        return b""
    if start < 0 and end < 0 and start > end:
        return b""
    size = string_length(value)
    start = max(start + size, 0) if start < 0 else start
    end = max(end + size, 0) if end < 0 else end
    if isinstance(value, bytes):
        return value[start : min(end, size - 1) + 1]
    return client.server.store.strings.read(value, start, end + 1)


@handler("SETRANGE")
def setrange(client: Client, args: list[bytes]) -> Reply:
    """Overwrite from an offset, zeros fill a gap; the new length."""
    key, text, patch = args
    offset = parse_int(text)
    if offset < 0:
        raise KvdbError("offset is out of range")
    entry = string_entry(client, key)
    old: bytes = entry.value if entry is not None else b""  # type: ignore[assignment]
    if not patch:
        return len(old)
    check_length(client, offset + len(patch))
    value = bytearray(old.ljust(offset, b"\0"))
    value[offset : offset + len(patch)] = patch
    write_string(client, key, bytes(value), entry.expire_ms if entry is not None else 0, "setrange")
    return len(value)


def check_length(client: Client, n_bytes: int) -> None:
    """Refuse strings over `proto-max-bulk-len`."""
    if n_bytes > client.server.config.number("proto-max-bulk-len"):
        raise KvdbError("string exceeds maximum allowed size (proto-max-bulk-len)")
