"""Pages, tails, layouts, identities and DSV4 payloads."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb_protocol.dsv4 import Dsv4Header, decode_payload, encode_payload, frontier_shape
from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.ids import NO_PAGE, content_id, extend_prefix, root_prefix
from kvdb_protocol.layout import Codec, Layout, Part, default_page_tokens, frontier_rows, make_layout, row_bytes
from kvdb_protocol.page import Page, decode_page, encode_page, page_head
from kvdb_protocol.sections import PackedSection, decode_sections, encode_sections
from kvdb_protocol.tail import Tail, decode_tail, encode_tail, tail_head, tail_header

DS4 = Path(__file__).parents[1] / "vectors" / "ds4"
RATIOS = (0, 0, 4, 128, 4, 128)
LAYOUT = make_layout(
    vocab=16, context=4096, window=128, head_dim=96, rope_dim=32, index_dim=32, ratios=(0, 4, 128), page_tokens=128
)
FLASH = make_layout(
    vocab=129280, context=1 << 20, window=128, head_dim=512, rope_dim=64, index_dim=128,
    ratios=(0, 0, *([4, 128] * 20), 4),
)  # fmt: skip
FINGERPRINT = b"f" * 32


def join(pieces: object) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)  # type: ignore[attr-defined]


def some_page(layout: Layout = LAYOUT, text: bytes = b"some text") -> Page:
    sections = [
        PackedSection(s.codec, bytes([number]) * layout.section_bytes(s, s.codec, layout.page_rows(s)))
        for number, s in enumerate(layout.streams)
    ]
    return Page(FINGERPRINT, NO_PAGE, 0, bytes(range(256)) * 2, text, sections)


def some_tail(n_tokens: int, layout: Layout = LAYOUT, text: bytes = b"tail") -> Tail:
    first = layout.n_pages(n_tokens) * layout.page_tokens
    sections = [
        PackedSection(s.codec, bytes([number]) * layout.section_bytes(s, s.codec, layout.tail_rows(s, n_tokens)))
        for number, s in enumerate(layout.tail_sections)
    ]
    ids = bytes(4 * (n_tokens - first))
    return Tail(
        tail_header(layout, n_tokens), FINGERPRINT, NO_PAGE, first, ids, text, bytes(4 * layout.vocab), sections
    )


def plain(value: Page | Tail) -> Page | Tail:
    sections = [PackedSection(s.codec, bytes(s.data)) for s in value.sections]
    value = replace(value, ids=bytes(value.ids), sections=sections)
    return replace(value, logits=bytes(value.logits)) if isinstance(value, Tail) else value


@given(st.binary(max_size=70))
@settings(max_examples=30)
def test_pages_round_trip(text: bytes) -> None:
    page = some_page(text=text)
    data = memoryview(join(encode_page(page)))
    assert plain(decode_page(LAYOUT, data)) == page
    assert plain(page_head(data)) == replace(page, sections=[])


@given(st.integers(0, 1100), st.binary(max_size=70))
@settings(max_examples=60)
def test_tails_round_trip(n_tokens: int, text: bytes) -> None:
    tail = some_tail(n_tokens, text=text)
    data = memoryview(join(encode_tail(tail)))
    assert plain(decode_tail(LAYOUT, data)) == tail
    assert plain(tail_head(data)) == replace(tail, sections=[])


def test_a_page_shows_its_magic_and_text_first() -> None:
    data = join(encode_page(some_page()))
    assert data[:4] == b"PAGE"
    assert data[96:108] == b"some text\0\0\0"
    assert data[:32].hex() == "50414745" "0100" "0300" "00000000" "80000000" "09000000" + 12 * "00"  # fmt: skip


def test_a_tail_shows_its_magic_and_text_first() -> None:
    data = join(encode_tail(some_tail(130)))
    assert data[:8].hex() == "44535634" "02000000"  # fmt: skip
    assert data[:4] == b"DSV4"
    assert data[144:148] == b"tail"


def test_truncated_or_longer_payloads_are_refused() -> None:
    for data, decode in (
        (join(encode_page(some_page())), decode_page),
        (join(encode_tail(some_tail(130))), decode_tail),
    ):
        for n_bytes in (*range(0, 400, 7), len(data) - 1):
            with pytest.raises(FormatError):
                decode(LAYOUT, memoryview(data)[:n_bytes])
        with pytest.raises(FormatError):
            decode(LAYOUT, memoryview(data + b"\0"))


def test_wrong_magic_version_and_layout_are_refused() -> None:
    page, tail = bytearray(join(encode_page(some_page()))), bytearray(join(encode_tail(some_tail(5))))
    other = make_layout(vocab=16, context=4096, window=128, head_dim=96, rope_dim=32, index_dim=32,
                        ratios=(0, 4, 128), page_tokens=256)  # fmt: skip
    with pytest.raises(FormatError, match="128 tokens, the layout says 256"):
        decode_page(other, memoryview(page))
    with pytest.raises(FormatError, match="another layout"):
        decode_tail(replace(LAYOUT, vocab=17), memoryview(join(encode_tail(some_tail(5, replace(LAYOUT, vocab=16))))))
    page[4] = 9
    with pytest.raises(VersionError):
        page_head(memoryview(page))
    page[0] = 0
    with pytest.raises(FormatError, match="not a page"):
        page_head(memoryview(page))
    tail[4] = 9
    with pytest.raises(VersionError):
        tail_head(memoryview(tail))
    tail[4], tail[56] = 2, 9  # begins after its own end
    with pytest.raises(FormatError, match="past its"):
        tail_head(memoryview(tail))


def test_unknown_codecs_are_refused() -> None:
    data = bytearray(join(encode_sections(some_page().sections)))
    data[0] = 99
    rows = [LAYOUT.page_rows(section) for section in LAYOUT.streams]
    with pytest.raises(FormatError, match="unknown codec 99 in layer 1 COMPRESSED"):
        decode_sections(LAYOUT, rows, memoryview(data), "page")


def test_a_wider_codec_is_read_back() -> None:
    page = some_page()
    wide = PackedSection(Codec.F32, bytes(LAYOUT.section_bytes(LAYOUT.streams[0], Codec.F32, 32)))
    page = replace(page, sections=[wide, *page.sections[1:]])
    assert plain(decode_page(LAYOUT, memoryview(join(encode_page(page))))) == page


# Layouts


def test_row_bytes_of_the_real_geometry() -> None:
    assert row_bytes(Codec.FP8_F16, 512, 64) == 583
    assert row_bytes(Codec.FP8_F32, 512, 64) == 711
    assert row_bytes(Codec.FP4, 128, 64) == 68
    assert row_bytes(Codec.F32, 512, 64) == 2048
    assert row_bytes(Codec.F16, 512, 64) == 1024


def test_rows_that_do_not_fit_a_codec_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 64"):
        row_bytes(Codec.FP8_F16, 100, 64)
    with pytest.raises(FormatError, match="multiple of 32"):
        row_bytes(Codec.FP4, 40, 0)


def test_a_page_of_the_real_geometry_is_at_most_a_mebibyte() -> None:
    n_bytes = sum(FLASH.section_bytes(s, s.codec, FLASH.page_rows(s)) for s in FLASH.streams)
    assert n_bytes <= 1 << 20 < 2 * n_bytes
    assert FLASH.page_tokens == 256
    assert len(FLASH.ratios) == 43


def test_page_tokens_stay_between_bounds() -> None:
    assert default_page_tokens((4,), 10**9, 0) == 128
    assert default_page_tokens((128,), 1, 0) == 512


def test_layouts_round_trip_and_refuse_nonsense() -> None:
    assert Layout.from_bytes(FLASH.to_bytes()) == FLASH
    assert LAYOUT.to_bytes().hex() == "9b01 10 cd1000 cc80 60 20 20 930004cc80 cc80 03 05".replace(" ", "")
    for data in (b"", b"\x91\x01", b"\xc0", LAYOUT.to_bytes()[:-1], b"\x9b\x02" + LAYOUT.to_bytes()[2:]):
        with pytest.raises(FormatError):
            Layout.from_bytes(data)
    with pytest.raises(FormatError, match="ratios"):
        replace(LAYOUT, ratios=(0, 3))
    with pytest.raises(FormatError, match="page_tokens"):
        replace(LAYOUT, page_tokens=100)


@given(st.integers(0, 5000))
def test_rows_of_pages_and_tail_add_up(n_tokens: int) -> None:
    pages = LAYOUT.n_pages(n_tokens)
    for section in LAYOUT.tail_sections:
        ratio = LAYOUT.ratios[section.layer]
        if section.part in (Part.COMPRESSED, Part.INDEX):
            rows = pages * LAYOUT.page_rows(section) + LAYOUT.tail_rows(section, n_tokens)
            assert rows == n_tokens // ratio
        elif section.part is Part.WINDOW:
            assert LAYOUT.tail_rows(section, n_tokens) == min(n_tokens, 128)
        else:
            assert LAYOUT.tail_rows(section, n_tokens) == frontier_rows(ratio, n_tokens)


def test_frontier_rows() -> None:
    assert [frontier_rows(4, n) for n in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 4]
    assert [frontier_rows(128, n) for n in (0, 1, 127, 128, 129)] == [0, 1, 127, 0, 1]


# Identities


def test_identity_vectors() -> None:
    assert content_id([b"kv", b"db"]) == content_id([b"kvdb"])
    # The BLAKE3 team's own vector for no input.
    assert content_id([]).hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    root = root_prefix(bytes(32))
    assert root.hex() == "f7a90cf8b31a9156d5d5749416d252c8"
    assert extend_prefix(root, b"\x01\0\0\0").hex() == "f29b7283d63353e10bb986068ba1ed6b"
    assert extend_prefix(root, b"") != root


# DSV4 payloads


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_ds4_payloads_round_trip(name: str) -> None:
    data = gzip.decompress((DS4 / f"{name}.payload.gz").read_bytes())
    payload = decode_payload(data, RATIOS)
    assert payload.header.n_tokens == {"prefill": 280, "decode": 299}[name]
    assert payload.header.vocab == 512
    assert join(encode_payload(payload)) == data


def test_ds4_payloads_with_wrong_counts_are_refused() -> None:
    data = bytearray(gzip.decompress((DS4 / "prefill.payload.gz").read_bytes()))
    with pytest.raises(FormatError, match="trailing"):
        decode_payload(data + b"\0", RATIOS)
    with pytest.raises(FormatError, match="6 layers, the model has 5"):
        decode_payload(data, RATIOS[:5])
    with pytest.raises(FormatError, match="row counts"):
        decode_payload(data, (0, 0, 4, 128, 4, 0))
    for n_bytes in (10, 52, 60, 1000, len(data) - 1):
        with pytest.raises(FormatError, match="truncated"):
            decode_payload(data[:n_bytes], RATIOS)
    changed = bytearray(data)
    changed[48] += 1
    with pytest.raises(FormatError, match="window rows"):
        decode_payload(changed, RATIOS)
    changed = bytearray(data)
    changed[4] = 2
    with pytest.raises(VersionError):
        decode_payload(changed, RATIOS)
    changed[0] = 0
    with pytest.raises(FormatError, match="not a DSV4 payload"):
        decode_payload(changed, RATIOS)


def test_header_round_trip_and_frontier_shapes() -> None:
    header = Dsv4Header(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    assert Dsv4Header.from_bytes(header.to_bytes()) == header
    assert len(header.to_bytes()) == 52
    assert frontier_shape(4, 512) == (8, 1024)
    assert frontier_shape(128, 512) == (128, 512)
