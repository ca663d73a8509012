"""Identities: what makes two pages, prefixes or snapshots the same thing.

A page's payload names the model fingerprint, its parent page and its tokens, so its id, the hash of the payload, is a
Merkle chain: equal id means equal bytes of the whole prefix. A prefix hash covers tokens only, so that pages can be
found without computing them, also across quantisations of one family.
"""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

ID_BYTES = 32
PREFIX_BYTES = 16
NO_PAGE = bytes(ID_BYTES)  # the parent of a first page, and the leaf of a snapshot that has no full page

Buffer = bytes | bytearray | memoryview


def content_id(buffers: Iterable[Buffer]) -> bytes:
    """Id of a page or a snapshot: blake3 of its payload, given in pieces."""
    hasher = blake3()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.digest()


def root_prefix(family: bytes) -> bytes:
    """Prefix hash of zero tokens of a model family (32-byte family fingerprint)."""
    return blake3(b"kvdb prefix\0" + family).digest(PREFIX_BYTES)


def extend_prefix(parent: bytes, ids: Buffer) -> bytes:
    """Prefix hash after the tokens `ids` (u32 little-endian) follow the prefix `parent`."""
    hasher = blake3(parent)
    hasher.update(ids)
    return hasher.digest(PREFIX_BYTES)
