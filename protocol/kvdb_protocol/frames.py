"""Frames between the daemon and the engine worker: u32 little-endian length, then one msgpack map.

Frames are small. Row data never travels in a frame: it goes through segment files.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from kvdb_protocol.errors import FormatError

MAX_FRAME_BYTES = 64 << 20  # a 1M-token prompt is 4 MB of ids; anything near this is a bug, not a request
_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def encode_frame(message: Message) -> bytes:
    """One frame. Raises FormatError for one that the other side would refuse, which would end the worker."""
    body: bytes = msgpack.packb(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FormatError(f"frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Collects bytes and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Add received bytes; return the messages that are now complete."""
        self._buffer += data
        found = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, at)
            if size > MAX_FRAME_BYTES:
                raise FormatError(f"frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = at + _LENGTH.size + size
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[at + _LENGTH.size : end])
            at = end
            found.append(msgpack.unpackb(body))
        del self._buffer[:at]
        return found
