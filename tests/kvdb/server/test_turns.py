"""What arrives in one turn of the loop, in several reads: replies in order and durable, nobody left out.

The kernel may hold more than one read takes; here the reads are made by hand, so that they fall into one turn.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from kvdb.errors import KvdbError
from kvdb.net.client import Client
from kvdb.net.service import Server
from server.conftest import StartDaemon, free_port, request

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LARGE = 2_000_000


async def connect(server: Server) -> tuple[Streams, Client]:
    known = set(server.clients)
    reader, writer = await asyncio.open_unix_connection(server.config.text("unixsocket"))
    writer.write(request("PING"))
    assert await reader.readline() == b"+PONG\r\n"
    (number,) = set(server.clients) - known
    return (reader, writer), server.clients[number]


async def in_one_turn(*calls: Callable[[], object]) -> None:
    def run() -> None:
        for call in calls:
            call()

    asyncio.get_running_loop().call_soon(run)
    await asyncio.sleep(0.05)


async def read(streams: Streams) -> bytes:
    try:
        return await asyncio.wait_for(streams[0].read(1000), 0.2)
    except TimeoutError:
        return b""


@pytest.mark.parametrize("fails", [False, True])
async def test_no_reply_overtakes_its_commit(server: Server, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    server.config.set([("appendfsync", "always")])
    streams, client = await connect(server)
    gate, real = asyncio.Event(), server.keyspace.flush

    async def flush() -> None:
        await gate.wait()
        if fails:
            raise KvdbError("the disk is gone")
        await real()

    monkeypatch.setattr(server.keyspace, "make_durable", flush)
    await in_one_turn(
        lambda: client.data_received(request("GET", "none")), lambda: client.data_received(request("SET", "a", "1"))
    )
    assert b"OK" not in await read(streams)
    gate.set()
    await asyncio.sleep(0.05)
    streams[1].write(request("PING"))
    rest = await asyncio.wait_for(streams[0].readuntil(b"+PONG\r\n"), 5)
    assert rest.endswith((b"-ERR the disk is gone\r\n" if fails else b"+OK\r\n") + b"+PONG\r\n")
    monkeypatch.undo()


@pytest.mark.parametrize("mute", [("OFF",), ("SKIP",)])
async def test_a_muted_write_that_fails_stops_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch, mute: tuple[str]
) -> None:
    """Its error belongs to no reply: neither to the next one nor to one that is not there."""
    streams, _ = await connect(server)
    streams[1].write(request("CONFIG", "SET", "appendfsync", "always"))
    assert await streams[0].readline() == b"+OK\r\n"

    async def fail() -> None:
        raise KvdbError("the disk is gone")

    monkeypatch.setattr(server.keyspace, "flush", fail)
    streams[1].write(request("CLIENT", "REPLY", *mute) + request("SET", "a", "1") + request("GET", "none"))
    await asyncio.sleep(0.05)
    streams[1].write(request("CLIENT", "REPLY", "ON") + request("PING"))
    wanted = (b"" if mute == ("OFF",) else b"$-1\r\n") + b"+OK\r\n+PONG\r\n"
    assert await asyncio.wait_for(streams[0].readexactly(len(wanted)), 5) == wanted
    monkeypatch.undo()


async def test_a_large_string_and_what_comes_before_it(server: Server) -> None:
    streams, client = await connect(server)
    other, neighbour = await connect(server)
    streams[1].write(request("SET", "large", b"x" * LARGE))
    assert await streams[0].readline() == b"+OK\r\n"
    await in_one_turn(
        lambda: client.data_received(request("GET", "none")),
        lambda: client.data_received(request("GET", "large") + request("PING")),
        lambda: neighbour.data_received(request("SET", "a", "1")),
    )
    assert await read(other) == b"+OK\r\n"
    wanted = b"$-1\r\n$%d\r\n" % LARGE + b"x" * LARGE + b"\r\n+PONG\r\n"
    assert await asyncio.wait_for(streams[0].readexactly(len(wanted)), 5) == wanted


async def test_one_whose_replies_cannot_be_sent_holds_up_nobody(server: Server) -> None:
    streams, client = await connect(server)
    other, neighbour = await connect(server)

    class Broken:
        """A transport whose write fails."""

        def write(self, data: bytes) -> None:
            raise RuntimeError("broken")

        def abort(self) -> None:
            transport.abort()

    transport, client.transport = client.transport, cast(Any, Broken())
    await in_one_turn(lambda: client.data_received(request("PING")), lambda: neighbour.data_received(request("PING")))
    assert await read(other) == b"+PONG\r\n"
    assert await read(streams) == b"" and streams[0].at_eof()


async def test_a_request_with_the_end_of_the_stream_behind_it(server: Server) -> None:
    streams, client = await connect(server)
    await in_one_turn(lambda: client.data_received(request("PING")), client.eof_received, client.transport.close)
    assert await read(streams) == b"+PONG\r\n"


def test_the_same_over_tls(start: StartDaemon, certificate: Path) -> None:
    """Request and close_notify in one segment: uvloop closes a TLS transport in the very call that delivers both."""
    port = free_port()
    start(tls_port=port, tls_auth_clients="no", tls_cert_file=certificate / "crt", tls_key_file=certificate / "key")
    assert ask_and_close(port, request("PING")) == b"+PONG\r\n"


def ask_and_close(port: int, data: bytes) -> bytes:
    """Send `data` and the end of the TLS stream in one segment; what is answered."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(received, to_send)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(to_send.read())
                received.write(sock.recv(65536))
        tls.write(data)
        try:
            tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        sock.sendall(to_send.read())
        try:
            while more := sock.recv(65536):
                received.write(more)
        except OSError:
            pass
    found = b""
    try:
        while more := tls.read(65536):
            found += more
    except ssl.SSLError:
        pass
    return found
