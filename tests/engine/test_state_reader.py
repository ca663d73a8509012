"""Reading a state's records: what comes out is right, or it is an error that names the record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.state_reader import BadRecordError, Buffers, Place, StateReader
from kvdb_engine.synthetic import SyntheticEngine
from kvdb_protocol.ids import NO_PAGE, Buffer, content_id
from kvdb_protocol.page import Page, encode_page
from kvdb_protocol.record import RecordType, encode_header, padding, record_bytes
from kvdb_protocol.tail import Tail, encode_tail, tail_header

INFO = open_model("synthetic:dsv4-flash,layers=4,vocab=500,context=4096,page_tokens=128,verify=yes")
ENGINE = SyntheticEngine(INFO)
N_TOKENS = 400


@pytest.fixture
def places(tmp_path: Path) -> list[Place]:
    """A state's records in two segment files."""
    state = ENGINE.new_state()
    list(ENGINE.prefill(state, np.random.default_rng(1).integers(0, 500, N_TOKENS).astype(np.uint32)))
    found: list[Place] = []
    parent = NO_PAGE

    def put(kind: RecordType, payload: list[Buffer], file: Path) -> bytes:
        record_id = content_id(payload)
        n_bytes = sum(len(piece) for piece in payload)
        offset = file.stat().st_size if file.exists() else 0
        with file.open("ab") as out:
            out.writelines([encode_header(kind, record_id, payload), *payload, padding(n_bytes)])
        found.append((str(file), offset, record_bytes(n_bytes), record_id))
        return record_id

    for number in range(3):
        ids = state.ids[128 * number : 128 * (number + 1)].tobytes()
        page = Page(INFO.fingerprint, parent, 128 * number, ids, b"", ENGINE.page_sections(state, number))
        parent = put(RecordType.PAGE, encode_page(page), tmp_path / f"{number // 2}.seg")
    tail = Tail(
        *(tail_header(INFO.layout, N_TOKENS), INFO.fingerprint, parent, 384, state.ids[384:].tobytes(), b""),
        *(ENGINE.logits(state), ENGINE.tail_sections(state)),
    )
    put(RecordType.TAIL, encode_tail(tail), tmp_path / "1.seg")
    return found


def read(places: list[Place]) -> int:
    with StateReader(INFO.layout, places) as reader:
        tail = reader.tail()
        return ENGINE.load(reader.pages(), tail).n_tokens


def test_a_state_comes_back_and_every_row_is_checked(places: list[Place]) -> None:
    before = int(ENGINE.stats()["verified_sections"])
    assert read(places) == N_TOKENS
    assert int(ENGINE.stats()["verified_sections"]) > before
    with StateReader(INFO.layout, places) as reader:
        reader.tail()
        list(reader.pages())
        assert reader.n_read == sum(place[2] for place in places)
        assert reader.page_ids == [place[3] for place in places[:3]]


def test_pages_come_through_few_buffers(places: list[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdb_engine.state_reader.PIECE_BYTES", 4096)
    monkeypatch.setattr("kvdb_engine.state_reader.AHEAD", 1)  # with more, timing decides which one is used again
    with StateReader(INFO.layout, places) as reader:
        reader.tail()
        pages = reader.pages()
        first = next(pages)
        before = bytes(first.ids)
        next(pages)
        assert bytes(first.ids) != before  # so whoever keeps a page must copy it


@pytest.mark.parametrize("piece_bytes", [1000, 40_000, 1 << 30])
def test_pieces_of_any_size_read_the_same(
    places: list[Place], monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("kvdb_engine.state_reader.PIECE_BYTES", piece_bytes)
    assert read(places) == N_TOKENS
    # Pages that do not lie in order, or not one behind the other, are runs of their own.
    moved = Path(places[0][0]).with_name("2.seg")
    moved.write_bytes(bytes(4096) + Path(places[1][0]).read_bytes())
    assert read([places[0], (str(moved), places[1][1] + 4096, *places[1][2:]), *places[2:]]) == N_TOKENS


@pytest.mark.parametrize("number", range(4))
def test_a_flipped_byte_is_found(places: list[Place], number: int) -> None:
    path, offset, size, _ = places[number]
    data = bytearray(Path(path).read_bytes())
    data[offset + size // 2] ^= 1
    Path(path).write_bytes(data)
    name = "tail" if number == 3 else f"page {number}"
    with pytest.raises(BadRecordError, match=rf"^{name} \({number // 2}\.seg offset {offset}\): .*checksum"):
        read(places)


def test_exchanged_pages_are_found(places: list[Place]) -> None:
    a, b = places[0], places[1]
    with pytest.raises(BadRecordError, match="another record lies there"):
        read([(*a[:3], b[3]), *places[1:]])
    with pytest.raises(BadRecordError, match=r"page 0 .*another parent"):
        read([b, a, *places[2:]])
    with pytest.raises(BadRecordError, match="tail names another leaf"):
        read([*places[:2], places[3]])
    with pytest.raises(BadRecordError, match="record holds a tail"):
        read([places[3], *places[1:]])


def test_short_and_missing_files_are_found(places: list[Place]) -> None:
    path = Path(places[2][0])
    path.write_bytes(path.read_bytes()[: places[2][1] + 100])
    with pytest.raises(BadRecordError, match="truncated"):
        read(places)
    path.unlink()
    with pytest.raises(BadRecordError, match=r"1\.seg.*No such file"):
        read(places)


def test_buffers_are_kept_and_states_read_with_them_are_right(places: list[Place]) -> None:
    buffers = Buffers()
    before = buffers.take("tail", 10)
    assert len(buffers.take("tail", 5)) == 5 and len(before) == 10
    for _ in range(2):
        with StateReader(INFO.layout, places, buffers) as reader:
            tail = reader.tail()
            state = ENGINE.load(reader.pages(), tail)
        assert state.n_tokens == N_TOKENS
    kept = buffers.take("tail", 1).obj
    assert buffers.take("tail", len(memoryview(tail.logits).obj)).obj is kept
    # The first state stays what it was when the buffers hold something else.
    ids = state.ids.copy()
    buffers.take("tail", 10)[:] = bytes(10)
    buffers.take("run 0", 10)[:] = bytes(10)
    assert np.array_equal(state.ids, ids)
