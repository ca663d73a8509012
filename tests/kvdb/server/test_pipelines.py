"""Pipelines: what is answered a batch at a time is answered as it is one by one."""

from __future__ import annotations

import pytest

from .conftest import Daemon, request

KEYS = ["short", "missing", "1023", "1024", "expiring", "hash", "large", "short", "gone", "zset", "empty"]


def fill(daemon: Daemon) -> None:
    wire = daemon.wire()
    wire("SET", "short", "abc")
    wire("SET", "1023", "x" * 1023)
    wire("SET", "1024", "y" * 1024)
    wire("SET", "expiring", "e", "PX", "100000")
    wire("HSET", "hash", "f", "v")
    wire("SET", "large", "z" * 300_000)
    wire("SET", "gone", "g")
    wire("DEL", "gone")
    wire("ZADD", "zset", "1", "m")
    wire("SET", "empty", "")


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("n_requests", [2, 16, 64, 65, 500])
def test_pipelined_gets_are_answered_as_single_ones(daemon: Daemon, n_requests: int, is_committed: bool) -> None:
    fill(daemon)
    if is_committed:
        wire = daemon.wire()
        wire("CONFIG", "SET", "appendfsync", "always")
        wire("SET", "another", "1")
        wire("CONFIG", "SET", "appendfsync", "everysec")
    wanted = [KEYS[at * at % len(KEYS)] for at in range(n_requests)]
    single = {key: daemon.wire()("GET", key) for key in set(wanted)}
    wire = daemon.wire()
    wire.raw(b"".join(request("GET", key) for key in wanted))
    assert [wire.reply() for _ in wanted] == [single[key] for key in wanted]


def test_a_pipeline_of_many_commands_keeps_its_order(daemon: Daemon) -> None:
    wire = daemon.wire()
    parts = []
    expected = []
    for at in range(40):
        parts += [request("SET", "k", str(at)), request("GET", "k"), request("GET", "k"), request("get", "k")]
        expected += [("+", b"OK"), *[("$", str(at).encode())] * 3]
    wire.raw(b"".join(parts))
    assert [wire.reply() for _ in expected] == expected


def test_pipelined_gets_are_counted_one_by_one(daemon: Daemon) -> None:
    wire = daemon.wire()
    wire("SET", "k", "v")
    wire("CONFIG", "RESETSTAT")
    wire.raw(request("GET", "k") * 30 + request("GET", "none") * 2)
    for _ in range(32):
        wire.reply()
    text = str(wire("INFO", "everything"))
    assert "cmdstat_get:calls=32," in text
    assert "keyspace_hits:30" in text and "keyspace_misses:2" in text


def test_gets_in_a_transaction_are_queued(daemon: Daemon) -> None:
    wire = daemon.wire()
    wire("SET", "k", "v")
    wire.raw(request("MULTI") + request("GET", "k") * 3 + request("EXEC"))
    assert [wire.reply() for _ in range(4)] == [("+", b"OK")] + [("+", b"QUEUED")] * 3
    assert wire.reply() == ("*", [("$", b"v")] * 3)


def test_hset_in_place_is_seen_and_counted(daemon: Daemon) -> None:
    wire, other = daemon.wire(), daemon.wire()
    assert wire("HSET", "h", "a", "1") == (":", b"1")
    wire("WATCH", "h")
    assert other("HSET", "h", "a", "2") == (":", b"0")
    assert other("HSET", "h", "b", "3") == (":", b"1")
    wire("MULTI")
    wire("PING")
    assert wire("EXEC")[1] is None
    assert other("HGET", "h", "a") == ("$", b"2")
    assert other("HLEN", "h") == (":", b"2")
