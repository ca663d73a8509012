"""Channel values as stored: a plain value in one string; a long list as shared blocks and a tail.

An agent's message list grows by a few elements a step and LangGraph hands over the whole list each time. Stored whole,
n steps cost O(n^2). Here the elements are cut, from the front, into blocks of about `BLOCK_BYTES`; a block's name is a
hash over its parent's name and its bytes, so the list of the next step shares every full block with the one before and
writes only its tail: the same shape as the pages and tail of a snapshot.

A value is msgpack: [0, type, data] or [1, name of the last block or nil, [[type, data], ...] the tail's elements].
A block is msgpack: [name of the parent block or nil, [[type, data], ...]].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
from blake3 import blake3

BLOCK_BYTES = 4096
PLAIN, LISTED = 0, 1

Typed = tuple[str, bytes]


class Serde(Protocol):
    """LangGraph's serializer."""

    def dumps_typed(self, obj: Any) -> Typed:
        """An object as (type, bytes)."""
        ...

    def loads_typed(self, data: Typed) -> Any:
        """The object again."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded value: its own bytes, and the blocks it stands on, oldest first, as (digest, bytes)."""

    data: bytes
    blocks: tuple[tuple[str, bytes], ...] = ()


def encode_value(serde: Serde, value: Any) -> Stored:
    """Encode a channel's value."""
    if type(value) is not list or len(value) < 2:
        return Stored(msgpack.packb([PLAIN, *serde.dumps_typed(value)]))
    blocks: list[tuple[str, bytes]] = []
    parent: str | None = None
    tail: list[Sequence[Any]] = []
    size = 0
    for element in value:
        typed = serde.dumps_typed(element)
        tail.append(typed)
        size += len(typed[1])
        if size >= BLOCK_BYTES:
            data = msgpack.packb([parent, tail])
            parent = blake3(data).hexdigest(16)
            blocks.append((parent, data))
            tail, size = [], 0
    return Stored(msgpack.packb([LISTED, parent, tail]), tuple(blocks))


def decode_block(data: bytes) -> tuple[str | None, list[Typed]]:
    """A block's parent digest and elements."""
    parent, elements = msgpack.unpackb(data)
    return parent, [(kind, raw) for kind, raw in elements]


def decode_head(data: bytes) -> tuple[Typed | None, str | None, list[Typed]]:
    """What a value's own bytes say: (plain value, last block, tail elements); the first is None for a list."""
    found = msgpack.unpackb(data)
    if found[0] == PLAIN:
        return (found[1], found[2]), None, []
    return None, found[1], [(kind, raw) for kind, raw in found[2]]
