"""Publish and subscribe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.registry import handler
from kvdb.glob import matches
from kvdb_protocol.replies import Encoded, Push, Reply, encode

if TYPE_CHECKING:
    from kvdb.net.client import Client


def _confirm(client: Client, kind: bytes, name: bytes | None) -> bytes:
    count = len(client.channels) + len(client.patterns)
    return encode(Push((kind, name, count)), client.resp)


def _subscribe(client: Client, names: list[bytes], kind: bytes, *, is_pattern: bool) -> Reply:
    out = b""
    for name in names:
        client.server.pubsub.subscribe(client, name, is_pattern=is_pattern)
        out += _confirm(client, kind, name)
    client.update_gate()
    return Encoded(out)


def _unsubscribe(client: Client, names: list[bytes], kind: bytes, *, is_pattern: bool) -> Reply:
    own = client.patterns if is_pattern else client.channels
    out = b""
    for name in names or list(own):
        client.server.pubsub.unsubscribe(client, name, is_pattern=is_pattern)
        out += _confirm(client, kind, name)
    client.update_gate()
    return Encoded(out or _confirm(client, kind, None))


@handler("SUBSCRIBE")
def subscribe(client: Client, args: list[bytes]) -> Reply:
    """One confirmation a channel."""
    return _subscribe(client, args, b"subscribe", is_pattern=False)


@handler("PSUBSCRIBE")
def psubscribe(client: Client, args: list[bytes]) -> Reply:
    """One confirmation a pattern."""
    return _subscribe(client, args, b"psubscribe", is_pattern=True)


@handler("UNSUBSCRIBE")
def unsubscribe(client: Client, args: list[bytes]) -> Reply:
    """One confirmation a channel; without arguments, of all."""
    return _unsubscribe(client, args, b"unsubscribe", is_pattern=False)


@handler("PUNSUBSCRIBE")
def punsubscribe(client: Client, args: list[bytes]) -> Reply:
    """One confirmation a pattern; without arguments, of all."""
    return _unsubscribe(client, args, b"punsubscribe", is_pattern=True)


@handler("PUBLISH")
def publish(client: Client, args: list[bytes]) -> Reply:
    """How many got the message."""
    return client.server.pubsub.publish(args[0], args[1])


@handler("PUBSUB CHANNELS")
def channels(client: Client, args: list[bytes]) -> Reply:
    """Channels somebody listens to."""
    return [name for name in client.server.pubsub.channels if not args or matches(args[0], name)]


@handler("PUBSUB NUMPAT")
def numpat(client: Client, args: list[bytes]) -> Reply:
    """Number of patterns."""
    return len(client.server.pubsub.patterns)


@handler("PUBSUB NUMSUB")
def numsub(client: Client, args: list[bytes]) -> Reply:
    """Listeners of each channel."""
    reply: list[Reply] = []
    for name in args:
        reply += [name, len(client.server.pubsub.channels.get(name, ()))]
    return reply
