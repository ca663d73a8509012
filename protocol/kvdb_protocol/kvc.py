"""The KVC container: ds4's `.kv` file, one saved session with its key text.

      0   3  magic "KVC"
      3   1  u8 version = 1
      4   1  u8 bits of the routed experts' quantisation: 2 or 4
      5   1  u8 reason: 0 unknown, 1 cold, 2 continued, 3 evict, 4 shutdown, 5 agent-system, 6 agent-session
      6   1  u8 flags: bit 0 a tool map follows, bits 1 and 2 the key text is what a client resends
      7   1  zero
      8   4  u32 token count
     12   4  u32 hit count
     16   4  u32 context of the writer
     20   4  zero
     24   8  u64 created, Unix seconds
     32   8  u64 last used, Unix seconds
     40   8  u64 payload bytes
     48   4  u32 text bytes
     52   .  key text, raw bytes
      .   .  payload (dsv4.py, version 1)
      .   .  if flag bit 0: tool map: "KTM", u8 version = 1, u32 entries; each u32 id bytes, u32 block bytes, id, block

The file is named after its key text: the SHA-1 in lower-case hex, then ".kv". All integers are little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.ids import Buffer

MAGIC = b"KVC"
VERSION = 1
HEADER_BYTES = 52
TOOL_MAGIC = b"KTM"
TOOL_ID_LIMIT = 256  # longer ids end the map, as in ds4
_HEADER = struct.Struct("<3sBBBBBIIIIQQQI")
_TOOL_HEAD = struct.Struct("<3sBI")
_TOOL_ENTRY = struct.Struct("<II")


class KvcReason(IntEnum):
    """Why ds4 saved the file."""

    UNKNOWN = 0
    COLD = 1
    CONTINUED = 2
    EVICT = 3
    SHUTDOWN = 4
    AGENT_SYSTEM = 5
    AGENT_SESSION = 6


class KvcFlags(IntFlag):
    """Extension flags."""

    TOOL_MAP = 1
    RESPONSES_VISIBLE = 2
    THINKING_VISIBLE = 4


@dataclass(frozen=True, slots=True)
class Kvc:
    """A `.kv` file, decoded. tools: (call id, exact text the model sampled). Times are Unix seconds."""

    quant_bits: int
    reason: KvcReason
    flags: KvcFlags
    n_tokens: int
    hits: int
    context: int
    created_s: int
    used_s: int
    text: bytes
    payload: Buffer
    tools: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def name(self) -> str:
        """The file name that a reader expects."""
        return file_name(self.text)


def file_name(text: bytes) -> str:
    """Name of the file with this key text."""
    return hashlib.sha1(text, usedforsecurity=False).hexdigest() + ".kv"


def encode_kvc(file: Kvc) -> list[Buffer]:
    """The file as a list of buffers; the payload is not copied. The tool-map flag follows from `tools`."""
    flags = (file.flags & ~KvcFlags.TOOL_MAP) | (KvcFlags.TOOL_MAP if file.tools else 0)
    head = _HEADER.pack(
        *(MAGIC, VERSION, file.quant_bits, file.reason, flags, 0, file.n_tokens, file.hits, file.context, 0),
        *(file.created_s, file.used_s, memoryview(file.payload).nbytes, len(file.text)),
    )
    return [head, file.text, file.payload, *_encode_tools(file.tools)]


def _encode_tools(tools: Sequence[tuple[bytes, bytes]]) -> list[Buffer]:
    if not tools:
        return []
    pieces: list[Buffer] = [_TOOL_HEAD.pack(TOOL_MAGIC, 1, len(tools))]
    for call_id, block in tools:
        pieces += [_TOOL_ENTRY.pack(len(call_id), len(block)), call_id, block]
    return pieces


def decode_kvc(data: Buffer) -> Kvc:
    """Decode a `.kv` file. The payload is a view into `data`.

    Refuses what ds4 ignores (magic, version, quantisation, zero tokens, truncation); as in ds4 an unknown reason reads
    as 0, and a malformed tool map ends at its first bad entry, since it is auxiliary.
    """
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        raise FormatError(f".kv header is truncated: {len(view)} of {HEADER_BYTES} bytes")
    (magic, version, bits, reason, flags, _, n_tokens, hits, context, _, created, used, payload_bytes, text_bytes) = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise FormatError(f"not a .kv file: magic {magic!r}")
    if version != VERSION:
        raise VersionError(f".kv version {version} is not supported")
    if bits not in (2, 4):
        raise FormatError(f".kv file has experts of {bits} bits, not 2 or 4")
    if not n_tokens:
        raise FormatError(".kv file has no tokens")
    text = bytes(view[HEADER_BYTES : HEADER_BYTES + text_bytes])
    start = HEADER_BYTES + text_bytes
    payload = view[start : start + payload_bytes]
    if len(text) < text_bytes or len(payload) < payload_bytes:
        raise FormatError(".kv file is truncated inside its text or payload")
    return Kvc(
        quant_bits=bits,
        reason=KvcReason(reason) if reason in KvcReason.__members__.values() else KvcReason.UNKNOWN,
        flags=KvcFlags(flags & 7),
        n_tokens=n_tokens,
        hits=hits,
        context=context,
        created_s=created,
        used_s=used,
        text=text,
        payload=payload,
        tools=_decode_tools(view[start + payload_bytes :]) if flags & KvcFlags.TOOL_MAP else (),
    )


def _decode_tools(view: memoryview) -> tuple[tuple[bytes, bytes], ...]:
    if len(view) < _TOOL_HEAD.size:
        return ()
    magic, version, count = _TOOL_HEAD.unpack_from(view)
    if magic != TOOL_MAGIC or version != 1:
        return ()
    tools = []
    at = _TOOL_HEAD.size
    for _ in range(count):
        if at + _TOOL_ENTRY.size > len(view):
            break
        id_bytes, block_bytes = _TOOL_ENTRY.unpack_from(view, at)
        at += _TOOL_ENTRY.size
        if id_bytes > TOOL_ID_LIMIT or at + id_bytes + block_bytes > len(view):
            break
        tools.append((bytes(view[at : at + id_bytes]), bytes(view[at + id_bytes : at + id_bytes + block_bytes])))
        at += id_bytes + block_bytes
    return tuple(tools)
