"""Keys of any type: DEL, EXISTS, TYPE, SCAN, RENAME, COPY and their relatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.access import changed, delete
from kvdb.commands.connection import database_number
from kvdb.commands.parse import SYNTAX, parse_int
from kvdb.commands.registry import handler
from kvdb.containers import Fields, Members
from kvdb.errors import KvdbError
from kvdb.glob import compiled, matches
from kvdb.store.entries import Entry, EntryType
from kvdb_protocol.replies import OK, Encoded, Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

TYPE_NAMES = {kind.value: kind.name.lower() for kind in EntryType}
_KEYS_BATCH = 1000


@handler("DEL", "UNLINK")
def del_(client: Client, args: list[bytes]) -> Reply:
    """How many existed."""
    return sum([delete(client, key) for key in args])


@handler("EXISTS", "TOUCH")
def exists(client: Client, args: list[bytes]) -> Reply:
    """How many exist; a key named twice counts twice."""
    get = client.server.keyspace.get
    return sum(get(client.db, key) is not None for key in args)


@handler("TYPE")
def type_(client: Client, args: list[bytes]) -> Reply:
    """The type's name, or none."""
    entry = client.server.keyspace.get(client.db, args[0])
    return Encoded(b"+%b\r\n" % (TYPE_NAMES[entry.type].encode() if entry is not None else b"none"))


@handler("KEYS")
def keys(client: Client, args: list[bytes]) -> Reply:
    """All keys that match."""
    pattern = args[0]
    keyspace = client.server.keyspace
    found: list[Reply] = []
    cursor = 0
    while True:
        cursor, names = keyspace.scan(client.db, cursor, _KEYS_BATCH)
        found += names if pattern == b"*" else [name for name in names if matches(pattern, name)]
        if not cursor:
            return found


@handler("SCAN")
def scan(client: Client, args: list[bytes]) -> Reply:
    """The next cursor and some keys; a key that stays is returned at least once in a full iteration."""
    cursor = parse_cursor(args[0])
    count, pattern, kind = parse_scan_options(args[1:], with_type=True)
    keyspace = client.server.keyspace
    cursor, names = keyspace.scan(client.db, cursor, count)
    if pattern is not None and pattern != b"*":
        match = compiled(pattern).fullmatch
        names = [name for name in names if match(name)]
    if kind is not None:
        names = [
            name
            for name in names
            if (entry := keyspace.get(client.db, name)) is not None and TYPE_NAMES[entry.type] == kind
        ]
    return [b"%d" % cursor, names]


def parse_cursor(text: bytes) -> int:
    """A SCAN cursor: an unsigned 64-bit integer, read as strtoul reads a C string."""
    text = text.partition(b"\0")[0] or b"0"
    digits = text[1:] if text[:1] in (b"-", b"+") else text
    if not digits.isdigit() or (value := int(digits)) >= 1 << 64:
        raise KvdbError("invalid cursor")
    return -value % (1 << 64) if text[:1] == b"-" else value


def parse_scan_options(args: list[bytes], *, with_type: bool = False) -> tuple[int, bytes | None, str | None]:
    """(count, pattern, type name) of a SCAN-like command."""
    count, pattern, kind = 10, None, None
    for at in range(0, len(args), 2):
        option = args[at].upper()
        if at + 1 >= len(args):
            raise KvdbError(SYNTAX)
        value = args[at + 1]
        if option == b"COUNT":
            count = parse_int(value)
            if count < 1:
                raise KvdbError(SYNTAX)
        elif option == b"MATCH":
            pattern = value
        elif option == b"TYPE" and with_type:
            kind = value.lower().decode("utf-8", "surrogateescape")
        else:
            raise KvdbError(SYNTAX)
    return count, pattern, kind


@handler("RANDOMKEY")
def randomkey(client: Client, args: list[bytes]) -> Reply:
    """Some key, or null in an empty database."""
    return client.server.keyspace.random(client.db)


@handler("DBSIZE")
def dbsize(client: Client, args: list[bytes]) -> Reply:
    """Number of keys."""
    return client.server.keyspace.size(client.db)


@handler("RENAME")
def rename(client: Client, args: list[bytes]) -> Reply:
    """Rename, replacing the target."""
    _rename(client, *args)
    return OK


@handler("RENAMENX")
def renamenx(client: Client, args: list[bytes]) -> Reply:
    """1 if renamed, 0 if the target exists."""
    source, target = args
    keyspace = client.server.keyspace
    if keyspace.get(client.db, source) is not None and keyspace.get(client.db, target) is not None:
        return 0
    _rename(client, source, target)
    return 1


def _rename(client: Client, source: bytes, target: bytes) -> None:
    if not client.server.keyspace.rename(client.db, source, target):
        raise KvdbError("no such key")
    if source != target:
        changed(client, source, "rename_from", "g")
        changed(client, target, "rename_to", "g")


@handler("COPY")
def copy(client: Client, args: list[bytes]) -> Reply:
    """1 if copied. A copy of a snapshot names the same snapshot: no page is copied."""
    source, target = args[:2]
    db, replace = client.db, False
    rest = iter(args[2:])
    for word in rest:
        if word.upper() == b"REPLACE":
            replace = True
        elif word.upper() == b"DB" and (number := next(rest, None)) is not None:
            db = database_number(client, number)
        else:
            raise KvdbError(SYNTAX)
    if db == client.db and source == target:
        raise KvdbError("source and destination objects are the same")
    keyspace = client.server.keyspace
    entry = keyspace.get(client.db, source)
    if entry is None or (not replace and keyspace.get(db, target) is not None):
        return 0
    refuse_session(entry)
    if isinstance(entry.value, Fields | Members):
        entry = entry._replace(value=entry.value.duplicate())
    keyspace.put(db, target, keyspace.held(entry))
    client.server.changed(db, target, "copy_to", "g")
    return 1


@handler("MOVE")
def move(client: Client, args: list[bytes]) -> Reply:
    """1 if moved, 0 if the key is missing here or exists there."""
    key = args[0]
    db = database_number(client, args[1])
    if db == client.db:
        raise KvdbError("source and destination objects are the same")
    keyspace = client.server.keyspace
    entry = keyspace.get(client.db, key)
    if entry is None or keyspace.get(db, key) is not None:
        return 0
    keyspace.put(db, key, keyspace.held(entry))
    keyspace.delete(client.db, key)
    client.server.changed(client.db, key, "move_from", "g")
    client.server.changed(db, key, "move_to", "g")
    return 1


def refuse_session(entry: Entry) -> None:
    """Two names for one live timeline would both write its journal."""
    if entry.type == EntryType.SESSION:
        raise KvdbError("a session cannot be copied; FORK makes another one with the same state")


@handler("FLUSHDB")
def flushdb(client: Client, args: list[bytes]) -> Reply:
    """Delete all keys of the database."""
    _check_flush(args)
    client.server.keyspace.clear(client.db)
    client.server.observers.database_flushed(client.db)
    return OK


@handler("FLUSHALL")
def flushall(client: Client, args: list[bytes]) -> Reply:
    """Delete all keys."""
    _check_flush(args)
    for db in range(client.server.config.number("databases")):
        client.server.keyspace.clear(db)
        client.server.observers.database_flushed(db)
    return OK


def _check_flush(args: list[bytes]) -> None:
    if len(args) > 1 or (args and args[0].upper() not in (b"SYNC", b"ASYNC")):
        raise KvdbError(SYNTAX)
