"""A redis-server of one's own: the baseline that kvdb is measured beside."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

from kvdb_tools.bench.scenario import MissingError
from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.reply import Status
from kvdb_tools.daemon import free_port

START_TIMEOUT_S = 20.0


def need(program: str) -> str:
    """The path of a program. Raises MissingError."""
    found = shutil.which(program)
    if not found:
        raise MissingError(f"{program} is not installed")
    return found


def wait_for_pong(target: Target, name: str) -> None:
    """Return once a server that was just started answers. Raises MissingError."""
    began = time.perf_counter()
    while time.perf_counter() - began < START_TIMEOUT_S:
        try:
            with Connection(target, timeout=5) as connection:
                if connection.call("PING") == Status("PONG"):
                    return
        except OSError:
            time.sleep(0.01)
    raise MissingError(f"{name} did not start")


class RedisServer:
    """Runs in a `with` statement, in a directory, with the append-only file synced as asked."""

    def __init__(self, directory: Path, appendfsync: str) -> None:
        """`appendfsync` is Redis' own option: always, everysec, no."""
        self.directory = directory
        self.target = Target(port=free_port())
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [need("redis-server"), "--port", str(self.target.port), "--dir", str(self.directory), "--save", ""]
        # One address: on all of them, a port that someone else uses on any is taken.
        command += ["--bind", "127.0.0.1", "--appendonly", "yes", "--appendfsync", self._appendfsync]
        # Rewriting its file in the background would take a processor and the disk from whoever is measured just then.
        command += ["--auto-aof-rewrite-percentage", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_pong(self.target, "redis-server")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "redis-server is not running"
        return self._process.pid

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
