"""The worker's loop over a socket: its account of memory, and requests that end badly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.synthetic import SyntheticEngine
from kvdb_engine.worker import Worker
from kvdb_protocol.frames import FrameReader, Message, encode_frame

INFO = open_model("synthetic:dsv4-nano")
IDS = (np.arange(30_000) % 1000).astype("<u4")
A, B = b"a" * 16, b"b" * 16


class Fragile(SyntheticEngine):
    """Prefills 1,000 tokens at a time; after `breaks` is set, the next prefill finds no memory for its third chunk."""

    breaks = False

    def prefill(self, state: Any, ids: Any) -> Iterator[int]:
        for first in range(0, len(ids), 1000):
            if self.breaks and first == 2000:
                self.breaks = False
                raise MemoryError("no room for a chunk")
            for done in super().prefill(state, ids[first : first + 1000]):
                yield first + done


class Client:
    """The daemon's end: one request at a time."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.engine = Fragile(INFO)
        self.worker = Worker(INFO, self.engine, theirs)
        self.thread = threading.Thread(target=self.worker.run)
        self.thread.start()
        self.frames = FrameReader()
        self.inbox: list[Message] = []
        self.n = 0

    def send(self, op: str, **fields: Any) -> int:
        self.n += 1
        self.sock.sendall(encode_frame({"op": op, "id": self.n, **fields}))
        return self.n

    def end_of(self, number: int) -> Message:
        """The event that ended a request."""
        while True:
            for message in self.inbox:
                if message["id"] == number and message["ev"] in ("done", "error"):
                    return message
            self.inbox += self.frames.feed(self.sock.recv(1 << 20))

    def call(self, op: str, **fields: Any) -> Message:
        return self.end_of(self.send(op, **fields))

    def open(self, sid: bytes, source: bytes | None = None) -> Message:
        return self.call("open", sid=sid, source=source, places=None)

    def held(self) -> int:
        """What the live states take, added up from the status."""
        return sum(n_bytes for _, n_bytes in self.call("status")["resident"].values())


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.sock.close()
    made.thread.join(timeout=20)
    assert not made.thread.is_alive()


def test_bytes_are_those_of_all_live_states_after_every_request(client: Client) -> None:
    steps = [client.open(A), client.call("extend", sid=A, ids=IDS[:3000].tobytes())]
    assert steps[0]["bytes"] < steps[1]["bytes"] == client.held()
    assert client.open(B, A)["bytes"] == client.held() == 2 * steps[1]["bytes"]
    assert client.open(B)["bytes"] == client.held() < 2 * steps[1]["bytes"]  # a session that is opened again
    number = client.send("extend", sid=B, ids=IDS.tobytes())
    client.send("cancel", target=number)
    assert client.end_of(number)["ev"] in ("done", "error")
    assert client.call("status")["bytes"] == client.held()
    assert client.call("extend", sid=b"nobody" + bytes(10), ids=b"")["word"] == "ENGINEDOWN"
    assert client.call("close", sid=A)["bytes"] == client.held()
    assert client.call("close", sid=B)["bytes"] == 0 == client.held()


def test_a_prefill_that_runs_out_of_memory_ends_alone(client: Client) -> None:
    client.open(A)
    client.open(B)
    client.call("extend", sid=A, ids=IDS[:100].tobytes())
    client.engine.breaks = True
    failed = client.call("extend", sid=B, ids=IDS.tobytes())
    assert failed["ev"] == "error" and failed["word"] == "ERR" and "MemoryError: no room" in failed["message"]
    resident = client.call("status")["resident"]
    assert resident[A][0] == 100 and resident[B][0] == 2000
    assert client.call("status")["bytes"] == client.held()
    assert client.call("extend", sid=B, ids=IDS[2000:].tobytes())["tokens"] == len(IDS)


def test_a_source_is_copied_before_it_is_opened_anew(client: Client) -> None:
    client.open(A)
    client.call("extend", sid=A, ids=IDS[:100].tobytes())
    # In one piece, so that the worker accepts all of them before it begins one; the busy session keeps its place.
    requests: list[dict[str, Any]] = [
        {"op": "extend", "id": 100, "sid": A, "ids": b""},
        {"op": "open", "id": 101, "sid": B, "source": A, "places": None},
        {"op": "open", "id": 102, "sid": A, "source": None, "places": None},
        {"op": "extend", "id": 103, "sid": A, "ids": IDS[:7].tobytes()},
    ]
    client.sock.sendall(b"".join(map(encode_frame, requests)))
    assert [client.end_of(number)["tokens"] for number in (101, 102, 103)] == [100, 0, 7]


def test_branches_share_the_names_of_their_pages_until_one_writes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.touch()

    def write(sid: bytes) -> list[bytes]:
        pages = client.call("write", sid=sid, path=str(path), offset=0, have=0, known=[])["pages"]
        assert isinstance(pages, list)
        return pages

    client.open(A)
    client.call("extend", sid=A, ids=IDS[:3000].tobytes())
    common = write(A)
    client.open(B, A)
    live = client.worker.sessions
    assert live[B].page_ids is live[A].page_ids  # a branch costs no memory that grows with its tokens
    client.call("extend", sid=A, ids=IDS[3000:].tobytes())
    pages = write(A)
    assert live[B].page_ids == common == pages[: len(common)]
    client.call("extend", sid=B, ids=IDS[:1000].tobytes())
    assert write(B)[: len(common)] == common
    assert live[A].page_ids == pages


def test_an_unknown_request_is_refused(client: Client) -> None:
    assert "no request 'dance'" in client.call("dance")["message"]
