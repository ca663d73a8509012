"""The `.kv` container, against files that ds4-server wrote."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb_protocol.dsv4 import decode_payload, encode_payload
from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.kvc import Kvc, KvcFlags, KvcReason, decode_kvc, encode_kvc, file_name

FOLDER = Path(__file__).parents[1] / "vectors" / "ds4" / "kv"
FILES = sorted(FOLDER.glob("*.kv.gz"))
RATIOS = (0, 0, 4, 128, 4, 128)


def join(pieces: object) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)  # type: ignore[attr-defined]


SMALL = Kvc(2, KvcReason.COLD, KvcFlags(0), 3, 0, 64, 10, 20, b"text", b"payload", ((b"id", b"block"),))


def test_there_is_a_file_of_each_reason() -> None:
    reasons = {decode_kvc(gzip.decompress(path.read_bytes())).reason for path in FILES}
    assert reasons == {KvcReason.COLD, KvcReason.CONTINUED, KvcReason.EVICT, KvcReason.SHUTDOWN}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name[:8])
def test_files_of_ds4_round_trip(path: Path) -> None:
    data = gzip.decompress(path.read_bytes())
    file = decode_kvc(data)
    assert file.name == path.name.removesuffix(".gz")
    assert join(encode_kvc(file)) == data
    payload = decode_payload(file.payload, RATIOS)
    assert payload.header.n_tokens == file.n_tokens
    assert payload.header.context == file.context
    assert join(encode_payload(payload)) == bytes(file.payload)


@pytest.mark.parametrize(
    ("at", "byte", "error"),
    [(0, 0, FormatError), (3, 2, VersionError), (4, 3, FormatError), (8, 0, FormatError)],
)
def test_bad_headers_are_refused(at: int, byte: int, error: type[Exception]) -> None:
    data = bytearray(join(encode_kvc(SMALL)))
    data[at] = byte
    with pytest.raises(error):
        decode_kvc(data)


def test_truncation_is_refused_at_every_byte_before_the_tool_map() -> None:
    data = join(encode_kvc(SMALL))
    end = len(join(encode_kvc(replace(SMALL, tools=()))))
    for n_bytes in range(end):
        with pytest.raises(FormatError):
            decode_kvc(data[:n_bytes])


def test_a_broken_tool_map_ends_quietly() -> None:
    two = replace(SMALL, tools=((b"a", b"A"), (b"b", b"B")))
    data = join(encode_kvc(two))
    assert decode_kvc(data).tools == two.tools
    assert decode_kvc(data[:-1]).tools == two.tools[:1]
    long_id = replace(SMALL, tools=((b"a", b"A"), (b"x" * 257, b"B")))
    assert decode_kvc(join(encode_kvc(long_id))).tools == ((b"a", b"A"),)


def test_an_unknown_reason_reads_as_unknown() -> None:
    data = bytearray(join(encode_kvc(SMALL)))
    data[5] = 77
    assert decode_kvc(data).reason is KvcReason.UNKNOWN


def test_the_name_is_the_sha1_of_the_text() -> None:
    assert file_name(b"abc") == "a9993e364706816aba3e25717850c26c9cd0d89d.kv"


u32 = st.integers(1, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


@given(
    st.builds(
        Kvc,
        quant_bits=st.sampled_from([2, 4]),
        reason=st.sampled_from(KvcReason),
        flags=st.sampled_from([KvcFlags(0), KvcFlags(2), KvcFlags(4)]),
        n_tokens=u32,
        hits=u32,
        context=u32,
        created_s=u64,
        used_s=u64,
        text=st.binary(),
        payload=st.binary(),
        tools=st.lists(st.tuples(st.binary(max_size=256), st.binary(max_size=64)), max_size=3).map(tuple),
    )
)
def test_round_trip(file: Kvc) -> None:
    found = decode_kvc(join(encode_kvc(file)))
    flags = file.flags | (KvcFlags.TOOL_MAP if file.tools else 0)
    assert replace(found, payload=bytes(found.payload)) == replace(file, flags=flags)
