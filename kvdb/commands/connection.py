"""PING, ECHO, HELLO, AUTH, SELECT, RESET, QUIT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb import __version__
from kvdb.commands.parse import parse_int
from kvdb.commands.registry import batch_handler, handler
from kvdb.errors import KvdbError, NoAuthError, NoProtoError
from kvdb_protocol.replies import OK, PONG, Encoded, Reply
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client

# Clients choose features by the version of the server: the Redis version whose behaviour kvdb has.
REDIS_VERSION = "7.2.0"


@handler("PING")
def ping(client: Client, args: list[bytes]) -> Reply:
    """PONG, or the message; in RESP2 subscriber mode an array."""
    if not args:
        if client.gated and client.resp == 2 and client.is_subscriber:
            return [b"pong", b""]
        return PONG
    if len(args) > 1:
        raise KvdbError("wrong number of arguments for 'ping' command")
    if client.resp == 2 and client.is_subscriber:
        return [b"pong", args[0]]
    return args[0]


@batch_handler("PING")
def ping_batch(client: Client, requests: list[Request]) -> tuple[int, bytes]:
    """Those without a message."""
    n_plain = next((at for at, request in enumerate(requests) if request != [b"PING"]), len(requests))
    return n_plain, PONG.data * n_plain


@handler("ECHO")
def echo(client: Client, args: list[bytes]) -> Reply:
    """The message."""
    return args[0]


@handler("QUIT")
def quit_(client: Client, args: list[bytes]) -> Reply:
    """OK, then the connection is closed."""
    client.close_after_reply()
    return OK


@handler("RESET")
def reset(client: Client, args: list[bytes]) -> Reply:
    """Back to the state of a new connection."""
    server = client.server
    server.pubsub.forget(client)
    server.observers.forget(client)
    client.set_defaults()
    server.update_gate()
    return Encoded(b"+RESET\r\n")


@handler("SELECT")
def select(client: Client, args: list[bytes]) -> Reply:
    """Choose the database."""
    client.db = database_number(client, args[0])
    return OK


def database_number(client: Client, text: bytes) -> int:
    """A database index from the wire. Raises KvdbError with Redis' text."""
    number = parse_int(text)
    if not 0 <= number < client.server.config.number("databases"):
        raise KvdbError("DB index is out of range")
    return number


@handler("AUTH")
def auth(client: Client, args: list[bytes]) -> Reply:
    """Authenticate as the default user, or as a named one."""
    if len(args) > 2:
        raise KvdbError("syntax error")
    acl = client.server.acl
    if len(args) == 1 and acl.default.is_nopass:
        raise KvdbError(
            "AUTH <password> called without any password configured for the default user. "
            "Are you sure your configuration is correct?"
        )
    acl.authenticate(client, args[0] if len(args) == 2 else b"default", args[-1])
    return OK


@handler("HELLO")
def hello(client: Client, args: list[bytes]) -> Reply:
    """Choose the protocol version, authenticate and name the connection in one step."""
    version = client.resp
    rest = args[1:]
    if args:
        try:
            version = parse_int(args[0])
        except KvdbError:
            raise KvdbError("Protocol version is not an integer or out of range") from None
        if version not in (2, 3):
            raise NoProtoError("unsupported protocol version")
    credentials: tuple[bytes, bytes] | None = None
    name: bytes | None = None
    while rest:
        option = rest[0].upper()
        if option == b"AUTH" and len(rest) > 2:
            credentials = (rest[1], rest[2])
            rest = rest[3:]
        elif option == b"SETNAME" and len(rest) > 1:
            name = rest[1]
            check_name(name, "Client names")
            rest = rest[2:]
        else:
            raise KvdbError(f"Syntax error in HELLO option '{rest[0].decode('utf-8', 'surrogateescape')}'")
    if credentials is not None:
        client.server.acl.authenticate(client, *credentials)
    if not client.authenticated:
        raise NoAuthError(
            "HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> "
            "<pass> option can be used to authenticate the client and select the RESP protocol version at the same time"
        )
    if name is not None:
        client.name = name
    client.resp = version
    client.update_gate()
    no_modules: list[Reply] = []
    return {
        "server": "redis",
        "version": REDIS_VERSION,
        "proto": version,
        "id": client.id,
        "mode": "standalone",
        "role": "master",
        "modules": no_modules,
        "kvdb_version": __version__,
    }


def check_name(name: bytes, what: str) -> None:
    """Names of clients and libraries: printable ASCII without spaces."""
    if any(byte <= 0x20 or byte > 0x7E for byte in name):
        raise KvdbError(f"{what} cannot contain spaces, newlines or special characters.")
