"""Page payload: the state appended by one aligned span of `page_tokens` tokens.

      0   4  magic "PAGE"
      4   2  u16 version = 1
      6   2  u16 number of sections
      8   4  u32 first position (a multiple of the token count)
     12   4  u32 token count (= page_tokens)
     16   4  u32 text bytes
     20  12  zero
     32  32  model fingerprint
     64  32  parent page id (zero for a first page)
     96   .  decoded text of the tokens, raw bytes, zeros to a multiple of 4
      .   .  token ids, u32 each
      .   .  sections (sections.py): the compressed and index rows that the span completed, of every layer

The page id is the blake3 hash of the payload. Source of the design: docs/format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Layout
from kvdb_protocol.sections import PackedSection, decode_page_sections, encode_sections, pad4

MAGIC = b"PAGE"
VERSION = 1
_HEAD = struct.Struct("<4sHHIII12x32s32s")


@dataclass(frozen=True, slots=True)
class Page:
    """A page's payload, decoded. `ids` is u32 little-endian bytes; sections are in the order of layout.streams."""

    fingerprint: bytes
    parent: bytes
    first: int
    ids: Buffer
    text: bytes
    sections: Sequence[PackedSection]

    @property
    def n_tokens(self) -> int:
        """Tokens of the page."""
        return len(self.ids) // 4


def encode_page(page: Page) -> list[Buffer]:
    """The payload as a list of buffers; row data is not copied."""
    head = _HEAD.pack(
        MAGIC, VERSION, len(page.sections), page.first, page.n_tokens, len(page.text), page.fingerprint, page.parent
    )
    return [head, page.text + pad4(len(page.text)), page.ids, *encode_sections(page.sections)]


def page_head(payload: memoryview) -> Page:
    """Decode everything but the sections: needs no layout (dump, fsck)."""
    if len(payload) < _HEAD.size:
        raise FormatError(f"page is truncated: {len(payload)} bytes")
    magic, version, _, first, n_tokens, text_bytes, fingerprint, parent = _HEAD.unpack_from(payload)
    if magic != MAGIC:
        raise FormatError(f"not a page: magic {magic!r}")
    if version != VERSION:
        raise VersionError(f"page version {version} is not supported")
    text = bytes(payload[_HEAD.size : _HEAD.size + text_bytes])
    at = _HEAD.size + text_bytes + len(pad4(text_bytes))
    ids = payload[at : at + 4 * n_tokens]
    if len(text) < text_bytes or len(ids) < 4 * n_tokens:
        raise FormatError("page is truncated inside its text or token ids")
    return Page(fingerprint, parent, first, ids, text, ())


def decode_page(layout: Layout, payload: memoryview) -> Page:
    """Decode a page of a model with this layout. Views point into `payload`."""
    head = page_head(payload)
    if head.n_tokens != layout.page_tokens:
        raise FormatError(f"page has {head.n_tokens} tokens, the layout says {layout.page_tokens}")
    at = _HEAD.size + len(head.text) + len(pad4(len(head.text))) + 4 * head.n_tokens
    sections = decode_page_sections(layout, payload[at:], f"page at {head.first}")
    return Page(head.fingerprint, head.parent, head.first, head.ids, head.text, sections)
