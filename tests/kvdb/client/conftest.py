"""A scripted server: real RESP on a real socket, answers from a function. It shows what the client sends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from kvdb_protocol.replies import Push, Simple, encode
from kvdb_protocol.requests import RequestParser

Answer = Callable[[list[bytes]], list[object] | None]  # frames to send; None closes the connection


class Scripted:
    """Answers HELLO, CLIENT and PING like a server; everything else as `answer` says."""

    def __init__(self) -> None:
        self.answer: Answer = lambda words: [Simple("OK")]
        self.requests: list[list[bytes]] = []
        self.closed = threading.Event()  # set when a client closes its end
        self.connections = 0
        self.resp = 3
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        parser, resp = RequestParser(), 2
        with connection:
            while data := connection.recv(65536):
                for words in parser.feed(data):
                    if words[0] == b"HELLO":
                        resp = int(words[1])
                        frames: list[object] | None = [{"server": "kvdb", "proto": resp}]
                    elif words[0] in (b"CLIENT", b"SELECT"):
                        frames = [Simple("OK")]
                    else:
                        self.requests.append(words)
                        frames = self.answer(words)
                    if frames is None:
                        return
                    for frame in frames:
                        connection.sendall(frame if isinstance(frame, bytes) else encode(frame, resp))
        self.closed.set()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


def pushes(*tokens: tuple[int, bytes]) -> list[object]:
    return [Push(["generate", b"s", token, text]) for token, text in tokens]
