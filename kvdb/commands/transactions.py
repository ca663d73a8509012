"""MULTI, EXEC, DISCARD, WATCH, UNWATCH."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvdb.commands import dispatch
from kvdb.commands.registry import Bound, handler
from kvdb.errors import ExecAbortError, KvdbError
from kvdb.net import bulk
from kvdb.store.entries import HeldString
from kvdb_protocol.replies import NIL_ARRAY, OK, Reply
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client


class Transaction:
    """What a client has queued since MULTI."""

    def __init__(self) -> None:
        self.queued: list[tuple[Bound, Request]] = []
        self.is_broken = False

    def add(self, bound: Bound, request: Request) -> None:
        """Queue a command that has passed its checks."""
        self.queued.append((bound, request))


@handler("MULTI")
def multi(client: Client, args: list[bytes]) -> Reply:
    """From now on commands are queued."""
    if client.transaction is not None:
        raise KvdbError("MULTI calls can not be nested")
    client.transaction = Transaction()
    client.update_gate()
    return OK


@handler("DISCARD")
def discard(client: Client, args: list[bytes]) -> Reply:
    """Drop what is queued."""
    if client.transaction is None:
        raise KvdbError("DISCARD without MULTI")
    _end(client)
    return OK


def _end(client: Client) -> None:
    client.transaction = None
    client.server.observers.unwatch(client)
    client.update_gate()


def _has_expired(client: Client) -> bool:
    """Whether a watched key that existed is gone: nobody need have noticed that it expired."""
    keyspace = client.server.keyspace
    return any(existed and keyspace.get(db, key) is None for (db, key), existed in client.watched.items())


@handler("EXEC")
def exec_(client: Client, args: list[bytes]) -> Reply:
    """Run what is queued, nothing else in between. Nothing queued returns a coroutine (flag no_multi)."""
    transaction = client.transaction
    if transaction is None:
        raise KvdbError("EXEC without MULTI")
    is_stale = client.watch_broken or _has_expired(client)
    _end(client)
    if transaction.is_broken:
        raise ExecAbortError("Transaction discarded because of previous errors.")
    if is_stale:
        return NIL_ARRAY
    replies: list[bytes | HeldString] = [b"*%d\r\n" % len(transaction.queued)]
    for bound, request in transaction.queued:
        began = time.perf_counter()
        try:
            if not client.user.is_unrestricted:
                client.server.acl.check(client, bound, request)
            client.server.observe(client, bound, request)
            reply = bound.fn(client, request[bound.n_names :])  # type: ignore[misc]
            replies += bulk.encode_parts(client, reply)
        except Exception as error:
            replies.append(dispatch.error_reply(client, bound, error))
        bound.calls += 1
        bound.seconds += time.perf_counter() - began
    return bulk.join(replies)  # type: ignore[return-value]


@handler("WATCH")
def watch(client: Client, args: list[bytes]) -> Reply:
    """EXEC will fail if one of these keys changes until then."""
    if client.transaction is not None:
        raise KvdbError("WATCH inside MULTI is not allowed")
    for key in args:
        client.server.observers.watch(client, key, client.server.keyspace.get(client.db, key) is not None)
    return OK


@handler("UNWATCH")
def unwatch(client: Client, args: list[bytes]) -> Reply:
    """Forget the watched keys."""
    client.server.observers.unwatch(client)
    return OK
