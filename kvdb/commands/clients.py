"""CLIENT and its subcommands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvdb.commands.connection import check_name
from kvdb.commands.describe import wire_name
from kvdb.commands.parse import SYNTAX, parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import OK, Reply, Verbatim

if TYPE_CHECKING:
    from kvdb.net.client import Client


def describe(client: Client) -> str:
    """The line of a connection in CLIENT LIST."""
    now = client.server.now
    flags = "".join(
        letter
        for letter, is_set in (
            ("O", client.is_monitor),
            ("P", client.is_subscriber),
            ("x", client.transaction is not None),
            ("b", client.is_blocked),
            ("d", client.watch_broken),
            ("U", client.listener == "unix"),
            ("e", client.no_evict),
            ("T", client.no_touch),
        )
        if is_set
    )
    fields = {
        "id": client.id,
        "addr": client.peer,
        "laddr": client.local,
        "fd": client.fd,
        "name": client.name.decode(),
        "age": int(max(now - client.created, 0)),
        "idle": int(max(now - client.last_used, 0)),
        "flags": flags or "N",
        "db": client.db,
        "sub": len(client.channels),
        "psub": len(client.patterns),
        "ssub": 0,
        "multi": len(client.transaction.queued) if client.transaction is not None else -1,
        "qbuf": client.parser.buffered_bytes,
        "qbuf-free": 0,
        "argv-mem": 0,
        "multi-mem": 0,
        "rbs": 0,
        "rbp": 0,
        "obl": 0,
        "oll": 0,
        "omem": client.output_buffer_bytes,
        "tot-mem": client.parser.buffered_bytes + client.output_buffer_bytes,
        "events": "rw" if client.output_buffer_bytes else "r",
        "cmd": wire_name(client.last_bound.command) if client.last_bound is not None else "NULL",
        "user": client.user.name.decode("utf-8", "replace"),
        "redir": -1,
        "resp": client.resp,
        "lib-name": client.lib_name.decode(),
        "lib-ver": client.lib_ver.decode(),
    }
    return " ".join(f"{name}={value}" for name, value in fields.items())


@handler("CLIENT ID")
def client_id(client: Client, args: list[bytes]) -> Reply:
    """The id; later connections have larger ones."""
    return client.id


@handler("CLIENT SETNAME")
def setname(client: Client, args: list[bytes]) -> Reply:
    """Name the connection."""
    check_name(args[0], "Client names")
    client.name = args[0]
    return OK


@handler("CLIENT GETNAME")
def getname(client: Client, args: list[bytes]) -> Reply:
    """The name, or null."""
    return client.name or None


@handler("CLIENT SETINFO")
def setinfo(client: Client, args: list[bytes]) -> Reply:
    """Name and version of the client library."""
    option = args[0].lower()
    if option not in (b"lib-name", b"lib-ver"):
        raise KvdbError(f"Unrecognized option '{args[0].decode('utf-8', 'surrogateescape')}'")
    check_name(args[1], option.decode())
    if option == b"lib-name":
        client.lib_name = args[1]
    else:
        client.lib_ver = args[1]
    return OK


def _type_of(client: Client) -> bytes:
    return b"pubsub" if client.is_subscriber else b"normal"


def _client_type(word: bytes) -> bytes:
    kind = word.lower()
    if kind not in (b"normal", b"master", b"replica", b"slave", b"pubsub"):
        raise KvdbError(f"Unknown client type '{word.decode('utf-8', 'surrogateescape')}'")
    return kind


@handler("CLIENT LIST")
def list_(client: Client, args: list[bytes]) -> Reply:
    """One line a connection."""
    chosen = list(client.server.clients.values())
    if args:
        option = args[0].upper()
        if option == b"TYPE" and len(args) == 2:
            kind = _client_type(args[1])
            chosen = [other for other in chosen if _type_of(other) == kind]
        elif option == b"ID" and len(args) > 1:
            wanted = {parse_int(word, "Invalid client ID") for word in args[1:]}
            chosen = [other for other in chosen if other.id in wanted]
        else:
            raise KvdbError(SYNTAX)
    return Verbatim("".join(describe(other) + "\n" for other in chosen))


@handler("CLIENT INFO")
def info(client: Client, args: list[bytes]) -> Reply:
    """The line of this connection."""
    return Verbatim(describe(client) + "\n")


@handler("CLIENT KILL")
def kill(client: Client, args: list[bytes]) -> Reply:
    """Old form: an address, answers OK. New form: filters, answers how many were closed."""
    clients = list(client.server.clients.values())
    if len(args) == 1:
        chosen = [other for other in clients if other.peer.encode() == args[0]]
        if not chosen:
            raise KvdbError("No such client")
        _close(client, chosen)
        return OK
    if len(args) % 2:
        raise KvdbError(SYNTAX)
    skip_me = True
    for option, value in zip(args[::2], args[1::2], strict=True):
        word = option.upper()
        if word == b"SKIPME" and value.lower() in (b"yes", b"no"):
            skip_me = value.lower() == b"yes"
        else:
            keeps = _kill_filter(client, word, value)
            clients = [other for other in clients if keeps(other)]
    chosen = [other for other in clients if other is not client or not skip_me]
    _close(client, chosen)
    return len(chosen)


def _kill_filter(client: Client, option: bytes, value: bytes) -> Callable[[Client], bool]:
    if option == b"ID":
        number = parse_int(value, "client-id should be greater than 0")
        if number < 1:
            raise KvdbError("client-id should be greater than 0")
        return lambda other: other.id == number
    if option == b"TYPE":
        kind = _client_type(value)
        return lambda other: _type_of(other) == kind
    if option == b"ADDR":
        return lambda other: other.peer.encode() == value
    if option == b"LADDR":
        return lambda other: other.local.encode() == value
    if option == b"USER":
        if value not in client.server.acl.users:
            raise KvdbError(f"No such user '{value.decode('utf-8', 'surrogateescape')}'")
        return lambda other: other.user.name == value
    if option == b"MAXAGE":
        age = parse_int(value, "maxage is not an integer or out of range")
        return lambda other: client.server.now - other.created >= age
    raise KvdbError(SYNTAX)


def _close(client: Client, chosen: list[Client]) -> None:
    for other in chosen:
        if other is client:
            client.close_after_reply()
        else:
            other.abort()


@handler("CLIENT NO-EVICT")
def no_evict(client: Client, args: list[bytes]) -> Reply:
    """Accepted: kvdb closes no connection to free memory, only one whose own output is over its limit."""
    client.no_evict = _on_off(args[0])
    return OK


@handler("CLIENT NO-TOUCH")
def no_touch(client: Client, args: list[bytes]) -> Reply:
    """Commands of this connection no longer count as use of a key."""
    client.no_touch = _on_off(args[0])
    return OK


def _on_off(word: bytes) -> bool:
    if word.lower() not in (b"on", b"off"):
        raise KvdbError(SYNTAX)
    return word.lower() == b"on"


@handler("CLIENT REPLY")
def reply(client: Client, args: list[bytes]) -> Reply:
    """Switch replies."""
    mode = args[0].upper()
    if mode == b"ON":
        client.replies, client.skip_replies = True, 0
    elif mode == b"OFF":
        client.replies = False
    elif mode == b"SKIP":
        if client.replies:
            client.skip_replies = 2
    else:
        raise KvdbError(SYNTAX)
    client.update_gate()
    return OK


@handler("CLIENT PAUSE")
def pause(client: Client, args: list[bytes]) -> Reply:
    """Hold commands of all clients for a time."""
    timeout_ms = parse_int(args[0], "timeout is not an integer or out of range")
    if timeout_ms < 0:
        raise KvdbError("timeout is negative")
    mode = args[1].upper() if len(args) == 2 else b"ALL"
    if len(args) > 2 or mode not in (b"ALL", b"WRITE"):
        raise KvdbError("CLIENT PAUSE mode must be WRITE or ALL")
    client.server.pause(timeout_ms / 1000, writes_only=mode == b"WRITE")
    return OK


@handler("CLIENT UNPAUSE")
def unpause(client: Client, args: list[bytes]) -> Reply:
    """Let all clients go on."""
    client.server.unpause()
    return OK


@handler("CLIENT UNBLOCK")
def unblock(client: Client, args: list[bytes]) -> Reply:
    """0: no command of kvdb blocks in a way that may be ended from outside; ENGINE CANCEL ends engine work."""
    if len(args) == 2 and args[1].upper() not in (b"TIMEOUT", b"ERROR"):
        raise KvdbError("CLIENT UNBLOCK reason should be TIMEOUT or ERROR")
    parse_int(args[0])
    return 0


@handler("CLIENT TRACKING")
def tracking(client: Client, args: list[bytes]) -> Reply:
    """Client-side caching is not offered; switching it off is always right."""
    if _on_off(args[0]):
        raise KvdbError("client-side caching is not offered by this server")
    return OK


@handler("CLIENT CACHING")
def caching(client: Client, args: list[bytes]) -> Reply:
    """Redis' answer outside of the tracking modes."""
    raise KvdbError(
        "CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode enabled"
    )


@handler("CLIENT TRACKINGINFO")
def trackinginfo(client: Client, args: list[bytes]) -> Reply:
    """Off."""
    no_prefixes: list[Reply] = []
    return {"flags": frozenset({b"off"}), "redirect": -1, "prefixes": no_prefixes}


@handler("CLIENT GETREDIR")
def getredir(client: Client, args: list[bytes]) -> Reply:
    """-1: off."""
    return -1
