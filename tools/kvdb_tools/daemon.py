"""A kvdb-server of one's own: started on a directory, watched, killed. For the demo, benchmarks and tests.

The daemon runs as a child process with its own session, so that a Ctrl-C in the terminal reaches this program first and
the daemon is ended in an orderly way.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.reply import ErrorReply, Map, Reply, Status

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class DaemonError(RuntimeError):
    """The daemon did not start or ended by itself; the message holds the end of its log."""


class CommandError(RuntimeError):
    """A command was answered with an error."""


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Daemon:
    """One kvdb-server on one data directory; may be killed and started again."""

    def __init__(self, directory: Path, options: Mapping[str, str] | None = None) -> None:
        """`options` are configuration names and values. Nothing is started yet."""
        self.directory = directory
        self.options = dict(options or {})
        self.port = free_port()
        self.log = directory.parent / f"{directory.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def target(self) -> Target:
        """Where it listens."""
        return Target(port=self.port)

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self._process is not None, "the daemon is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start it and return the seconds until the first PONG. Raises DaemonError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        options = {"dir": str(self.directory), "port": str(self.port), "bind": "127.0.0.1", **self.options}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        began = time.perf_counter()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from kvdb.server import main; main()", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait(began)
        except BaseException:
            self.kill()  # whoever is stopped while waiting has no `with` block yet that would end it
            raise
        return time.perf_counter() - began

    def _wait(self, began: float) -> None:
        while True:
            try:
                with Connection(self.target, timeout=5) as connection:
                    if connection.call("PING") == Status("PONG"):
                        return
            except OSError:
                pass
            if not self.is_running or time.perf_counter() - began > START_TIMEOUT_S:
                raise DaemonError(f"kvdb-server did not start:\n{self.log_tail()}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL: what a crash or a power cut of the process looks like."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ask it to end, and wait; kill it when it does not."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> float:
        """Stop in order and start again; returns the seconds to the first PONG."""
        self.stop()
        return self.start()

    def log_tail(self, n_bytes: int = 3000) -> str:
        """The end of what it wrote."""
        try:
            return self.log.read_bytes()[-n_bytes:].decode(errors="replace")
        except OSError:
            return "(no log)"

    def rss_bytes(self) -> int:
        """Resident memory of the daemon process itself."""
        return rss_bytes(self.pid)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or 0) * 1024


def disk_bytes(directory: Path) -> int:
    """Bytes that the files below a directory take on the disk: holes and preallocated length do not count."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(folder) / name).stat().st_blocks * 512
            except FileNotFoundError:
                # A running daemon may remove a file between the two steps.
                continue
    return total


class Caller:
    """Calls commands and returns plain Python values: maps as dicts with text keys, errors as CommandError."""

    def __init__(self, connection: Connection) -> None:
        """The connection stays the caller's."""
        self.connection = connection

    def __call__(self, *words: bytes | str | int | float) -> object:
        """Any command, any reply."""
        reply = self.connection.call(*words)
        if isinstance(reply, ErrorReply):
            raise CommandError(reply.text)
        return plain(reply)

    def map(self, *words: bytes | str | int | float) -> dict[str, object]:
        """A command that is answered with a map."""
        reply = self(*words)
        if not isinstance(reply, dict):
            raise CommandError(f"{words[0]!r} answered {reply!r}, a map was expected")
        return reply

    def number(self, *words: bytes | str | int | float) -> int:
        """A command that is answered with an integer."""
        reply = self(*words)
        if not isinstance(reply, int):
            raise CommandError(f"{words[0]!r} answered {reply!r}, a number was expected")
        return reply

    def data(self, *words: bytes | str | int | float) -> bytes:
        """A command that is answered with a bulk string."""
        reply = self(*words)
        if not isinstance(reply, bytes):
            raise CommandError(f"{words[0]!r} answered {reply!r}, bytes were expected")
        return reply

    def list(self, *words: bytes | str | int | float) -> list[object]:
        """A command that is answered with an array."""
        reply = self(*words)
        if not isinstance(reply, list):
            raise CommandError(f"{words[0]!r} answered {reply!r}, a list was expected")
        return reply


def plain(reply: Reply) -> object:
    """A reply as Python values; map keys as text, bulk strings as bytes, simple strings as text."""
    match reply:
        case Status(text):
            return text
        case Map(pairs):
            return {_key(key): plain(value) for key, value in pairs}
        case list():
            return [plain(item) for item in reply]
        case _:
            return reply


def _key(key: Reply) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(plain(key))


def as_int(value: object) -> int:
    """An integer field of a map reply."""
    if not isinstance(value, int):
        raise CommandError(f"{value!r} is not an integer")
    return value


def as_float(value: object) -> float:
    """A number of a map reply, which RESP2 sends as text."""
    try:
        return float(value if isinstance(value, int | float) else bytes(value))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise CommandError(f"{value!r} is not a number") from None


def as_ids(value: object) -> tuple[int, ...]:
    """A list of token ids in a map reply."""
    if not isinstance(value, list):
        raise CommandError(f"{value!r} is not a list of token ids")
    return tuple(as_int(item) for item in value)
