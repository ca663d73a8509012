# ruff: noqa: PERF403

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from .conftest import Daemon, StartDaemon, Wire, request

OK = ("+", b"OK")


def test_always_survives_kill(start: StartDaemon) -> None:
    """Every acknowledged write of four clients is there after SIGKILL, whatever the moment."""
    daemon = start(appendfsync="always")
    for _ in range(2):
        acknowledged: dict[bytes, bytes] = {}
        threads = [threading.Thread(target=write_until_gone, args=(daemon, n, acknowledged)) for n in range(4)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 100:
            time.sleep(0.005)
        daemon.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
        daemon = start(daemon.folder, appendfsync="always")
        wire = daemon.wire()
        for key, value in acknowledged.items():
            assert wire("GET", key) == ("$", value)


def test_quit_waits_for_durability(start: StartDaemon) -> None:
    daemon = start(appendfsync="always")
    for n in range(20):
        wire = daemon.wire()
        wire.raw(request("SET", f"k{n}", n) + request("QUIT") + request("SET", f"late{n}", n))
        assert wire.rest() == b"+OK\r\n+OK\r\n"
    daemon.stop(signal.SIGKILL)
    wire = start(daemon.folder).wire()
    assert wire("DBSIZE") == (":", b"20")


def test_always_holds_for_commands_that_take_time(start: StartDaemon) -> None:
    """PREFILL and EXTEND are writes too: what they answered survives SIGKILL."""
    options = {"appendfsync": "always", "model": "synthetic:dsv4-nano"}
    daemon = start(**options)
    wire = daemon.wire()
    for n in range(3):
        assert wire("PREFILL", f"s{n}", "TOKENS", 3, 1, 2, 3)[0] in "*%"
    assert wire("EXTEND", "s0", "TOKENS", 1, 4)[0] in "*%"
    logits = wire("LOGITS", "s0", "RAW")
    assert wire("EXTEND", "s2", "TOKENS", 1, 4)[0] in "*%"
    daemon.stop(signal.SIGKILL)
    wire = start(daemon.folder, **options).wire()
    assert wire("DBSIZE") == (":", b"3")
    assert wire("LOGITS", "s0", "RAW") == wire("LOGITS", "s2", "RAW") == logits


def write_until_gone(daemon: Daemon, number: int, acknowledged: dict[bytes, bytes]) -> None:
    wire = daemon.wire()
    at = 0
    try:
        while True:
            pairs = [(b"%d:%d" % (number, at + i), b"v%d" % (at + i)) for i in range(5)]
            wire.raw(b"".join(request("SET", *pair) for pair in pairs))
            for key, value in pairs:
                if wire.reply() == OK:
                    acknowledged[key] = value
            at += 5
    except (OSError, ConnectionError):
        pass


def test_transactions_are_whole_after_kill(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    stop = time.monotonic() + 1.3  # a commit round of everysec falls into it
    n = 0
    while time.monotonic() < stop:
        n += 1
        wire.raw(
            request("MULTI")
            + request("SET", "a", n)
            + request("HSET", "h", "f", n)
            + request("ZADD", "z", n, "m")
            + request("EXEC")
        )
        for _ in range(5):
            wire.reply()
    daemon.stop(signal.SIGKILL)
    wire = start(daemon.folder).wire()
    seen = (wire("GET", "a")[1], wire("HGET", "h", "f")[1], wire("ZSCORE", "z", "m")[1])
    assert seen[0] is not None and seen == (seen[0],) * 3


def test_all_types_come_back_after_shutdown(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    wire("SET", "s", b"\x00\xff" * 3000)
    wire("SET", "t", "x", "PXAT", "4000000000000")
    wire("HSET", "h", "b", "1", "a", "2", b"\xff", "")
    wire("ZADD", "z", "2.5", "b", "-inf", "a", "1e300", b"\xff")
    wire("SELECT", 3)
    wire("SET", b"k" * 3000, "long key")
    assert daemon.stop() == 0
    wire = start(daemon.folder).wire()
    assert wire("GET", "s") == ("$", b"\x00\xff" * 3000)
    assert wire("PEXPIRETIME", "t") == (":", b"4000000000000")
    assert wire("HGETALL", "h")[1] == [("$", x) for x in (b"b", b"1", b"a", b"2", b"\xff", b"")]
    assert wire("ZRANGE", "z", 0, -1, "WITHSCORES")[1] == [
        ("$", x) for x in (b"a", b"-inf", b"b", b"2.5", b"\xff", b"1.0000000000000001e+300")
    ]
    wire("SELECT", 3)
    assert wire("GET", b"k" * 3000) == ("$", b"long key")


def test_shutdown_command(start: StartDaemon) -> None:
    daemon = start()
    wire = daemon.wire()
    wire("SET", "k", "v")
    wire.send("SHUTDOWN", "NOSAVE")
    assert wire.rest() == b""
    assert daemon.process.wait(20) == 0
    assert start(daemon.folder).wire()("GET", "k") == ("$", b"v")


def test_changed_hashes_are_not_shared_with_a_commit(start: StartDaemon) -> None:
    """A hash changed while a round writes it: nothing of the later change may be lost or mixed in."""
    daemon = start(appendfsync="always")
    wire, other = daemon.wire(), daemon.wire()
    for n in range(40):
        wire.raw(request("HSET", "h", f"f{n}", n))
        other.raw(request("HSET", "h", f"g{n}", n) + request("COPY", "h", f"c{n}"))
    for _ in range(40):
        wire.reply(), other.reply(), other.reply()
    daemon.stop(signal.SIGKILL)
    wire = start(daemon.folder).wire()
    assert wire("HLEN", "h") == (":", b"80")
    assert wire("HGET", "h", "f39") == ("$", b"39")


def test_one_daemon_a_directory(daemon: Daemon, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvdb", "--dir", str(daemon.folder / "data"), "--port", "0", "--model", ""]
    ran = subprocess.run([*command, "--unixsocket", str(tmp_path / "s")], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "cannot start" in ran.stdout


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "0", "--unixsocket", "/nonexistent/x"]])
def test_nothing_to_listen_on(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "kvdb", "--dir", str(tmp_path), "--model", "", *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "listen on" in ran.stdout


def test_save_and_lastsave(wire: Wire) -> None:
    before = int(wire("LASTSAVE")[1])  # type: ignore[call-overload]
    wire("SET", "k", "v")
    assert wire("SAVE") == OK
    assert wire("BGSAVE") == ("+", b"Background saving started")
    assert int(wire("LASTSAVE")[1]) >= before  # type: ignore[call-overload]
