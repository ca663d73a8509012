"""kvdb-dump record SEGMENT OFFSET: one record as it lies on disk."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import click

from kvdb.errors import KvdbError
from kvdb.store.index import Index
from kvdb_protocol.layout import Layout, Section
from kvdb_protocol.page import decode_page, page_head
from kvdb_protocol.record import HEADER_BYTES, RecordType, decode_header, decode_record
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import decode_tail, tail_head
from kvdb_tools.dump.source import FILE, Json, excerpt, exit_codes, json_option, print_facts, print_json, print_table


@click.command()
@click.argument("segment", metavar="SEGMENT", type=FILE)
@click.argument("offset", metavar="OFFSET", type=int)
@json_option
def record(segment: Path, offset: int, as_json: bool) -> None:
    """Show the record at OFFSET of the file SEGMENT: header, text, token ids, and its sections.

    The sections need the model's layout, which is looked up in the index beside the segments' folder; without one the
    rest is shown. Example: kvdb-dump record ~/kvdb/segments/00000001.seg 4096
    """
    with exit_codes(), segment.open("rb") as file:
        file.seek(offset)
        head = decode_header(file.read(HEADER_BYTES))
        file.seek(offset)
        header, payload = decode_record(file.read(HEADER_BYTES + head.payload_bytes))
        facts: Json = {
            "type": header.type.name.lower(),
            "id": header.id16.hex() + "...",
            "payload_bytes": header.payload_bytes,
            "record_bytes": header.record_bytes,
            "crc32c": f"{header.payload_crc:08x}",
        }
        described, sections = describe(header.type, payload, segment.parent.parent / "index")
    facts |= described
    if as_json:
        print_json(facts | {"sections": sections})
        return
    print_facts(list(facts.items()))
    if sections:
        click.echo()
        print_table(("layer", "part", "codec", "bytes"), [list(row.values()) for row in sections])


def describe(record_type: RecordType, payload: memoryview, index: Path) -> tuple[Json, list[Json]]:
    """Facts of a payload, and its sections where the layout is known."""
    if record_type == RecordType.STRING:
        return {"value": excerpt(bytes(payload[:400]), 400)}, []
    if record_type == RecordType.PAGE:
        page = page_head(payload)
        layout = layout_of(index, page.fingerprint)
        full = decode_page(layout, payload) if layout else page
        facts: Json = {
            "fingerprint": page.fingerprint.hex(),
            "parent": page.parent.hex(),
            "first": page.first,
            "tokens": page.n_tokens,
            "ids": ids(bytes(page.ids)),
            "text": excerpt(page.text, 200),
        }
        return facts, _sections(layout.streams if layout else (), full.sections)
    tail = tail_head(payload)
    layout = layout_of(index, tail.fingerprint)
    whole = decode_tail(layout, payload) if layout else tail
    facts = {
        "fingerprint": tail.fingerprint.hex(),
        "leaf": tail.leaf.hex(),
        "tokens": tail.n_tokens,
        "first": tail.first,
        "ids": ids(bytes(tail.ids)),
        "text": excerpt(tail.text, 200),
        "vocab": tail.header.vocab,
        "likeliest": likeliest(bytes(tail.logits)),
    }
    return facts, _sections(layout.tail_sections if layout else (), whole.sections)


def _sections(wanted: Sequence[Section], packed: Sequence[PackedSection]) -> list[Json]:
    return [
        {"layer": section.layer, "part": section.part.name.lower(), "codec": piece.codec.name, "bytes": len(piece.data)}
        for section, piece in zip(wanted, packed, strict=True)
    ]


def layout_of(index: Path, fingerprint: bytes) -> Layout | None:
    """The layout that an index has for a model, or None without one."""
    try:
        opened = Index(index, read_only=True)
    except KvdbError:
        return None
    try:
        with opened.read() as txn:
            model = txn.model(fingerprint)
    finally:
        opened.close()
    return Layout.from_bytes(model.layout) if model else None


def ids(data: bytes, limit: int = 12) -> str:
    """Token ids, the first ones."""
    n_tokens = len(data) // 4
    shown = " ".join(str(number) for number in struct.unpack_from(f"<{min(n_tokens, limit)}I", data))
    return shown if n_tokens <= limit else f"{shown} ... ({n_tokens})"


def likeliest(logits: bytes, count: int = 5) -> str:
    """The ids with the largest logits."""
    values = struct.unpack(f"<{len(logits) // 4}f", logits)
    best = sorted(range(len(values)), key=lambda number: -values[number])[:count]
    return " ".join(f"{number}:{values[number]:.3f}" for number in best)
