"""States as pages, tails and ds4 payloads; what does not fit is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from kvdb_engine.engine import Engine
from kvdb_engine.errors import ContextFullError, StateError, TokenError
from kvdb_engine.fidelity import Vectors
from kvdb_engine.model import state_arrays
from kvdb_engine.ops import MASKED
from kvdb_engine.state import State
from kvdb_engine.state_records import from_dsv4, page_sections, state_from_records, to_dsv4
from kvdb_protocol.dsv4 import decode_payload, encode_payload
from kvdb_protocol.layout import Codec, Part
from kvdb_protocol.page import Page, decode_page
from kvdb_protocol.tail import Tail, decode_tail
from tests.engine.conftest import BACKEND, records

Runs = Callable[[Engine, np.ndarray], State]
Hash = Callable[[Engine, State], bytes]


def decoded(engine: Engine, state: State) -> tuple[list[Page], Tail]:
    pages, tail = records(engine, state)
    layout = engine.info.layout
    return [decode_page(layout, memoryview(p)) for p in pages], decode_tail(layout, memoryview(tail))


def test_rows_pack_with_the_tight_codecs(nano: Engine, stream: np.ndarray, prefilled: Runs) -> None:
    state = prefilled(nano, stream[:1100])
    layout = nano.info.layout
    sections = page_sections(state, 1)
    assert [s.codec for s in sections] == [s.codec for s in layout.streams]
    tail = nano.tail_sections(state)
    assert [s.codec for s in tail] == [s.codec for s in layout.tail_sections]
    for section, packed in zip(layout.tail_sections, tail, strict=True):
        assert len(packed.data) == layout.section_bytes(section, packed.codec, layout.tail_rows(section, 1100))


def test_pages_do_not_depend_on_what_follows(nano: Engine, stream: np.ndarray, prefilled: Runs) -> None:
    short, long = prefilled(nano, stream[:512]), prefilled(nano, stream[:1400])
    assert [bytes(s.data) for s in page_sections(short, 0)] == [bytes(s.data) for s in page_sections(long, 0)]
    with pytest.raises(StateError, match="page 1 is not full"):
        page_sections(short, 1)


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 6, 127, 128, 131, 280])
def test_dsv4_round_trip(
    nano: Engine, stream: np.ndarray, prefilled: Runs, fingerprint_of: Hash, n_tokens: int
) -> None:
    state = prefilled(nano, stream[:n_tokens])
    data = b"".join(bytes(piece) for piece in encode_payload(to_dsv4(state)))
    back = from_dsv4(nano.info, decode_payload(data, nano.info.config.ratios))
    assert fingerprint_of(nano, back) == fingerprint_of(nano, state)
    nano.step(state, 9)
    nano.step(back, 9)
    assert fingerprint_of(nano, back) == fingerprint_of(nano, state)


def test_ds4s_payload_survives_bit_by_bit(tiny: Engine, vectors: Vectors) -> None:
    """ds4 -> state -> records -> state -> ds4: every byte but those of rows that hold no token."""
    theirs = vectors.payload("prefill", tiny.info.config.ratios)
    state = tiny.load_dsv4(theirs)
    pages, tail = decoded(tiny, state)
    assert {s.codec for s in tail.sections if len(s.data)} == {Codec.FP8_F16, Codec.FP4, Codec.F32}
    ours = to_dsv4(tiny.load(pages, tail), theirs.header.context)
    assert ours.header == theirs.header
    assert bytes(ours.ids) == bytes(theirs.ids) and bytes(ours.logits) == bytes(theirs.logits)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert bytes(a.window) == bytes(b.window)
        assert bytes(a.compressed) == bytes(b.compressed) and bytes(a.index) == bytes(b.index)
        for x, y in ((a.frontier_score, b.frontier_score), (a.index_frontier_score, b.index_frontier_score)):
            held = np.frombuffer(x, "<f4") != np.float32(MASKED)
            assert np.array_equal(np.frombuffer(x, "<f4")[held], np.frombuffer(y, "<f4")[held])


def test_records_that_do_not_fit_are_refused(nano: Engine, stream: np.ndarray, prefilled: Runs) -> None:
    pages, tail = decoded(nano, prefilled(nano, stream[:1100]))
    info = nano.info
    with pytest.raises(StateError, match="1 pages given"):
        state_from_records(info, pages[:1], tail)
    with pytest.raises(StateError, match="page 0 starts at token 512"):
        state_from_records(info, pages[::-1], tail)
    header = dataclasses.replace(tail.header, vocab=7)
    with pytest.raises(StateError, match="another layout"):
        state_from_records(info, pages, dataclasses.replace(tail, header=header))
    ids = np.frombuffer(tail.ids, "<u4").copy()
    ids[3] = 2560
    with pytest.raises(StateError, match="token id 2560 is outside"):
        state_from_records(info, pages, dataclasses.replace(tail, ids=ids.tobytes()))


def test_payloads_of_another_model_are_refused(nano: Engine, tiny: Engine, vectors: Vectors) -> None:
    with pytest.raises(StateError, match="payload has"):
        from_dsv4(nano.info, vectors.payload("prefill", tiny.info.config.ratios))


def test_bad_tokens_and_full_contexts(nano: Engine) -> None:
    state = nano.new_state()
    for bad in ([-1], [5, 2560]):
        with pytest.raises(TokenError, match="outside the vocabulary"):
            next(nano.prefill(state, bad))
    with pytest.raises(TokenError):
        nano.step(state, 2560)
    with pytest.raises(ContextFullError, match="context of 32768"):
        next(nano.prefill(state, [5] * 32769))
    assert state.n_tokens == 0 and list(nano.prefill(state, [])) == []
    assert state.logits.shape == (2560,) and not state.logits.any()


@pytest.mark.skipif(BACKEND != "numpy", reason="looks into numpy arrays")
def test_nbytes_is_the_memory_that_a_state_keeps_alive(nano: Engine, stream: np.ndarray, prefilled: Runs) -> None:
    """No slice may keep the chunk alive that it was cut from, and rows are f16."""
    state = prefilled(nano, stream[:1030])
    alive = {}
    for array in (state.ids, *state_arrays(state.layers)):
        array = getattr(array, "data", array) if not isinstance(array, np.ndarray) else array
        while array.base is not None:
            array = array.base
        alive[id(array)] = array.nbytes
    assert sum(alive.values()) == state.nbytes - state.logits.nbytes
    layout = nano.info.layout
    least = 4 * (layout.vocab + 1030)
    for section in layout.tail_sections:
        if section.part in (Part.COMPRESSED, Part.INDEX):
            least += 2 * section.width * (1030 // layout.ratios[section.layer])
        else:
            least += (2 if section.part is Part.WINDOW else 4) * section.width * layout.tail_rows(section, 1030)
    assert least <= state.nbytes < 1.25 * least


def test_rows_that_are_no_halves_stay_as_they_are(tiny: Engine, vectors: Vectors) -> None:
    """ds4 on a GPU keeps the RoPE values of compressed rows in f32: nothing of such a payload may change."""
    payload = vectors.payload("prefill", tiny.info.config.ratios)
    state = tiny.load_dsv4(payload)
    assert all("float16" in str(layer.window.dtype) for layer in state.layers)
    layer = next(number for number, ratio in enumerate(state.layout.ratios) if ratio)
    old = payload.layers[layer]
    rows = np.frombuffer(old.compressed, "<f4").copy()
    rows[-1] += np.float32(1e-6)
    changed = dataclasses.replace(old, compressed=rows.tobytes())
    layers = (*payload.layers[:layer], changed, *payload.layers[layer + 1 :])
    state = tiny.load_dsv4(dataclasses.replace(payload, layers=layers))
    assert bytes(to_dsv4(state).layers[layer].compressed) == rows.tobytes()
    for token in (3, 5, 7, 11, 13):
        tiny.step(state, token)
    kept = np.frombuffer(to_dsv4(state).layers[layer].compressed, "<f4")
    assert np.array_equal(kept[: len(rows)], rows) and len(kept) > len(rows)
