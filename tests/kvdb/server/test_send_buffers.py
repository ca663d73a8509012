"""Buffers that large strings are sent from: which are given out, and which are used again."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb.net import bulk
from kvdb.net.send_buffers import HEAD_BYTES, LARGE_BYTES, N_LARGE, TAIL_BYTES, SendBuffers
from kvdb.store.entries import PIECE_BYTES, HeldString, StringRef


def sizes(buffers: list[memoryview]) -> list[int]:
    return [len(buffer) - HEAD_BYTES - TAIL_BYTES for buffer in buffers]


def test_few_are_large() -> None:
    buffers = SendBuffers()
    taken = [buffers.take(may_be_large=True) for _ in range(N_LARGE + 2)]
    assert sizes(taken) == [LARGE_BYTES] * N_LARGE + [PIECE_BYTES] * 2
    for small in taken[N_LARGE:]:
        buffers.give_back(small)
    assert sizes([buffers.take(may_be_large=True)]) == [PIECE_BYTES], "a small one makes no room for a large one"
    assert sizes([SendBuffers().take(may_be_large=False)]) == [PIECE_BYTES]


def test_what_is_given_back_is_used_again_and_what_is_dropped_is_not() -> None:
    buffers = SendBuffers()
    taken = [buffers.take(may_be_large=True) for _ in range(N_LARGE)]
    taken[0][:4] = b"kept"
    taken[1][:4] = b"mine"
    buffers.give_back(taken[0])
    buffers.drop(taken[1])
    again = [buffers.take(may_be_large=True) for _ in range(3)]
    assert sizes(again) == [LARGE_BYTES, LARGE_BYTES, PIECE_BYTES]
    assert [bytes(buffer[:4]) for buffer in again] == [b"kept", bytes(4), bytes(4)]


async def test_without_memory_there_is_an_error_reply_and_no_buffer_less(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = SendBuffers()
    written: list[bytes] = []
    counted: list[str] = []
    server = SimpleNamespace(
        send_buffers=buffers, store=SimpleNamespace(strings=None), count_error=lambda word: counted.append(word)
    )
    client: Any = SimpleNamespace(server=server, is_encrypted=False, write=written.append)
    string = HeldString(1 << 20)
    string.complete(StringRef(1, 4096, 1 << 20, bytes(16), b""), 0, True, lambda _: None)

    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", no_memory)
        for _ in range(2 * N_LARGE):
            await bulk._send_string(client, string)
    assert len(written) == len(counted) == 2 * N_LARGE
    assert all(one.startswith(b"-") and b"a buffer to send from" in one for one in written), written
    assert sizes([buffers.take(may_be_large=True)]) == [LARGE_BYTES]


async def test_without_memory_for_the_next_buffer_the_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS: what was written may still be in use, and the length has been promised."""
    called: list[str] = []

    class Reader:
        def read_cached(self, _start: int, _room: memoryview) -> int:
            monkeypatch.setattr(mmap, "mmap", no_memory)  # from the first piece on
            return PIECE_BYTES

        def close(self) -> None:
            called.append("closed")

    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    async def open_reader(_: object) -> Reader:
        return Reader()

    async def drained() -> None:
        called.append("drained")

    buffers = SendBuffers()
    server = SimpleNamespace(
        send_buffers=buffers,
        store=SimpleNamespace(strings=SimpleNamespace(open=open_reader)),
        count_error=called.append,
    )
    client: Any = SimpleNamespace(
        server=server, is_encrypted=True, has_unsent=True, id=1, peer="there", drained=drained,
        write=lambda data: called.append(str(len(data))), abort=lambda: called.append("aborted"),
    )  # fmt: skip
    string = HeldString(1 << 20)
    string.complete(StringRef(1, 4096, 1 << 20, bytes(16), b""), 0, True, lambda _: None)
    await bulk._send_string(client, string)
    assert called[:3] == [str(len(b"$1048576\r\n") + PIECE_BYTES), "drained", "closed"] and called[-1] == "aborted"
    monkeypatch.undo()
    assert sizes([buffers.take(may_be_large=True) for _ in range(N_LARGE + 1)]) == [LARGE_BYTES] * N_LARGE + [
        PIECE_BYTES
    ]
