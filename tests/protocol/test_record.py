"""Segments and records: fixed bytes, round trips, and every single-bit flip noticed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb_protocol.errors import ChecksumError, FormatError, VersionError
from kvdb_protocol.record import (
    ALIGN,
    HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordType,
    crc32c,
    crc32c_join,
    decode_header,
    decode_record,
    decode_record_head,
    decode_segment_header,
    encode_header,
    encode_segment_header,
    padding,
    record_bytes,
)

ID = bytes(range(32))
# Also in docs/format.md: whoever writes another reader checks it against these.
RECORD_HEX = (
    "4b565231" "02" "01" "0000" "0500000000000000" "0500000000000000" "4cbb719a" "4820dc25"
    "000102030405060708090a0b0c0d0e0f" "00000000000000000000000000000000" "68656c6c6f"
)  # fmt: skip
HEAD_HEX = "050000004cbb719a0000000000000000"
SEGMENT_HEX = "4b56444253454731" "01000000" "00000000" "0700000000000000" "0030e5cf8b010000"  # fmt: skip


def record(payload: bytes, record_type: RecordType = RecordType.TAIL) -> bytes:
    return encode_header(record_type, ID, [payload]) + payload + padding(len(payload))


def test_record_vector() -> None:
    data = record(b"hello")
    assert len(data) == ALIGN
    assert data[: HEADER_BYTES + 5].hex() == RECORD_HEX
    assert not any(data[HEADER_BYTES + 5 :])


def test_segment_vector() -> None:
    data = encode_segment_header(7, 1_699_999_985_664)
    assert len(data) == SEGMENT_HEADER_BYTES
    assert data[:32].hex() == SEGMENT_HEX
    assert data[32:36] == crc32c([data[:32]]).to_bytes(4, "little")
    assert not any(data[36:])
    assert decode_segment_header(data) == (7, 1_699_999_985_664)


def test_crc32c_is_castagnoli_over_any_buffers() -> None:
    assert crc32c([b"123456789"]) == 0xE3069283
    assert crc32c([bytearray(b"1234"), memoryview(b"xx56789")[2:], b""]) == 0xE3069283


def by_the_bit(data: bytes, crc: int = 0) -> int:
    """crc32c as its polynomial says, bit by bit: slow, and nobody else's code."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("n_bytes", [*range(70), 127, 128, 129, 255, 256, 257, 1023, 1025, 4096, 65536, 65537])
def test_every_path_of_the_library_computes_castagnoli(n_bytes: int) -> None:
    """It has others for short and long buffers and for each processor: here those of this machine."""
    data = random.Random(n_bytes).randbytes(n_bytes + 1)[1:]
    assert crc32c([data]) == by_the_bit(data)
    assert crc32c([data], 7) == by_the_bit(data, 7)
    assert crc32c([memoryview(bytearray(b"x" + data))[1:]], 7) == by_the_bit(data, 7)


@given(st.binary(max_size=50), st.binary(max_size=5000))
def test_checksums_of_two_pieces_join(first: bytes, second: bytes) -> None:
    assert crc32c_join(crc32c([first]), crc32c([second]), len(second)) == crc32c([first + second])


@given(st.binary(max_size=9000), st.sampled_from(RecordType))
def test_round_trip(payload: bytes, record_type: RecordType) -> None:
    data = record(payload, record_type)
    assert len(data) == record_bytes(len(payload))
    header, view = decode_record(data)
    assert (header.type, header.id16, bytes(view)) == (record_type, ID[:16], payload)


def test_the_head_has_a_checksum_of_its_own() -> None:
    pieces = [b"he", bytearray(b"ll"), b"o world"]
    payload = b"".join(pieces)
    header = encode_header(RecordType.TAIL, ID, pieces, 5)
    assert header[48:].hex() == HEAD_HEX
    # Whoever does not know of heads reads the record as before.
    assert header[:28] + header[32:48] == record(payload)[:28] + record(payload)[32:48]
    found, view = decode_record_head(header + b"hello")
    assert (found.head_bytes, found.payload_bytes, bytes(view)) == (5, len(payload), b"hello")
    assert bytes(decode_record(header + payload)[1]) == payload
    assert bytes(decode_record_head(record(payload))[1]) == b""  # a record of an earlier version
    with pytest.raises(FormatError, match="truncated"):
        decode_record_head(header + b"hell")
    for at in range(5):
        data = bytearray(header + payload)
        data[HEADER_BYTES + at] ^= 1
        with pytest.raises(ChecksumError):
            decode_record_head(data)
        with pytest.raises(ChecksumError):
            decode_record(data)
    with pytest.raises(FormatError, match="the head has 2 bytes, the payload 1"):
        decode_header(with_header(b48=2))
    # A head whose own checksum is wrong is refused by whoever reads all, too.
    with pytest.raises(ChecksumError):
        decode_record(with_header(b48=1) + b"x")


def test_every_flipped_bit_is_noticed() -> None:
    data = bytearray(record(b"hello world"))
    for bit in range(8 * (HEADER_BYTES + 11)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_record(data)
        data[bit // 8] ^= 1 << bit % 8
    decode_record(data)


def test_every_truncation_is_noticed() -> None:
    data = record(b"hello world")
    for n_bytes in range(HEADER_BYTES + 11):
        with pytest.raises(FormatError):
            decode_record(data[:n_bytes])


def with_header(**changes: int) -> bytes:
    """A record header with changed fields and a right checksum."""
    head = bytearray(record(b"x")[:HEADER_BYTES])
    for at, value in ((int(name[1:]), value) for name, value in changes.items()):
        head[at] = value
    head[28:32] = crc32c([head[:28] + bytes(4) + head[32:]]).to_bytes(4, "little")
    return bytes(head)


def test_unknown_kinds_are_refused_even_with_a_right_checksum() -> None:
    with pytest.raises(FormatError, match="unknown record type 9"):
        decode_header(with_header(b4=9))
    with pytest.raises(VersionError, match="version 2"):
        decode_header(with_header(b5=2))
    with pytest.raises(VersionError):
        decode_header(with_header(b6=1))
    with pytest.raises(VersionError):
        decode_header(with_header(b16=2))
    with pytest.raises(FormatError, match="not a record"):
        decode_header(with_header(b0=0))


def test_bad_segment_headers_are_refused() -> None:
    data = bytearray(encode_segment_header(1, 2))
    for at in range(36):
        data[at] ^= 0x40
        with pytest.raises(FormatError):
            decode_segment_header(data)
        data[at] ^= 0x40
    with pytest.raises(FormatError, match="truncated"):
        decode_segment_header(data[:20])
    data[8] = 2
    data[32:36] = crc32c([data[:32]]).to_bytes(4, "little")
    with pytest.raises(VersionError):
        decode_segment_header(data)


def test_a_wrong_payload_says_checksum() -> None:
    data = bytearray(record(b"hello"))
    data[HEADER_BYTES] ^= 1
    with pytest.raises(ChecksumError, match="payload"):
        decode_record(data)
