"""From a request to the command that may run it, and from an exception to an error reply.

`prepare` is the way of everything that is not plain: names in other letter case, subcommands, wrong arity, and clients
that are gated (not authenticated, restricted by ACL, in a transaction, RESP2 subscribers, MONITOR, CLIENT PAUSE).
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from kvdb.commands.registry import Bound
from kvdb.errors import KvdbError, NoAuthError
from kvdb.net.bulk import Refusal
from kvdb_protocol.replies import QUEUED, encode_error
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client

log = logging.getLogger("kvdb.commands")

_QUOTED_BYTES = 128
_HTTP_WORDS = frozenset({b"POST", b"HOST:"})
_SUBSCRIBER_COMMANDS = frozenset({"SUBSCRIBE", "PSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "PING", "QUIT", "RESET"})
_UNQUEUED_COMMANDS = frozenset({"EXEC", "DISCARD", "MULTI", "WATCH", "QUIT", "RESET"})


def prepare(client: Client, request: Request) -> tuple[Bound | None, bytes]:
    """The command to run now, or None and the reply to send instead."""
    if type(request[0]) is bytes and request[0].upper() in _HTTP_WORDS:
        # A web page can make a browser send this to a local port: the lines behind it would be run as commands.
        log.warning("client %s speaks HTTP: possibly a cross-protocol attack; closed", client.peer)
        client.close_after_reply()
        return None, b""
    try:
        if isinstance(request[0], Refusal):
            raise request[0].error
        bound = find(client.server.commands, request)
        if not bound.min_args <= len(request) <= bound.max_args:
            bound.rejected_calls += 1
            raise KvdbError(f"wrong number of arguments for '{_wire_name(bound)}' command")
        if client.gated or client.server.gated:
            return _admit(client, bound, request)
    except KvdbError as error:
        if client.transaction is not None:
            client.transaction.is_broken = True
        client.server.count_error(error.word)
        return None, encode_error(error.wire)
    return bound, b""


def is_held(client: Client, request: Request) -> bool:
    """Whether CLIENT PAUSE holds a request."""
    if isinstance(request[0], Refusal):
        return False
    try:
        return client.server.holds(find(client.server.commands, request))
    except KvdbError:
        return False


def find(commands: dict[bytes, Bound], request: Request) -> Bound:
    """The command a request names, subcommands included. Raises Redis' unknown-command error."""
    bound = commands.get(request[0]) or commands.get(request[0].upper())
    if bound is None:
        raise KvdbError(unknown_command(request))
    if bound.subcommands and len(request) > 1:
        sub = bound.subcommands.get(request[1].upper())
        if sub is not None:
            return sub
        raise KvdbError(unknown_subcommand(bound, request[1]))
    if bound.fn is None:
        raise KvdbError(f"wrong number of arguments for '{_wire_name(bound)}' command")
    return bound


def unknown_command(request: Request) -> str:
    """Redis' message for a command that does not exist: the name and the arguments, cut at 128 bytes each."""
    quoted = b""
    for argument in request[1:]:
        room = _QUOTED_BYTES - len(quoted)
        if room <= 0:
            break
        quoted += b"'" + _c_string(argument)[:room] + b"' "
    name = _c_string(request[0])[:_QUOTED_BYTES]
    return (
        f"unknown command '{name.decode('utf-8', 'surrogateescape')}', "
        f"with args beginning with: {quoted.decode('utf-8', 'surrogateescape')}"
    )


def _c_string(data: bytes) -> bytes:
    """Up to the first zero byte: Redis prints these with printf, and clients compare messages."""
    return data.partition(b"\0")[0]


def unknown_subcommand(bound: Bound, sub: bytes) -> str:
    """Redis' message for a subcommand that does not exist."""
    name = bound.command.name
    return f"unknown subcommand '{_c_string(sub)[:_QUOTED_BYTES].decode('utf-8', 'surrogateescape')}'. Try {name} HELP."


def _wire_name(bound: Bound) -> str:
    return bound.command.name.lower().replace(" ", "|")


def _admit(client: Client, bound: Bound, request: Request) -> tuple[Bound | None, bytes]:
    """Decide whether a gated client may run a command now."""
    command = bound.command
    if not client.authenticated and "no_auth" not in command.flag_set:
        bound.rejected_calls += 1
        raise NoAuthError("Authentication required.")
    if not client.user.is_unrestricted and "no_auth" not in command.flag_set:
        client.server.acl.check(client, bound, request)
    if client.server.refusal is not None and "denyoom" in command.flag_set:
        bound.rejected_calls += 1
        raise client.server.refusal
    if client.transaction is not None and command.name not in _UNQUEUED_COMMANDS:
        if bound.waits or "no_multi" in command.flag_set:
            raise KvdbError("Command not allowed inside a transaction")
        client.transaction.add(bound, request)
        return None, QUEUED.data
    if client.resp == 2 and client.is_subscriber and command.name not in _SUBSCRIBER_COMMANDS:
        raise KvdbError(
            f"Can't execute '{_wire_name(bound)}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET "
            "are allowed in this context"
        )
    client.server.observe(client, bound, request)
    return bound, b""


def error_reply(client: Client, bound: Bound | None, error: Exception) -> bytes:
    """The error reply for an exception. What is not a KvdbError is a bug: it gets an id that is in the log."""
    if bound is not None:
        bound.failed_calls += 1
    if not isinstance(error, KvdbError):
        error = internal_error(error, bound.command.name if bound is not None else "flush")
    client.server.count_error(error.word)
    return encode_error(error.wire)


def internal_error(error: Exception, where: str) -> KvdbError:
    """Log an unexpected exception under a new id and return the error that names the id."""
    number = secrets.token_hex(4)
    log.error("internal error %s in %s", number, where, exc_info=error)
    return KvdbError(f"internal error {number}")
