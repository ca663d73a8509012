"""OBJECT and MEMORY: how values are stored and what they take."""

from __future__ import annotations

import gc
import math
import sys
from typing import TYPE_CHECKING

from kvdb.commands.parse import SYNTAX, int_or_none, parse_int
from kvdb.commands.registry import handler
from kvdb.containers import Fields, Members
from kvdb.errors import KvdbError
from kvdb.net.metrics import rss_bytes
from kvdb.store.entries import HeldString, StringRef, place_of
from kvdb_protocol.replies import OK, Reply, Verbatim

if TYPE_CHECKING:
    from kvdb.net.client import Client
    from kvdb.store.entries import Entry

_EMBEDDED_BYTES = 44
_NOT_LFU = (
    "An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when switching between "
    "policies at runtime LRU and LFU data will take some time to adjust."
)
_SAMPLES = 5


def encoding(client: Client, entry: Entry) -> str:
    """Redis' name for the way a value of this size is stored; kvdb's own types say their type."""
    config = client.server.config
    value = entry.value
    if isinstance(value, bytes):
        if len(value) <= 20 and int_or_none(value) is not None:
            return "int"
        return "embstr" if len(value) <= _EMBEDDED_BYTES else "raw"
    if isinstance(value, Fields):
        longest = max((max(len(field), len(item)) for field, item in value.items()), default=0)
        small = len(value) <= config.number("hash-max-listpack-entries")
        return "listpack" if small and longest <= config.number("hash-max-listpack-value") else "hashtable"
    if isinstance(value, Members):
        longest = max((len(member) for member in value.scores), default=0)
        small = len(value) <= config.number("zset-max-listpack-entries")
        return "listpack" if small and longest <= config.number("zset-max-listpack-value") else "skiplist"
    if isinstance(value, StringRef | HeldString):
        return "raw"
    return entry.type.name.lower()


def value_bytes(entry: Entry, samples: int) -> int:
    """Bytes of a value in memory, by sampling members of large ones (0: all)."""
    value = entry.value
    if isinstance(value, bytes):
        return sys.getsizeof(value)
    if isinstance(value, StringRef | HeldString):
        return sys.getsizeof(b"") + place_of(value).n_bytes
    members = list(value.items()) if isinstance(value, Fields) else None
    if isinstance(value, Members):
        members = list(value.scores.items())  # type: ignore[arg-type]
    if members is None:
        return sys.getsizeof(value)
    chosen = members[:samples] if samples else members
    each = sum(sys.getsizeof(name) + sys.getsizeof(item) for name, item in chosen) / max(len(chosen), 1)
    container = value.scores if isinstance(value, Members) else value
    return sys.getsizeof(container) + math.ceil(each * len(members))


@handler("OBJECT ENCODING")
def object_encoding(client: Client, args: list[bytes]) -> Reply:
    """The encoding, or null."""
    entry = client.server.keyspace.get(client.db, args[0])
    return encoding(client, entry) if entry is not None else None


@handler("OBJECT REFCOUNT")
def object_refcount(client: Client, args: list[bytes]) -> Reply:
    """1: values are not shared. Null for a missing key."""
    return 1 if client.server.keyspace.get(client.db, args[0]) is not None else None


@handler("OBJECT IDLETIME")
def object_idletime(client: Client, args: list[bytes]) -> Reply:
    """Seconds since the last use; 0 where uses are not tracked. Null for a missing key."""
    return 0 if client.server.keyspace.get(client.db, args[0]) is not None else None


@handler("OBJECT FREQ")
def object_freq(client: Client, args: list[bytes]) -> Reply:
    """Redis' answer without an LFU policy for memory."""
    if client.server.keyspace.get(client.db, args[0]) is None:
        return None
    raise KvdbError(_NOT_LFU)


@handler("MEMORY USAGE")
def memory_usage(client: Client, args: list[bytes]) -> Reply:
    """Bytes of key and value, or null."""
    samples = _SAMPLES
    if len(args) > 1:
        if len(args) != 3 or args[1].upper() != b"SAMPLES":
            raise KvdbError(SYNTAX)
        samples = parse_int(args[2])
        if samples < 0:
            raise KvdbError(SYNTAX)
    entry = client.server.keyspace.get(client.db, args[0])
    if entry is None:
        return None
    return sys.getsizeof(args[0]) + sys.getsizeof(entry) + value_bytes(entry, samples)


@handler("MEMORY STATS")
def memory_stats(client: Client, args: list[bytes]) -> Reply:
    """Facts on memory."""
    server = client.server
    n_keys = sum(server.keyspace.size(db) for db in range(server.config.number("databases")))
    buffers = sum(c.parser.buffered_bytes + c.output_buffer_bytes for c in server.clients.values())
    return {
        "peak.allocated": rss_bytes(),
        "total.allocated": rss_bytes(),
        "clients.normal": buffers,
        "keys.count": n_keys,
        "python.objects": len(gc.get_objects()),
    }


@handler("MEMORY DOCTOR")
def memory_doctor(client: Client, args: list[bytes]) -> Reply:
    """A sentence."""
    return Verbatim(f"Resident memory is {rss_bytes() / 1e6:.0f} MB; values live on disk, not in memory.")


@handler("MEMORY PURGE")
def memory_purge(client: Client, args: list[bytes]) -> Reply:
    """Collect garbage now."""
    gc.collect()
    return OK
