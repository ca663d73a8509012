"""Tail payload: what a snapshot needs beyond its full pages.

      0  52  the thirteen u32 fields of a DSV4 header (dsv4.py), with version = 2
     52   4  u32 text bytes
     56   4  u32 position of the tail's first token (= tokens in full pages)
     60   4  u32 number of sections
     64  16  zero
     80  32  model fingerprint
    112  32  leaf page id (zero if there is no full page)
    144   .  decoded text of the tail's tokens, raw bytes, zeros to a multiple of 4
      .   .  token ids since the last page boundary, u32 each
      .   .  logits of the next token, f32 x vocab
      .   .  sections (sections.py): rows past the last page, windows, frontiers (layout.tail_sections)

The snapshot id is the blake3 hash of the payload: it covers the model, the leaf page (so the whole prefix) and the
rest. All before the sections is the record's head (record.py): SAMPLE and LOGITS read that alone, 0.5 MB of 9.
Frontier rows that hold no token are not written; a reader fills them with kv = 0 and score = -1e30.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvdb_protocol.dsv4 import HEADER_BYTES as DSV4_BYTES
from kvdb_protocol.dsv4 import Dsv4Header
from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Layout
from kvdb_protocol.record import RecordType, encode_header
from kvdb_protocol.sections import PackedSection, decode_sections, encode_sections, pad4

VERSION = 2
_REST = struct.Struct("<III16x32s32s")
_HEAD_BYTES = DSV4_BYTES + _REST.size


@dataclass(frozen=True, slots=True)
class Tail:
    """A tail's payload, decoded.

    n_tokens: tokens of the whole state. ids: u32 little-endian, those since `first`. logits: f32 x vocab,
    little-endian.
    sections: in the order of layout.tail_sections.
    """

    header: Dsv4Header
    fingerprint: bytes
    leaf: bytes
    first: int
    ids: Buffer
    text: bytes
    logits: Buffer
    sections: Sequence[PackedSection]

    @property
    def n_tokens(self) -> int:
        """Tokens of the snapshot's whole state."""
        return self.header.n_tokens


def tail_header(layout: Layout, n_tokens: int) -> Dsv4Header:
    """The DSV4 header of a tail.

    Fields that only a running engine has are the layout's maxima, so equal states have equal bytes.
    """
    return Dsv4Header(
        version=VERSION,
        context=layout.context,
        prefill_chunk=min(layout.context, 2048),
        ring_rows=min(layout.window, layout.context),
        window=layout.window,
        compressed_capacity=layout.context // 4 + 2,
        n_tokens=n_tokens,
        n_layers=len(layout.ratios),
        head_dim=layout.head_dim,
        index_dim=layout.index_dim,
        vocab=layout.vocab,
        window_rows=min(n_tokens, layout.window),
    )


def encode_tail(tail: Tail) -> list[Buffer]:
    """The payload as a list of buffers; row data is not copied."""
    rest = _REST.pack(len(tail.text), tail.first, len(tail.sections), tail.fingerprint, tail.leaf)
    text = tail.text + pad4(len(tail.text))
    return [tail.header.to_bytes() + rest, text, tail.ids, tail.logits, *encode_sections(tail.sections)]


def head_bytes(payload: Sequence[Buffer]) -> int:
    """Bytes of a tail's payload before its sections. payload: in pieces, the first with at least the fixed fields."""
    fixed = memoryview(payload[0])
    if len(fixed) < _HEAD_BYTES:
        raise FormatError(f"tail is truncated: {len(fixed)} bytes")
    header = Dsv4Header.from_bytes(fixed)
    sizes: tuple[int, int] = _REST.unpack_from(fixed, DSV4_BYTES)[:2]
    text_bytes, first = sizes
    return _HEAD_BYTES + text_bytes + len(pad4(text_bytes)) + 4 * (header.n_tokens - first) + 4 * header.vocab


def state_header(record_type: RecordType, record_id: bytes, payload: Sequence[Buffer]) -> bytes:
    """The record header of a page or tail; a tail's has a head."""
    return encode_header(record_type, record_id, payload, head_bytes(payload) if record_type is RecordType.TAIL else 0)


def tail_head(payload: memoryview) -> Tail:
    """Decode everything but the sections: needs no layout (SAMPLE, LOGITS, dump, fsck). `payload` may be its head."""
    if len(payload) < _HEAD_BYTES:
        raise FormatError(f"tail is truncated: {len(payload)} bytes")
    header = Dsv4Header.from_bytes(payload)
    if header.version != VERSION:
        raise VersionError(f"tail version {header.version} is not supported")
    text_bytes, first, _, fingerprint, leaf = _REST.unpack_from(payload, DSV4_BYTES)
    n_ids = header.n_tokens - first
    if n_ids < 0:
        raise FormatError(f"tail starts at {first}, past its {header.n_tokens} tokens")
    text = bytes(payload[_HEAD_BYTES : _HEAD_BYTES + text_bytes])
    at = _HEAD_BYTES + text_bytes + len(pad4(text_bytes))
    ids = payload[at : at + 4 * n_ids]
    at += 4 * n_ids
    logits = payload[at : at + 4 * header.vocab]
    if len(text) < text_bytes or len(ids) < 4 * n_ids or len(logits) < 4 * header.vocab:
        raise FormatError("tail is truncated inside its text, token ids or logits")
    return Tail(header, fingerprint, leaf, first, ids, text, logits, ())


def decode_tail(layout: Layout, payload: memoryview) -> Tail:
    """Decode a tail of a model with this layout. Views point into `payload`."""
    head = tail_head(payload)
    if head.header != tail_header(layout, head.n_tokens):
        raise FormatError("tail was written for another layout")
    at = _HEAD_BYTES + len(head.text) + len(pad4(len(head.text))) + len(head.ids) + len(head.logits)
    rows = layout.tail_row_counts(head.n_tokens)
    sections = decode_sections(layout, rows, payload[at:], "tail")
    return Tail(head.header, head.fingerprint, head.leaf, head.first, head.ids, head.text, head.logits, sections)
