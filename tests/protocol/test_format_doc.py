"""The bytes drawn in docs/format.md are the bytes the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvdb.store.change_log import encode_record
from kvdb.store.entries import Entry, EntryType, StringRef, encode_entry, name_key
from kvdb.store.index import Table, seal
from kvdb.store.layer import Layer
from kvdb.store.rows import pack_string_place
from kvdb_protocol.archive import Archive, encode_head
from kvdb_protocol.frames import encode_frame
from kvdb_protocol.ids import extend_prefix, root_prefix
from kvdb_protocol.kvc import Kvc, KvcFlags, KvcReason, encode_kvc
from kvdb_protocol.layout import make_layout
from kvdb_protocol.page import Page, encode_page
from kvdb_protocol.record import HEADER_BYTES, RecordType, encode_header, encode_segment_header
from kvdb_protocol.sections import PackedSection

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
VECTORS = {
    name: bytes.fromhex("".join(block.split()))
    for name, block in re.findall(r"```vector (\w+)\n(.*?)```", DOC, flags=re.DOTALL)
}
LAYOUT = make_layout(
    vocab=16, context=4096, window=128, head_dim=96, rope_dim=32, index_dim=32, ratios=(0, 4, 128), page_tokens=128
)

LARGE = StringRef(7, 8192, 300_000, b"\x11" * 16, b"\1\0\0\0\2\0\0\0")


def page() -> bytes:
    sections = [PackedSection(section.codec, b"") for section in LAYOUT.streams]
    return bytes(encode_page(Page(bytes(32), bytes(32), 0, bytes(512), b"some text", sections))[0][:32])


def changes() -> bytes:
    layer = Layer()
    layer.maps[0] |= {b"k": Entry(EntryType.STRING, 5, b"v"), b"gone": None}
    return layer.pack({}, {7: (12288, 1_699_999_985_664)})


def written() -> dict[str, bytes]:
    root = root_prefix(bytes(32))
    kvc = Kvc(2, KvcReason.COLD, KvcFlags(0), 3, 0, 64, 10, 20, b"text", b"payload", ((b"id", b"block"),))
    record = encode_header(RecordType.TAIL, bytes(range(32)), [b"hello"])
    assert len(record) == HEADER_BYTES
    return {
        "prefix": root + extend_prefix(root, b"\x01\0\0\0"),
        "segment": encode_segment_header(7, 1_699_999_985_664)[:36],
        "record": record + b"hello",
        "head": encode_header(RecordType.TAIL, bytes(32), [b"hello", b" world"], 5)[48:],
        "page": page(),
        "layout": LAYOUT.to_bytes(),
        "kvc": b"".join(bytes(piece) for piece in encode_kvc(kvc)),
        "name": name_key(0, b"step-7"),
        "entry": encode_entry(b"k", Entry(EntryType.STRING, 5, b"v")),
        "large": encode_entry(b"k", Entry(EntryType.STRING, 0, LARGE)),
        "shared": pack_string_place([name_key(0, key) for key in (b"a", b"b")], LARGE.n_bytes),
        "archive": encode_head(Archive("m", b"", b"", b"", 5, 7, 9, 1))[:48],
        "frame": encode_frame({"a": 1}),
        "log": encode_record(0x1122334455667788, 9, 0, changes()),
        "seal": seal(Table.KEYS, b"key", b"value"),
    }


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_vectors(name: str) -> None:
    assert written()[name].hex() == VECTORS[name].hex()


def test_every_format_has_a_vector() -> None:
    assert written().keys() == VECTORS.keys()


def test_every_table_is_described() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", DOC.split("## 10.")[1], flags=re.MULTILINE))
    assert described == {table.name.lower() for table in Table}
