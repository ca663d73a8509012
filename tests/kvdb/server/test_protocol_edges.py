"""Bad input on a live daemon: what measurements of Redis 7 say, and the daemon lives on."""

from __future__ import annotations

import random
import socket
import time

import pytest

from .conftest import Daemon, StartDaemon, Wire, request

# input, what comes back, whether the connection is closed
EDGES = [
    (b"x" * 70_000, b"-ERR Protocol error: too big inline request\r\n", True),
    (b'set "a\r\n', b"-ERR Protocol error: unbalanced quotes in request\r\n", True),
    (b"*abc\r\n", b"-ERR Protocol error: invalid multibulk length\r\n", True),
    (b"*2147483648\r\n", b"-ERR Protocol error: invalid multibulk length\r\n", True),
    (b"*1\r\nx", b"-ERR Protocol error: expected '$', got 'x'\r\n", True),
    (b"*1\r\n$-1\r\n", b"-ERR Protocol error: invalid bulk length\r\n", True),
    (b"*1\r\n$4\r\nPINGxx", b"-ERR Protocol error: invalid CRLF in request\r\n", True),
    (b"*0\r\n*-1\r\n\r\nPING\r\n", b"+PONG\r\n", False),
    (b"%1\r\n", b"-ERR unknown command '%1', with args beginning with: \r\n", False),
    (b"+PING\r\n", b"-ERR unknown command '+PING', with args beginning with: \r\n", False),
    (b"=8\r\n", b"-ERR unknown command '=8', with args beginning with: \r\n", False),
    (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"", True),
    (b"Host: evil\r\n", b"", True),
    (request("NOSUCH", "a\r\nb", "c" * 200), None, False),
    (request("HELLO", "4"), b"-NOPROTO unsupported protocol version\r\n", False),
    (request("HELLO", "1"), b"-NOPROTO unsupported protocol version\r\n", False),
    (request("HELLO", "abc"), b"-ERR Protocol version is not an integer or out of range\r\n", False),
    (request("GET"), b"-ERR wrong number of arguments for 'get' command\r\n", False),
    (request("CONFIG"), b"-ERR wrong number of arguments for 'config' command\r\n", False),
    (request("CONFIG", "NOPE"), b"-ERR unknown subcommand 'NOPE'. Try CONFIG HELP.\r\n", False),
    (request("CONFIG", "GET"), b"-ERR wrong number of arguments for 'config|get' command\r\n", False),
    (request("SELECT", "16"), b"-ERR DB index is out of range\r\n", False),
    (request("QUIT"), b"+OK\r\n", True),
]


@pytest.mark.parametrize(("data", "expected", "closes"), EDGES, ids=[repr(edge[0][:24]) for edge in EDGES])
def test_edges(daemon: Daemon, data: bytes, expected: bytes | None, closes: bool) -> None:
    wire = daemon.wire()
    wire.raw(data)
    if closes:
        assert wire.rest() == expected
        assert daemon.wire()("PING") == ("+", b"PONG")
        return
    if expected is None:
        kind, line = wire.reply()
        assert kind == "-" and b"\n" not in line and len(line) < 300  # type: ignore[operator, arg-type]
    else:
        assert wire.file.read(len(expected)) == expected
    assert wire("PING") == ("+", b"PONG")


def test_half_a_command_then_gone(daemon: Daemon) -> None:
    for data in (b"*3\r\n$3\r\nSET\r\n$1\r\nk", b"*1", b"$", b"SET a", b"*1\r\n$1000000\r\nabc"):
        wire = daemon.wire()
        wire.raw(data)
        wire.close()
    assert daemon.wire()("PING") == ("+", b"PONG")


def test_noise(daemon: Daemon) -> None:
    """Random bytes, mutated requests, closed at random: after each batch the daemon answers."""
    rng = random.Random(20260301)
    good = [
        request("SET", "k", "v"),
        request("ZADD", "z", "1", "a"),
        b"PING\r\n",
        request("HELLO", "3"),
        request("MULTI"),
    ]
    for _ in range(20):
        wires: list[Wire] = []
        for _ in range(25):
            data = bytearray(rng.choice(good) * rng.randint(1, 3) if rng.random() < 0.7 else rng.randbytes(60))
            for _ in range(rng.randint(0, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            wire = daemon.wire()
            wire.raw(bytes(data))
            wires.append(wire)
        for wire in wires:
            wire.close()
        assert daemon.wire()("PING") == ("+", b"PONG")


def test_subscriber_mode(daemon: Daemon) -> None:
    wire = daemon.wire()
    assert wire("SUBSCRIBE", "c") == ("*", [("$", b"subscribe"), ("$", b"c"), (":", b"1")])
    assert wire("GET", "a")[1].startswith(b"ERR Can't execute 'get': only (P|S)SUBSCRIBE / ")  # type: ignore[attr-defined]
    assert wire("PING") == ("*", [("$", b"pong"), ("$", b"")])
    assert wire("RESET") == ("+", b"RESET")
    assert wire("GET", "a") == ("$", None)


def test_maxclients(start: StartDaemon) -> None:
    daemon = start(maxclients=3)
    kept = [daemon.wire() for _ in range(3)]
    assert [wire("PING") for wire in kept] == [("+", b"PONG")] * 3
    assert daemon.wire().rest() == b"-ERR max number of clients reached\r\n"
    kept.pop().close()
    for _ in range(100):  # the close is seen a moment later
        late = daemon.wire()
        try:
            if late("PING") == ("+", b"PONG"):
                break
        except ConnectionError:
            continue
    else:
        pytest.fail("no place became free")


def test_unread_replies_are_not_held(daemon: Daemon, wire: Wire) -> None:
    """A client that asks for 200 values of 8 MiB and never reads makes Redis hold 1.7 GB."""
    wire("SET", "big", bytes(8 << 20))
    before = rss(daemon.process.pid)
    greedy = daemon.wire()
    greedy.raw(request("GET", "big") * 200)
    for _ in range(20):
        assert wire("PING") == ("+", b"PONG")
    assert rss(daemon.process.pid) - before < 64 << 20
    size = 0
    while size < 200 * (len(b"$8388608\r\n") + (8 << 20) + 2):
        piece = greedy.sock.recv(1 << 20)
        assert piece, "closed early"
        size += len(piece)
    wire("DEL", "big")


def rss(pid: int) -> int:
    import resource
    from pathlib import Path

    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_slow_subscriber_is_closed(start: StartDaemon) -> None:
    daemon = start(client_output_buffer_limit="pubsub 1mb 0 0")
    slow, fast = daemon.wire(), daemon.wire()
    slow("SUBSCRIBE", "c")
    counts = [fast("PUBLISH", "c", bytes(100_000)) for _ in range(60)]
    assert counts[0] == (":", b"1") and counts[-1] == (":", b"0")
    assert b"closed" in daemon.log().encode()


def test_commands_of_a_gone_client_are_dropped(daemon: Daemon, wire: Wire) -> None:
    gone = daemon.wire()
    gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.raw(request("SET", "k", "1"))
    gone.close()
    assert wire("PING") == ("+", b"PONG")


def test_an_endless_request_is_closed(start: StartDaemon) -> None:
    daemon = start(client_query_buffer_limit="1mb")
    wire = daemon.wire()
    wire.raw(b"*100\r\n")
    with pytest.raises(OSError):
        for _ in range(100):
            wire.raw(b"$100000\r\n" + bytes(100_000) + b"\r\n")
        wire.reply()
    assert daemon.wire()("PING") == ("+", b"PONG")


def test_a_monitor_that_does_not_read_is_closed(start: StartDaemon) -> None:
    daemon = start(client_output_buffer_limit="replica 1mb 0 0")
    monitor, wire = daemon.wire(), daemon.wire()
    assert monitor("MONITOR") == ("+", b"OK")
    for _ in range(60):
        wire("SET", "k", bytes(50_000))
    assert b"flags=O" not in wire("CLIENT", "LIST")[1]  # type: ignore[operator]


def test_many_keys_expire_together(start: StartDaemon) -> None:
    wire = start().wire()
    wire.raw(b"".join(request("SET", n, "x", "PX", "300") for n in range(20_000)))
    for _ in range(20_000):
        wire.reply()
    until = time.monotonic() + 20
    while wire("DBSIZE") != (":", b"0"):
        assert time.monotonic() < until
