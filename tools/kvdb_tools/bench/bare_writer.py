"""The least that a durable SET can be: receive the bytes, write them to the end of a file, sync it. A yardstick.

It knows no keys, checks nothing and answers one client. What a server takes beyond it is what the server does; half of
what another server takes cannot be reached where this takes longer.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

_LINES = 6  # of a SET up to its value: *3, $3, SET, the key's length, the key, the value's length
_HEAD_BYTES = 128


class BareWriter:
    """Runs in a `with` statement, writing to one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BareWriter:
        code = "from kvdb_tools.bench.bare_writer import main; main()"
        command = [sys.executable, "-P", "-c", code, str(self._path)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        try:
            self.port = int(self._process.stdout.readline())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(client: socket.socket, fd: int) -> None:
    end = 0
    kept = memoryview(bytearray())
    while head := client.recv(_HEAD_BYTES, socket.MSG_PEEK):
        lines = head.split(b"\r\n", _LINES)
        client.recv(sum(len(line) + 2 for line in lines[:_LINES]))
        n_bytes = int(lines[_LINES - 1][1:])
        if len(kept) != n_bytes + 2:
            kept = memoryview(bytearray(n_bytes + 2))
        got = 0
        while got < len(kept):
            if not (more := client.recv_into(kept[got:])):
                return
            got += more
        end += os.pwrite(fd, kept[:n_bytes], end)
        os.fdatasync(fd)
        client.sendall(b"+OK\r\n")


def main() -> None:
    """Print the port, then serve one client."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        client, _ = server.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _serve(client, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
