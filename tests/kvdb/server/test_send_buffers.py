"""Buffers that large strings are sent from: which are given out, and which are used again."""

from __future__ import annotations

from kvdb.net.send_buffers import HEAD_BYTES, LARGE_BYTES, N_LARGE, TAIL_BYTES, SendBuffers
from kvdb.store.entries import PIECE_BYTES


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
