"""A daemon without models, and sockets that speak RESP byte by byte."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvdb import config
from kvdb.backend import Backend
from kvdb.net.service import Server

Tree = tuple[object, ...]


class Wire:
    """A connection that sends requests and returns replies as trees: (type byte, value), exactly as on the wire."""

    def __init__(self, path: str | int) -> None:
        if isinstance(path, int):
            self.sock = socket.create_connection(("127.0.0.1", path), timeout=20)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(20)
            self.sock.connect(path)
        self.file = self.sock.makefile("rb")

    def send(self, *words: bytes | str | int) -> None:
        self.sock.sendall(request(*words))

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reply(self) -> Tree:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError(f"connection closed after {line!r}")
        kind, rest = line[:1], line[1:-2]
        if kind in b"+-:_,#(":
            return (kind.decode(), rest)
        if kind in b"$=":
            size = int(rest)
            if size < 0:
                return ("$", None)
            data = self.file.read(size + 2)
            assert data[-2:] == b"\r\n"
            return (kind.decode(), data[:-2])
        if kind in b"*~>":
            count = int(rest)
            return (kind.decode(), None) if count < 0 else (kind.decode(), [self.reply() for _ in range(count)])
        assert kind == b"%", line
        return ("%", [(self.reply(), self.reply()) for _ in range(int(rest))])

    def __call__(self, *words: bytes | str | int) -> Tree:
        self.send(*words)
        return self.reply()

    def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        return self.file.read()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def request(*words: bytes | str | int) -> bytes:
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


@dataclass
class Daemon:
    process: subprocess.Popen[bytes]
    path: str
    folder: Path
    port: int = 0

    def wire(self) -> Wire:
        return Wire(self.path)

    def tcp(self) -> Wire:
        return Wire(self.port)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)

    def log(self) -> str:
        return (self.folder / "log").read_text()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _launch(command: list[str], folder: Path, path: str, port: int) -> Daemon:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    daemon = Daemon(process, path, folder, port)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            wire = daemon.wire()
        except OSError:
            time.sleep(0.02)
            continue
        assert wire("PING")[0] in "+-"
        wire.close()
        return daemon
    process.kill()
    raise AssertionError(f"{command[0]} did not start:\n{daemon.log()}")


StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Start kvdb-server with these options: start(appendfsync="always"). port=True also listens on TCP."""
    running: list[Daemon] = []

    def start_one(
        folder: Path | None = None, *, port: bool = False, file: Path | None = None, **options: object
    ) -> Daemon:
        folder = folder or tmp_path_factory.mktemp("kvdb")
        path = str(folder / "sock")
        number = free_port() if port else 0
        words = [str(file)] if file else []
        given = {"dir": folder / "data", "port": number, "unixsocket": path, "model": "", **options}
        for name, value in given.items():
            words += ["--" + name.replace("_", "-"), str(value)]
        daemon = _launch([sys.executable, "-m", "kvdb", *words], folder, path, number)
        running.append(daemon)
        return daemon

    yield start_one
    for daemon in running:
        daemon.stop()


@pytest.fixture(scope="module")
def daemon(start: StartDaemon) -> Daemon:
    return start()


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    wire = daemon.wire()
    wire("FLUSHALL")
    yield wire
    wire.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate that vouches for itself, `crt`, and its `key`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = [*new, "-days", "2", "-keyout", "key", "-out", "crt", "-subj", "/CN=server"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def redis_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A real redis-server, or the test is skipped."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    folder = tmp_path_factory.mktemp("redis")
    path = str(folder / "sock")
    words = [program, "--port", "0", "--unixsocket", path, "--save", "", "--dir", str(folder)]
    daemon = _launch(words, folder, path, 0)
    yield daemon
    os.kill(daemon.process.pid, signal.SIGTERM)
    daemon.process.wait(20)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """One in this process, on a unix socket."""
    words = ["--dir", tmp_path / "data", "--port", 0, "--unixsocket", tmp_path / "s", "--model", ""]
    server = Server(config.from_command_line([str(word) for word in words]), Backend())
    await server.start()
    yield server
    await server.stop()
