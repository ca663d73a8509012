"""Large strings over the wire: received into a segment, sent from one, in order, whole, and never whole in memory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from kvdb.net.send_buffers import LARGE_BYTES, N_LARGE
from kvdb_tools.daemon import rss_bytes

from .conftest import Daemon, StartDaemon, Wire, free_port, request

OK = ("+", b"OK")
MIB = 1 << 20
BIG = random.Random(2).randbytes(3 * MIB + 11)
OTHER = random.Random(3).randbytes(MIB)


def stats(wire: Wire) -> dict[bytes, int]:
    flat = wire("STORE", "STATS")[1]
    values = [value for _, value in flat]  # type: ignore[misc,attr-defined]
    return dict(zip(values[::2], map(int, values[1::2]), strict=True))


def wait_until_free(wire: Wire, *, writes: bool = True) -> None:
    """The bytes of strings that nobody needs are given back by a later round."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if writes:
            wire("SET", "tick", time.monotonic_ns())
            wire("SAVE")
        found = stats(wire)
        if found[b"strings"] == 0 and found[b"segments_disk"] < MIB:
            return
        time.sleep(0.05)
    raise AssertionError(found)


def most_in_memory(wire: Wire) -> int:
    """The most bytes of an unfinished request that any connection holds."""
    clients = bytes(wire("CLIENT", "LIST")[1])  # type: ignore[arg-type]
    return max(int(word[5:]) for word in clients.split() if word.startswith(b"qbuf="))


def send_aside(wire: Wire, data: bytes) -> None:
    """Send while replies are read: a server that waits for its client to read does not read on itself."""
    threading.Thread(target=wire.raw, args=(data,), daemon=True).start()


def test_a_pipeline_keeps_its_order(wire: Wire) -> None:
    send_aside(
        wire,
        request("SET", "n", 1)
        + request("SET", "a", BIG)
        + request("GET", "a")
        + request("INCR", "n")
        + request("SET", "b", OTHER)
        + request("SET", "a", OTHER)
        + request("STRLEN", "a")
        + request("MGET", "a", "b", "n", "none")
        + request("GET", "n"),
    )
    assert [wire.reply() for _ in range(7)] == [OK, OK, ("$", BIG), (":", b"2"), OK, OK, (":", b"%d" % MIB)]
    assert wire.reply() == ("*", [("$", OTHER), ("$", OTHER), ("$", b"2"), ("$", None)])
    assert wire.reply() == ("$", b"2")


def test_transactions(wire: Wire, daemon: Daemon) -> None:
    other = daemon.wire()
    wire.raw(request("MULTI") + request("SET", "a", BIG) + request("GET", "a") + request("SET", "b", OTHER))
    assert [wire.reply() for _ in range(4)] == [OK, *[("+", b"QUEUED")] * 3]
    assert other("EXISTS", "a") == (":", b"0")
    assert wire("EXEC") == ("*", [OK, ("$", BIG), OK])
    assert other("GET", "b") == ("$", OTHER)
    for end, answer in (("DISCARD", OK), ("EXEC", ("*", None))):
        assert wire("WATCH", "a") == OK
        assert (wire("MULTI"), wire("SET", "a", BIG[::-1])) == (OK, ("+", b"QUEUED"))
        assert other("SET", "a", "x") == OK
        assert wire(end) == answer
        assert wire("GET", "a") == ("$", b"x")
    assert wire("DEL", "a", "b") == (":", b"2")
    wait_until_free(wire)


def test_a_broken_off_upload_leaves_nothing(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    wire("SET", "k", "old")
    for cut in (len(BIG) // 2, len(BIG) + 31, 60):
        half = daemon.wire()
        half.raw(request("SET", "k", BIG)[:cut])
        time.sleep(0.05)
        half.close()
    assert wire("GET", "k") == ("$", b"old")
    wrong = daemon.wire()
    wrong.raw(request("PING") + request("SET", "k", BIG)[:-2] + b"xx" + request("PING"))
    assert wrong.reply() == ("+", b"PONG")
    assert wrong.reply() == ("-", b"ERR Protocol error: invalid CRLF in request")
    assert wrong.rest() == b""
    assert wire("GET", "k") == ("$", b"old")
    wait_until_free(wire)


def test_replies_as_in_redis(redis_daemon: Daemon, daemon: Daemon) -> None:
    ours, theirs = daemon.wire(), redis_daemon.wire()
    rows = (
        ("FLUSHALL",),
        ("SETNX", "a", BIG), ("SETNX", "a", OTHER), ("STRLEN", "a"), ("TYPE", "a"), ("OBJECT", "ENCODING", "a"),
        ("GETRANGE", "a", 0, 10), ("GETRANGE", "a", 262_140, 262_150), ("SUBSTR", "a", -7, -1),
        ("GETRANGE", "a", MIB, 2 * MIB), ("GETRANGE", "a", 9_999_999, -1), ("GETRANGE", "a", 0, -1),
        ("SET", "a", OTHER, "NX"), ("SET", "b", OTHER, "XX"), ("SET", "a", OTHER, "GET"), ("SET", "b", BIG, "GET"),
        ("SET", "b", OTHER, "EX", 100, "GET"), ("TTL", "b"), ("SET", "b", BIG, "KEEPTTL"), ("TTL", "b"),
        ("PERSIST", "b"), ("TTL", "b"), ("SETEX", "c", 100, BIG), ("PSETEX", "d", 100_000, OTHER), ("TTL", "c"),
        ("SETEX", "c", 0, BIG), ("SETEX", "c", "x", BIG), ("SET", "c", BIG, "BAD"), ("SET", "c", BIG, "EX"),
        ("GETSET", "c", OTHER), ("GETEX", "c", "PERSIST"), ("GETDEL", "c"), ("EXISTS", "c"),
        ("MSET", "x", BIG, "y", "small", "z", OTHER), ("MSETNX", "w", BIG, "x", OTHER), ("MSETNX", "w", BIG),
        ("MGET", "w", "x", "y", "z"), ("MSET", "x", BIG, "y"), ("SET", BIG, "a large key"), ("GET", BIG),
        ("DEL", BIG), ("APPEND", "z", BIG), ("GET", "z"), ("SETRANGE", "z", 5, OTHER), ("GET", "z"),
        ("HSET", "h", "f", BIG), ("HGET", "h", "f"), ("SETNX", "h", BIG), ("GET", "h"), ("GETSET", "h", BIG),
        ("RENAME", "z", "r"), ("RENAMENX", "r", "x"), ("COPY", "r", "s"), ("COPY", "r", "x"), ("DEL", "r"),
        ("GET", "s"), ("COPY", "s", "s2"), ("DEL", "s"), ("GET", "s2"), ("INCR", "s2"), ("DBSIZE",),
        ("ECHO", OTHER), ("PING", OTHER), ("NOSUCH", BIG), ("SET", "t"), ("GET", "t"), ("MOVE", "s2", 1),
        ("SELECT", 1), ("GET", "s2"), ("DEL", "s2"), ("SELECT", 0),
    )  # fmt: skip
    for row in rows:
        assert ours(*row) == theirs(*row), row[:2]


def test_through_tls(start: StartDaemon, certificate: Path) -> None:
    port = free_port()
    start(tls_port=port, tls_auth_clients="no", tls_cert_file=certificate / "crt", tls_key_file=certificate / "key")
    context = ssl.create_default_context(cafile=str(certificate / "crt"))
    context.check_hostname = False
    wire = Wire.__new__(Wire)
    wire.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10))
    wire.file = wire.sock.makefile("rb")
    wire.raw(request("SET", "k", BIG) + request("GET", "k") + request("PING"))
    assert [wire.reply() for _ in range(3)] == [OK, ("$", BIG), ("+", b"PONG")]
    long = BIG * 8
    assert wire("SET", "long", long) == OK
    wire.send("GET", "long")
    time.sleep(0.3)  # more waits in the daemon than the kernel takes
    assert wire.reply() == ("$", long)
    wire.close()


def test_memory_stays_bounded(start: StartDaemon) -> None:
    daemon = start(port=True)
    wire = daemon.tcp()
    wire("SET", "warm", BIG)
    wire("GET", "warm")
    before = rss_bytes(daemon.process.pid)
    n_mib = 192
    wire.raw(b"*3\r\n$3\r\nSET\r\n$4\r\nhuge\r\n$%d\r\n" % (n_mib * MIB))
    peak = 0
    for at in range(n_mib):
        wire.raw(OTHER)
        if at % 16 == 0:
            peak = max(peak, rss_bytes(daemon.process.pid))
    wire.raw(b"\r\n")
    assert wire.reply() == OK
    wire.send("GET", "huge")
    assert wire.file.readline() == b"$%d\r\n" % (n_mib * MIB)
    for at in range(n_mib):
        assert wire.file.read(MIB) == OTHER
        if at % 16 == 0:
            peak = max(peak, rss_bytes(daemon.process.pid))
    assert wire.file.read(2) == b"\r\n"
    unread = daemon.tcp()
    unread.raw(request("GET", "huge") * 200)
    time.sleep(0.3)
    peak = max(peak, rss_bytes(daemon.process.pid))
    assert peak - before < 32 * MIB
    assert wire("DEL", "huge") == (":", b"1")
    unread.close()
    wait_until_free_but_warm(wire)


def test_clients_that_do_not_read_share_few_large_buffers(start: StartDaemon) -> None:
    daemon = start(port=True)
    wire = daemon.tcp()
    value = BIG * 8
    assert wire("SET", "k", value) == OK
    assert wire("GET", "k") == ("$", value)
    before = rss_bytes(daemon.process.pid)
    waiting = [daemon.tcp() for _ in range(3 * N_LARGE)]
    for one in waiting:
        one.send("GET", "k")
    time.sleep(0.5)
    grown = rss_bytes(daemon.process.pid) - before
    assert grown < N_LARGE * LARGE_BYTES + 3 * N_LARGE * (256 << 10) + 4 * MIB
    assert wire("GET", "k") == ("$", value), "one who finds no large buffer"
    for one in waiting[::2]:
        assert one.reply() == ("$", value)
    for one in waiting:  # half of them in the middle of the string
        one.close()
    assert wire("GET", "k") == ("$", value)


def wait_until_free_but_warm(wire: Wire) -> None:
    """A range that a reader held is given back when the reader is gone."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        wire("SAVE")
        if stats(wire)[b"segments_disk"] < 8 * MIB:
            return
        time.sleep(0.05)
    raise AssertionError(stats(wire))


def test_a_reader_keeps_what_it_reads(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    value = random.Random(4).randbytes(MIB) * 24
    assert wire("SET", "k", value) == OK and wire("SAVE") == OK
    slow = daemon.wire()
    slow.send("GET", "k")
    assert slow.file.readline() == b"$%d\r\n" % len(value)
    assert wire("DEL", "k") == (":", b"1")
    for _ in range(3):
        wire("SET", "n", 1)
        wire("SAVE")
        wire("STORE", "GC")
    time.sleep(0.2)
    assert slow.file.read(len(value)) == value
    slow.close()
    wait_until_free(wire)


def test_over_the_budget_it_is_refused_before_it_comes(start: StartDaemon) -> None:
    wire = start(maxstore="8mb").wire()
    wire("SET", "k", "old")
    wire.raw(request("SET", "k", OTHER * 12) + request("PING"))
    kind, line = wire.reply()
    assert kind == "-" and line.startswith(b"NOSPACE maxstore is 8388608 bytes and 12")  # type: ignore[attr-defined]
    assert wire.reply() == ("+", b"PONG")
    assert wire("GET", "k") == ("$", b"old")
    assert wire("MULTI") == OK
    assert wire("SET", "k", OTHER * 12)[0] == "-"
    assert wire("EXEC")[1].startswith(b"EXECABORT")  # type: ignore[attr-defined]
    assert wire("SET", "k", OTHER * 2) == OK


def test_what_is_refused_is_given_back_without_any_write(start: StartDaemon) -> None:
    wire = start().wire()
    assert wire("SET", "k", "old") == OK
    for _ in range(3):
        assert wire("SET", "k", BIG, "NX")[1] is None
    wait_until_free(wire, writes=False)
    assert wire("GET", "k") == ("$", b"old")


def test_who_may_not_write_leaves_nothing(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    assert wire("ACL", "SETUSER", "reader", "on", "nopass", "+get", "~*") == OK
    reader = daemon.wire()
    assert reader("AUTH", "reader", "x") == OK
    # Its bytes are gathered in memory, as in Redis: no room is made for them on the disk, which might evict.
    data = request("SET", "k", BIG)
    reader.raw(data[: len(data) // 2])
    until = time.monotonic() + 10
    while most_in_memory(wire) < MIB and time.monotonic() < until:
        time.sleep(0.01)
    assert most_in_memory(wire) >= MIB
    assert stats(wire)[b"segments_disk"] < MIB
    reader.raw(data[len(data) // 2 :])
    assert reader.reply()[1].startswith(b"NOPERM")  # type: ignore[union-attr]
    assert wire("EXISTS", "k") == (":", b"0")
    wait_until_free(wire)
    wire("ACL", "DELUSER", "reader")


def test_observers_see_how_it_begins(wire: Wire, daemon: Daemon) -> None:
    monitor = daemon.wire()
    assert monitor("MONITOR") == OK
    wire("CONFIG", "SET", "slowlog-log-slower-than", 0)
    assert wire("SET", "k", b"the beginning" + BIG) == OK
    wire("CONFIG", "SET", "slowlog-log-slower-than", 10_000)
    line = monitor.reply()[1]
    assert b'"SET" "k" "the beginning' in line and len(line) < 2000  # type: ignore[operator,arg-type]
    entries = wire("SLOWLOG", "GET", 10)[1]
    assert any(b"the beginning" in str(entry).encode() for entry in entries)  # type: ignore[attr-defined]
    monitor.close()
    wire("SLOWLOG", "RESET")


@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
def test_acknowledged_is_kept_over_a_kill(start: StartDaemon, appendfsync: str) -> None:
    daemon = start(appendfsync=appendfsync)
    wire = daemon.wire()
    assert (
        wire("SET", "k", BIG) == OK and wire("EXPIRE", "k", 1000) == (":", b"1") and wire("COPY", "k", "l")[1] == b"1"
    )
    if appendfsync == "everysec":
        assert wire("SAVE") == OK
    half = daemon.wire()
    half.raw(request("SET", "k", OTHER * 5)[: 3 * MIB])
    daemon.stop(signal.SIGKILL)
    wire = start(daemon.folder).wire()
    assert wire("GET", "k") == ("$", BIG) and wire("GET", "l") == ("$", BIG)
    assert wire("STORE", "VERIFY", "DEEP")[1][1] == (":", b"0")  # type: ignore[index]
    assert stats(wire)[b"strings"] < len(BIG) + 8192


def test_damage_is_never_served(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    for key, rest in (("first", BIG), ("later", BIG * 2), ("good", BIG)):
        assert wire("SET", key, key.encode() + os.urandom(8) + rest) == OK
    assert wire("SAVE") == OK
    (path,) = (daemon.folder / "data" / "segments").glob("*.seg")
    data = bytearray(path.read_bytes())
    data[data.index(b"first") + 100] ^= 1
    data[data.index(b"later") + LARGE_BYTES + MIB] ^= 1
    path.write_bytes(data)
    kind, line = wire("GET", "first")
    assert kind == "-" and line.startswith(b"CORRUPT string")  # type: ignore[attr-defined]
    assert wire("STRLEN", "first") == (":", b"%d" % (len(BIG) + 13))
    assert wire("GETRANGE", "first", MIB, MIB + 9)[0] == "$"
    assert wire("GETRANGE", "first", 0, 9)[1].startswith(b"CORRUPT")  # type: ignore[attr-defined]
    assert wire("MGET", "first", "good")[1][0][1].startswith(b"CORRUPT")  # type: ignore[index]
    wire.send("GET", "later")
    came = wire.rest()
    assert came.startswith(b"$") and len(came) < LARGE_BYTES + MIB, "the connection ends before a wrong byte is sent"
    wire = daemon.wire()
    assert wire("GET", "good")[1].endswith(BIG)  # type: ignore[union-attr]
    assert wire("DEL", "first", "later") == (":", b"2")
    assert "CORRUPT" in daemon.log()


def test_a_segment_that_was_cut_is_never_served_from_what_a_buffer_still_holds(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    assert wire("SET", "k", BIG) == OK and wire("SAVE") == OK
    assert wire("GET", "k") == ("$", BIG)
    (path,) = (daemon.folder / "data" / "segments").glob("*.seg")
    os.truncate(path, 2 * MIB)
    assert wire("GET", "k")[1].startswith(b"CORRUPT string")  # type: ignore[attr-defined]


def test_it_ends_while_strings_come_in(start: StartDaemon) -> None:
    """Those who wait for a commit when it is told to end go on sending until the store is closed."""
    daemon = start(appendfsync="always")
    load = request("SET", "a", "1") + request("SET", "k", bytes(40 * MIB))

    def send(wire: Wire) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire.raw(load)

    def read(wire: Wire) -> None:
        with contextlib.suppress(OSError):
            while wire.sock.recv(65536):
                pass

    for _ in range(4):
        wire = daemon.wire()
        for work in (send, read):
            threading.Thread(target=work, args=(wire,), daemon=True).start()
    time.sleep(0.5)
    assert daemon.stop() == 0
