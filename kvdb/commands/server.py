"""The server as a whole: SAVE, SHUTDOWN, TIME, ROLE, MONITOR, SLOWLOG and the like."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from kvdb import __version__
from kvdb.commands.connection import REDIS_VERSION
from kvdb.commands.parse import SYNTAX, parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import OK, Encoded, Reply, Simple, Verbatim

if TYPE_CHECKING:
    from kvdb.net.client import Client


@handler("TIME")
def time_(client: Client, args: list[bytes]) -> Reply:
    """Seconds and microseconds."""
    now_us = time.time_ns() // 1000
    return [b"%d" % (now_us // 1_000_000), b"%d" % (now_us % 1_000_000)]


@handler("ROLE")
def role(client: Client, args: list[bytes]) -> Reply:
    """A master without replicas."""
    return ["master", 0, []]


@handler("SAVE")
async def save(client: Client, args: list[bytes]) -> Reply:
    """Make everything durable now."""
    await client.server.keyspace.flush()
    client.server.last_save = time.time()
    return OK


@handler("BGSAVE")
def bgsave(client: Client, args: list[bytes]) -> Reply:
    """Make everything durable in the background."""
    if len(args) > 1 or (args and args[0].upper() != b"SCHEDULE"):
        raise KvdbError(SYNTAX)
    server = client.server

    async def work() -> None:
        await server.keyspace.flush()
        server.last_save = time.time()

    server.run_in_background(work())
    return Simple("Background saving started")


@handler("LASTSAVE")
def lastsave(client: Client, args: list[bytes]) -> Reply:
    """Unix seconds."""
    return int(client.server.last_save)


@handler("SHUTDOWN")
async def shutdown(client: Client, args: list[bytes]) -> Reply:
    """End in an orderly way. There is no reply: the connection closes. With NOSAVE and FORCE also if that fails."""
    words = {word.upper() for word in args}
    if words - {b"SAVE", b"NOSAVE", b"NOW", b"FORCE", b"ABORT"} or {b"SAVE", b"NOSAVE"} <= words:
        raise KvdbError(SYNTAX)
    if b"ABORT" in words:
        raise KvdbError("No shutdown in progress.")
    if not {b"NOSAVE", b"FORCE"} & words:
        try:
            await client.server.keyspace.flush()
        except KvdbError as error:
            raise KvdbError(
                f"Errors trying to SHUTDOWN: {error}; SHUTDOWN NOSAVE ends the server all the same"
            ) from None
    client.server.request_shutdown()
    await asyncio.Event().wait()  # until the connection is closed
    return Encoded(b"")


@handler("MONITOR")
def monitor(client: Client, args: list[bytes]) -> Reply:
    """From now on the connection gets every command that is run."""
    client.server.observers.monitors[client] = None
    client.is_monitor = True
    client.server.update_gate()
    return OK


@handler("SLOWLOG GET")
def slowlog_get(client: Client, args: list[bytes]) -> Reply:
    """The latest entries; -1 for all."""
    message = "count should be greater than or equal to -1"
    count = parse_int(args[0], message) if args else 10
    if count < -1:
        raise KvdbError(message)
    entries = list(client.server.observers.slow_log.entries)
    shown = entries if count == -1 else entries[:count]
    return [[e.id, e.time_s, e.took_us, list(e.request), e.peer, e.name] for e in shown]


@handler("SLOWLOG LEN")
def slowlog_len(client: Client, args: list[bytes]) -> Reply:
    """How many entries."""
    return len(client.server.observers.slow_log.entries)


@handler("SLOWLOG RESET")
def slowlog_reset(client: Client, args: list[bytes]) -> Reply:
    """Drop all entries."""
    client.server.observers.slow_log.entries.clear()
    return OK


@handler("LOLWUT")
def lolwut(client: Client, args: list[bytes]) -> Reply:
    """A trie of pages with two snapshots, and the version."""
    picture = (
        "  o--o--o--o--o--*  snapshot\n"
        "        \\\n"
        "         o--o--*    fork\n\n"
        f"kvdb ver. {__version__}, speaks as Redis ver. {REDIS_VERSION}\n"
    )
    return Verbatim(picture)
