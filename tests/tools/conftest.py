"""A scripted RESP server for tests of the command line: it answers what the test says, nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import pytest

Answer = Callable[[list[bytes]], bytes]


@dataclass
class FakeServer:
    """Answers HELLO with an empty map and everything else with `answers[NAME]`; keeps what it was sent."""

    port: int = 0
    answers: dict[bytes, bytes | Answer] = field(default_factory=dict)
    commands: list[list[bytes]] = field(default_factory=list)
    n_connections: int = 0
    n_closed: int = 0

    def serve(self, client: socket.socket) -> None:
        self.n_connections += 1
        stream = client.makefile("rb")
        try:
            while words := _read_command(stream):
                self.commands.append(words)
                name = words[0].upper()
                answer = self.answers.get(name, b"%0\r\n" if name == b"HELLO" else b"-ERR unknown command\r\n")
                data = answer(words) if callable(answer) else answer
                if data == b"CLOSE":
                    break
                client.sendall(data)
        except OSError:
            pass
        finally:
            self.n_closed += 1
            stream.close()
            client.close()


def _read_command(stream: BinaryIO) -> list[bytes]:
    head = stream.readline()
    words = []
    for _ in range(int(head[1:]) if head else 0):
        n_bytes = int(stream.readline()[1:])
        words.append(stream.read(n_bytes + 2)[:-2])
    return words


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=server.serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server
        # Wakes the accepting thread; closing alone does not on every system.
        listener.shutdown(socket.SHUT_RDWR)
