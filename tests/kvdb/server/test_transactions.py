"""MULTI, WATCH, keyspace events, pub/sub, MONITOR, CLIENT: what one connection sees of another."""

from __future__ import annotations

import time

import pytest

from .conftest import Daemon, Wire, request

OK = ("+", b"OK")


@pytest.fixture
def other(daemon: Daemon) -> Wire:
    return daemon.wire()


@pytest.mark.parametrize(
    ("change", "breaks"),
    [
        (("SET", "k", "2"), True),
        (("DEL", "k"), True),
        (("EXPIRE", "k", "100"), True),
        (("RENAME", "k", "j"), True),
        (("FLUSHALL",), True),
        (("APPEND", "k", ""), True),
        (("SET", "j", "2"), False),
        (("GET", "k"), False),
        (("DEL", "nosuch"), False),
    ],
)
def test_watch(wire: Wire, other: Wire, change: tuple[str, ...], breaks: bool) -> None:
    wire("SET", "k", "1")
    wire("WATCH", "k")
    other(*change)
    wire("MULTI")
    wire("SET", "result", "1")
    assert (wire("EXEC") == ("*", None)) is breaks


def test_watch_sees_expiry(wire: Wire) -> None:
    wire("SET", "k", "1", "PX", "30")
    wire("WATCH", "k")
    time.sleep(0.05)
    wire("MULTI")
    wire("PING")
    assert wire("EXEC") == ("*", None)


def test_a_bad_command_aborts(wire: Wire) -> None:
    wire("MULTI")
    assert wire("NOSUCH")[0] == "-"
    wire("SET", "k", "1")
    assert wire("EXEC") == ("-", b"EXECABORT Transaction discarded because of previous errors.")
    assert wire("GET", "k") == ("$", None)


def test_a_failing_command_does_not_stop_the_others(wire: Wire) -> None:
    wire("SET", "k", "x")
    wire("MULTI")
    wire("INCR", "k")
    wire("SET", "j", "1")
    _, replies = wire("EXEC")
    assert replies[0][0] == "-" and replies[1] == OK  # type: ignore[index]


def test_commands_that_wait_cannot_be_queued(wire: Wire) -> None:
    wire("MULTI")
    assert wire("SAVE")[1].startswith(b"ERR Command not allowed inside a transaction")  # type: ignore[attr-defined]
    wire("DISCARD")


def test_transactions_do_not_mix(wire: Wire, other: Wire) -> None:
    wire("MULTI")
    for _ in range(50):
        wire("INCR", "n")
    other("SET", "n", "1000")
    wire("EXEC")
    assert wire("GET", "n") == ("$", b"1050")


def test_pubsub(wire: Wire, other: Wire) -> None:
    wire("HELLO", 3)
    assert wire("SUBSCRIBE", "news")[0] == ">"
    assert wire("PSUBSCRIBE", "n*")[1][2] == (":", b"2")  # type: ignore[index]
    assert other("PUBLISH", "news", "hi") == (":", b"2")
    assert wire.reply() == (">", [("$", b"message"), ("$", b"news"), ("$", b"hi")])
    assert wire.reply() == (">", [("$", b"pmessage"), ("$", b"n*"), ("$", b"news"), ("$", b"hi")])
    assert wire("PING") == ("+", b"PONG"), "RESP3 subscribers may run any command"
    assert other("PUBSUB", "CHANNELS") == ("*", [("$", b"news")])
    assert other("PUBSUB", "NUMSUB", "news", "x") == ("*", [("$", b"news"), (":", b"1"), ("$", b"x"), (":", b"0")])
    assert other("PUBSUB", "NUMPAT") == (":", b"1")
    wire("UNSUBSCRIBE")
    wire("PUNSUBSCRIBE")
    assert other("PUBLISH", "news", "hi") == (":", b"0")


def test_a_client_that_publishes_to_itself(wire: Wire) -> None:
    wire("HELLO", 3)
    wire("SUBSCRIBE", "me")
    wire.send("PUBLISH", "me", "x")
    assert {wire.reply()[0], wire.reply()[0]} == {">", ":"}


@pytest.mark.parametrize(
    ("command", "events"),
    [
        (("SET", "k", "1"), ["set"]),
        (("SET", "k", "1", "EX", "100"), ["set", "expire"]),
        (("DEL", "k"), ["del"]),
        (("INCR", "n"), ["incrby"]),
        (("HSET", "h", "f", "1"), ["hset"]),
        (("HDEL", "h0", "f"), ["hdel", "del"]),
        (("ZADD", "z", "1", "a"), ["zadd"]),
        (("ZINCRBY", "z", "1", "a"), ["zincr"]),
        (("EXPIRE", "k", "100"), ["expire"]),
        (("PERSIST", "t"), ["persist"]),
        (("RENAME", "k", "j"), ["rename_from", "rename_to"]),
        (("COPY", "k", "j"), ["copy_to"]),
        (("APPEND", "k", "x"), ["append"]),
        (("GETDEL", "k"), ["del"]),
        (("GET", "k"), []),
    ],
)
def test_keyspace_events(wire: Wire, other: Wire, command: tuple[str, ...], events: list[str]) -> None:
    wire("SET", "k", "0")
    wire("SET", "t", "0", "EX", "1000")
    wire("HSET", "h0", "f", "1")
    wire("CONFIG", "SET", "notify-keyspace-events", "KEA")
    other("HELLO", 3)
    other("PSUBSCRIBE", "__keyspace@0__:*")
    wire(*command)
    wire("CONFIG", "SET", "notify-keyspace-events", "")
    wire("PUBLISH", "__keyspace@0__:end", "end")
    seen = []
    while (event := other.reply()[1][3][1]) != b"end":  # type: ignore[index]
        seen.append(event.decode())
    assert seen == events


def test_expired_event(wire: Wire, other: Wire) -> None:
    wire("CONFIG", "SET", "notify-keyspace-events", "Ex")
    other("HELLO", 3)
    other("SUBSCRIBE", "__keyevent@0__:expired")
    wire("SET", "gone", "1", "PX", "20")
    assert other.reply() == (">", [("$", b"message"), ("$", b"__keyevent@0__:expired"), ("$", b"gone")])
    wire("CONFIG", "SET", "notify-keyspace-events", "")


def test_a_key_that_is_found_expired_says_so_before_it_is_set_again(wire: Wire, other: Wire) -> None:
    wire("CONFIG", "SET", "notify-keyspace-events", "K$x")
    wire("CONFIG", "SET", "hz", "1")  # so that SET finds it, not a round
    other("HELLO", 3)
    other("SUBSCRIBE", "__keyspace@0__:k")
    wire("SET", "k", "1", "PX", "1")
    time.sleep(0.01)
    wire("SET", "k", "2", "KEEPTTL")
    assert [other.reply()[1][2][1] for _ in range(3)] == [b"set", b"expired", b"set"]  # type: ignore[index]
    wire("CONFIG", "SET", "notify-keyspace-events", "", "hz", "10")


def test_monitor(wire: Wire, other: Wire) -> None:
    assert other("MONITOR") == OK
    wire("SET", "k", "a\n\x00")
    kind, line = other.reply()
    assert kind == "+" and line.endswith(b'"SET" "k" "a\\n\\x00"') and b" [0 unix:" in line  # type: ignore[attr-defined, operator]
    wire("AUTH", "x", "secret")
    wire("PING")
    assert other.reply()[1].endswith(b'"AUTH" "(redacted)" "(redacted)"')  # type: ignore[attr-defined]
    other.close()


def test_client_kill_and_list(wire: Wire, other: Wire) -> None:
    other("CLIENT", "SETNAME", "victim")
    number = other("CLIENT", "ID")[1]
    lines = wire("CLIENT", "LIST")[1].decode().splitlines()  # type: ignore[attr-defined]
    assert any(f"id={number.decode()} " in line and "name=victim" in line for line in lines)  # type: ignore[attr-defined]
    assert wire("CLIENT", "KILL", "ID", number) == (":", b"1")  # type: ignore[arg-type]
    assert other.rest() == b""
    assert wire("CLIENT", "KILL", "ID", number) == (":", b"0")  # type: ignore[arg-type]
    assert wire("CLIENT", "KILL", "1.2.3.4:5")[1] == b"ERR No such client"


def test_client_reply(wire: Wire) -> None:
    wire.raw(request("CLIENT", "REPLY", "SKIP") + request("SET", "a", "1") + request("GET", "a"))
    assert wire.reply() == ("$", b"1")
    wire.raw(request("CLIENT", "REPLY", "OFF") + request("PING") * 3 + request("CLIENT", "REPLY", "ON"))
    assert wire.reply() == OK


def test_client_pause(wire: Wire, other: Wire) -> None:
    wire("CLIENT", "PAUSE", "60000", "WRITE")
    assert other("GET", "a")[0] == "$", "reads go on"
    other.send("SET", "a", "1")
    other.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        other.sock.recv(1)
    other.sock.settimeout(20)
    wire("CLIENT", "UNPAUSE")
    assert other.sock.recv(5) == b"+OK\r\n"


def test_slow_log(wire: Wire) -> None:
    wire("SLOWLOG", "RESET")
    wire("CONFIG", "SET", "slowlog-log-slower-than", "0")
    wire("SET", "k", "x" * 300)
    wire("CONFIG", "SET", "slowlog-log-slower-than", "10000")
    entries = wire("SLOWLOG", "GET", "-1")[1]
    assert any(entry[1][3][1][0] == ("$", b"SET") and b"more bytes" in entry[1][3][1][2][1] for entry in entries)  # type: ignore[index, attr-defined, operator]
    assert wire("SLOWLOG", "LEN")[1] == str(len(entries)).encode()  # type: ignore[arg-type]


def test_info(wire: Wire) -> None:
    wire("SET", "k", "1")
    text = wire("INFO", "everything")[1].decode()  # type: ignore[attr-defined]
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    assert fields["role"] == "master" and fields["loading"] == "0" and fields["db0"].startswith("keys=1,")
    assert "calls=" in fields["cmdstat_set"] and int(fields["total_commands_processed"]) > 0
    assert wire("INFO", "keyspace")[1].startswith(b"# Keyspace\r\n")  # type: ignore[attr-defined]
    wire("CONFIG", "RESETSTAT")
    assert b"cmdstat_set:" not in wire("INFO", "commandstats")[1]  # type: ignore[operator]
