"""Worker frames arrive whole, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb_protocol.errors import FormatError
from kvdb_protocol.frames import MAX_FRAME_BYTES, FrameReader, encode_frame

messages = st.lists(st.dictionaries(st.text(max_size=5), st.binary(max_size=20) | st.integers(-5, 5)), max_size=5)


@given(messages, st.integers(1, 7))
def test_frames_survive_any_cut(sent: list[dict[str, object]], step: int) -> None:
    data = b"".join(encode_frame(message) for message in sent)
    reader = FrameReader()
    got = [message for at in range(0, len(data), step) for message in reader.feed(data[at : at + step])]
    assert got == sent


def test_an_oversized_frame_is_refused_before_it_arrives() -> None:
    with pytest.raises(FormatError, match="over the limit"):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))


def test_frame_vector() -> None:
    assert encode_frame({"a": 1}).hex() == "04000000" "81a16101"  # fmt: skip
