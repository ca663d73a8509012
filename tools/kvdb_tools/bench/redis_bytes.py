"""Redis' best case for large values: a bare socket, nothing copied that need not be, a kept buffer for replies."""

from __future__ import annotations

import socket
import time
from types import TracebackType


class RedisBytes:
    """One connection to a redis-server that sets and gets large values. Use in a `with` statement."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=600)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 20)

    def __enter__(self) -> RedisBytes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def set(self, key: str, n_bytes: int, chunk: bytes) -> float:
        """SET a value of `n_bytes` (repeating `chunk`); returns the seconds to its OK."""
        view = memoryview(chunk)
        began = time.perf_counter()
        self._socket.sendall(f"*3\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n${n_bytes}\r\n".encode())
        left = n_bytes
        while left:
            piece = view[: min(left, len(view))]
            self._socket.sendall(piece)
            left -= len(piece)
        self._socket.sendall(b"\r\n")
        answer = self._socket.recv(64)
        if answer != b"+OK\r\n":
            raise OSError(f"redis-server answered {answer!r} to SET")
        return time.perf_counter() - began

    def get(self, key: str) -> tuple[int, float]:
        """GET a value, dropping its bytes in a kept buffer; returns (bytes, seconds)."""
        began = time.perf_counter()
        self._socket.sendall(f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode())
        head = b""
        while b"\r\n" not in head:
            head += self._socket.recv(64)
        line, _, rest = head.partition(b"\r\n")
        n_bytes = int(line[1:])
        left = n_bytes + 2 - len(rest)
        while left > 0:
            left -= self._socket.recv_into(self._buffer, min(left, len(self._buffer)))
        return n_bytes, time.perf_counter() - began
