"""A full disk and a full budget: writes get a clear error, everything else goes on, and it recovers by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import StartDaemon, Wire

OK = ("+", b"OK")


def wait_for(wire: Wire, *words: str, accepted: bool) -> object:
    """Repeat a command until it is accepted or refused as wanted."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        kind, line = wire(*words)
        if (kind != "-") is accepted:
            return line
        time.sleep(0.05)
    raise AssertionError(f"{words} was never {'accepted' if accepted else 'refused'}")


def test_maxstore(start: StartDaemon) -> None:
    wire = start(maxstore="3mb").wire()
    for n in range(4):
        wire("SET", f"k{n}", os.urandom(1 << 20))
    line = wait_for(wire, "SET", "more", "x", accepted=False)
    assert line.startswith(b"NOSPACE maxstore is 3145728 bytes")  # type: ignore[attr-defined]
    assert wire("GET", "k0")[0] == "$" and wire("PING") == ("+", b"PONG")
    assert wire("MULTI") == OK
    assert wire("SET", "a", "1")[0] == "-"
    assert wire("EXEC")[1].startswith(b"EXECABORT")  # type: ignore[attr-defined]
    assert wire("CONFIG", "SET", "maxstore", "1gb") == OK
    wait_for(wire, "SET", "more", "x", accepted=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("mounting needs root on Linux")
    ran = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(tmp_path)], check=False)
    if ran.returncode:
        pytest.skip("mounting is not possible here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder: Path, *, but: int) -> None:
    """Leave `but` bytes free."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - but))


@pytest.mark.parametrize("mode", ["always", "everysec"])
def test_full_disk(start: StartDaemon, small_disk: Path, mode: str) -> None:
    daemon = start(dir=small_disk / "data", appendfsync=mode)
    wire = daemon.wire()
    wire("SET", "kept", "v")
    wire("SAVE")
    fill(small_disk, but=3 << 20)
    for n in range(40):
        if wire("SET", f"k{n}", os.urandom(500_000))[0] == "-":
            break
    line = wait_for(wire, "SET", "more", "x" * 100_000, accepted=False)
    assert line.startswith((b"NOSPACE", b"MISCONF writes cannot be made durable"))  # type: ignore[attr-defined]
    assert wire("GET", "kept") == ("$", b"v") and wire("PING") == ("+", b"PONG")
    assert wire("DBSIZE")[0] == ":" and wire("CONFIG", "GET", "hz")[0] == "*"
    (small_disk / "filler").unlink()
    wait_for(wire, "SET", "more", "x", accepted=True)
    assert wire("SAVE") == OK
    assert daemon.stop() == 0
    wire = start(daemon.folder, dir=small_disk / "data").wire()
    assert wire("GET", "kept") == ("$", b"v") and wire("GET", "more") == ("$", b"x")


def test_a_string_that_does_not_fit_on_the_disk_is_refused_when_it_has_come(
    start: StartDaemon, small_disk: Path
) -> None:
    daemon = start(dir=small_disk / "data")
    wire = daemon.wire()
    wire("SET", "k", "old")
    wire("SAVE")
    fill(small_disk, but=4 << 20)
    kind, line = wire("SET", "k", os.urandom(40 << 20))
    assert kind == "-" and line.startswith(b"NOSPACE")  # type: ignore[attr-defined]
    assert wire("PING") == ("+", b"PONG") and wire("GET", "k") == ("$", b"old")
    wire("SET", "small", "x")
    assert wire("SAVE") == OK, "what had come of it was given back"
    (small_disk / "filler").unlink()
    value = os.urandom(20 << 20)
    assert wire("SET", "k", value) == OK
    assert wire("GET", "k") == ("$", value)


def test_shutdown_with_a_full_disk(start: StartDaemon, small_disk: Path) -> None:
    daemon = start(dir=small_disk / "data")
    wire = daemon.wire()
    fill(small_disk, but=1 << 20)
    for n in range(24):
        wire("SET", f"k{n}", os.urandom(500_000))  # more than the store's own reserve gives back
    wait_for(wire, "SET", "more", "x", accepted=False)
    assert wire("SHUTDOWN")[1].startswith(b"ERR Errors trying to SHUTDOWN")  # type: ignore[attr-defined]
    assert wire("PING") == ("+", b"PONG")
    wire.send("SHUTDOWN", "NOSAVE")
    assert daemon.process.wait(20) == 1, "the exit status says that something was lost"
    assert "could not be made durable" in daemon.log()
