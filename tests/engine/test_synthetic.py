"""The synthetic engine: exact shapes, canonical packing, rows that depend on the prefix and on nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.errors import ContextFullError, ModelError, StateError, TokenError
from kvdb_engine.packing import pack_section, unpack_section
from kvdb_engine.synthetic import SyntheticEngine, SyntheticState
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.layout import Codec, Layout, Part
from kvdb_protocol.page import Page, decode_page, encode_page
from kvdb_protocol.tail import Tail, decode_tail, encode_tail, tail_header

SMALL = "synthetic:dsv4-flash,layers=6,vocab=1000,context=4096,page_tokens=256"


def engine_of(spec: str) -> SyntheticEngine:
    return SyntheticEngine(open_model(spec))


def filled(engine: SyntheticEngine, ids: list[int] | np.ndarray) -> SyntheticState:
    state = engine.new_state()
    for _ in engine.prefill(state, np.asarray(ids, np.uint32)):
        pass
    return state


def some_ids(n: int, vocab: int = 1000, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n).astype(np.uint32)


def records(engine: SyntheticEngine, state: SyntheticState) -> tuple[list[Page], Tail]:
    """The state's pages and tail after a trip through their bytes."""
    layout, info = engine.layout, engine.info
    pages = []
    for number in range(layout.n_pages(state.n_tokens)):
        span = state.ids[number * layout.page_tokens : (number + 1) * layout.page_tokens]
        page = Page(
            info.fingerprint,
            NO_PAGE,
            number * layout.page_tokens,
            span.tobytes(),
            b"",
            engine.page_sections(state, number),
        )
        pages.append(decode_page(layout, memoryview(b"".join(encode_page(page)))))
    first = len(pages) * layout.page_tokens
    tail = Tail(
        tail_header(layout, state.n_tokens), info.fingerprint, NO_PAGE, first, state.ids[first:].tobytes(), b"",
        engine.logits(state), engine.tail_sections(state),
    )  # fmt: skip
    return pages, decode_tail(layout, memoryview(b"".join(encode_tail(tail))))


def test_flash_geometry() -> None:
    layout = open_model("synthetic:dsv4-flash").layout
    assert (len(layout.ratios), layout.vocab, layout.window, layout.context) == (43, 129280, 128, 1 << 20)
    assert layout.ratios[:4] == (0, 0, 4, 128) and (layout.ratios.count(4), layout.ratios.count(128)) == (21, 20)
    stream = layout.streams[0]
    assert layout.section_bytes(stream, stream.codec, 1) == 583
    assert layout.section_bytes(layout.streams[1], Codec.FP4, 1) == 68
    engine = engine_of("synthetic:dsv4-flash")
    state = filled(engine, some_ids(700, 129280))
    assert len(engine.logits(state)) == 4 * 129280
    for section, packed in zip(layout.tail_sections, engine.tail_sections(state), strict=True):
        assert len(packed.data) == layout.section_bytes(section, section.codec, layout.tail_rows(section, 700))


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 127, 128, 129, 255, 256, 300, 515])
def test_packing_is_canonical(n_tokens: int) -> None:
    engine = engine_of(SMALL)
    layout = engine.layout
    state = filled(engine, some_ids(n_tokens))
    runs = [
        (
            layout.tail_sections,
            engine.tail_sections(state),
            [layout.tail_rows(s, n_tokens) for s in layout.tail_sections],
        )
    ]
    if layout.n_pages(n_tokens):
        runs.append((layout.streams, engine.page_sections(state, 0), [layout.page_rows(s) for s in layout.streams]))
    for sections, packed, counts in runs:
        for section, one, n_rows in zip(sections, packed, counts, strict=True):
            rows = unpack_section(section, one, n_rows, layout.rope_dim)
            assert np.isfinite(rows).all()
            again = pack_section(section, rows, layout.rope_dim)
            assert again.codec is section.codec and bytes(again.data) == bytes(one.data), section


def test_a_row_is_a_function_of_its_prefix() -> None:
    engine = engine_of(SMALL)
    ids = some_ids(600)
    whole, parts = filled(engine, ids), filled(engine, ids[:250])
    for token in ids[250:260]:
        engine.step(parts, int(token))
    for _ in engine.prefill(parts, ids[260:]):
        pass
    assert [bytes(s.data) for s in engine.tail_sections(whole)] == [bytes(s.data) for s in engine.tail_sections(parts)]
    assert engine.logits(whole) == engine.logits(parts)
    # The rows that a tail shows past its last page are those the page will hold.
    stream = engine.layout.streams[0]
    size = engine.layout.section_bytes(stream, stream.codec, 1)
    page = bytes(engine.page_sections(whole, 1)[0].data)
    tail = bytes(engine.tail_sections(filled(engine, ids[:500]))[0].data)
    assert len(tail) == size * (500 // 4 - 64) and page.startswith(tail)


def test_one_other_token_changes_every_later_row() -> None:
    engine = engine_of(SMALL)
    ids = some_ids(512)
    other = ids.copy()
    other[100] = (other[100] + 1) % 1000
    a, b = filled(engine, ids), filled(engine, other)
    for stream, left, right in zip(
        engine.layout.streams, engine.page_sections(a, 0), engine.page_sections(b, 0), strict=True
    ):
        n_rows, ratio = engine.layout.page_rows(stream), engine.layout.ratios[stream.layer]
        rows = [np.frombuffer(one.data, np.uint8).reshape(n_rows, -1) for one in (left, right)]
        differs = (rows[0] != rows[1]).any(axis=1)
        assert differs.tolist() == [(group + 1) * ratio > 100 for group in range(n_rows)]
    assert engine.logits(a) != engine.logits(b)
    swapped = ids.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert bytes(engine.page_sections(filled(engine, swapped), 1)[0].data) != bytes(engine.page_sections(a, 1)[0].data)


def test_layers_and_parts_differ() -> None:
    engine = engine_of(SMALL)
    windows = [
        bytes(packed.data)
        for section, packed in zip(
            engine.layout.tail_sections, engine.tail_sections(filled(engine, some_ids(130))), strict=True
        )
        if section.part in (Part.WINDOW, Part.FRONTIER_KV, Part.FRONTIER_SCORE)
    ]
    assert len(set(windows)) == len(windows)


def test_clones_are_independent() -> None:
    engine = engine_of(SMALL)
    state = filled(engine, some_ids(300))
    clone = state.clone()
    assert clone.timeline is state.timeline
    before = bytes(engine.tail_sections(state)[0].data)
    engine.step(clone, 5)
    engine.step(state, 6)
    assert (state.n_tokens, clone.n_tokens) == (301, 301)
    assert (int(state.ids[300]), int(clone.ids[300])) == (6, 5)
    assert bytes(engine.tail_sections(filled(engine, state.ids[:300]))[0].data) == before


def test_load_keeps_the_tokens_and_continues() -> None:
    engine = engine_of(SMALL)
    state = filled(engine, some_ids(777))
    loaded = engine.load(*records(engine, state))
    assert np.array_equal(loaded.ids, state.ids)
    engine.step(loaded, 9)
    engine.step(state, 9)
    assert engine.logits(loaded) == engine.logits(state)


def test_verify_finds_a_changed_byte() -> None:
    engine = engine_of(SMALL + ",verify=yes")
    state = filled(engine, some_ids(777))
    pages, tail = records(engine, state)
    assert engine.load(pages, tail).n_tokens == 777
    assert engine.stats()["verified_sections"] > 0
    section = pages[1].sections[2]
    data = bytearray(section.data)
    data[17] ^= 1
    sections = [*pages[1].sections[:2], section._replace(data=bytes(data)), *pages[1].sections[3:]]
    with pytest.raises(StateError, match="page 1: layer"):
        engine.load([pages[0], replace(pages[1], sections=sections), *pages[2:]], tail)
    with pytest.raises(StateError, match="logits"):
        engine.load(pages, replace(tail, logits=bytes(4000)))
    with pytest.raises(StateError, match="tokens"):
        engine.load(pages[:-1], tail)
    # The same damage passes where nobody asked to look.
    assert engine_of(SMALL).load([pages[0], replace(pages[1], sections=sections), *pages[2:]], tail).n_tokens == 777


def test_bad_tokens_are_refused() -> None:
    engine = engine_of(SMALL)
    state = engine.new_state()
    with pytest.raises(TokenError, match="1000"):
        engine.step(state, 1000)
    with pytest.raises(ContextFullError, match="4096"):
        list(engine.prefill(state, np.zeros(4097, np.uint32)))
    assert state.n_tokens == 0 and engine.logits(state) == bytes(4000)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("synthetic:gpt", "unknown"),
        ("synthetic:dsv4-flash,context", "FIELD=NUMBER"),
        ("synthetic:dsv4-flash,colour=3", "no option"),
        ("synthetic:dsv4-flash,vocab=100", "vocabulary"),
        ("synthetic:dsv4-flash,page_tokens=100", "page_tokens"),
        ("synthetic:dsv4-flash,head_dim=100,rope_dim=7", "rope dim"),
    ],
)
def test_bad_names_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        open_model(spec)


def test_names_and_fingerprints() -> None:
    flash, small = open_model("synthetic:dsv4-flash"), open_model("big=synthetic:dsv4-flash,context=65536")
    assert flash.is_synthetic and flash.name == "synthetic:dsv4-flash" and small.name == "big"
    assert flash.family != small.family and flash.fingerprint != small.fingerprint
    assert open_model("synthetic:dsv4-flash,verify=yes").fingerprint == flash.fingerprint
    assert open_model("synthetic:dsv4-flash,page_tokens=512").layout.page_tokens == 512
    nano = open_model("synthetic:dsv4-nano")
    assert Layout.from_bytes(nano.layout.to_bytes()) == nano.layout
    assert filled(SyntheticEngine(nano), some_ids(200, nano.config.vocab)).n_tokens == 200
    with pytest.raises(ModelError, match="no weights"):
        flash.open_weights()
    with pytest.raises(StateError, match="not synthetic"):
        SyntheticEngine(open_model("dsv4-nano"))


def test_tokenizer_is_reversible() -> None:
    tokenizer = open_model("synthetic:dsv4-flash").tokenizer
    ids = [*range(300), 129279, 70000, 263]
    assert tokenizer.encode(tokenizer.decode_bytes([300, 129279, 70000]).decode()) == [300, 129279, 70000]
    assert all(tokenizer.token_bytes(token) for token in ids) and tokenizer.token_bytes(129280) == b""
    for text in ("plain text", " aaaab aaaaa zürich abcdef  pppppp", "<think>no</think>", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert tokenizer.think in tokenizer.encode("<think>", special=True)
    assert tokenizer.think not in tokenizer.encode("<think>")


def test_no_mlx() -> None:
    code = (
        "import sys, kvdb_engine.synthetic; from kvdb_engine.catalog import open_model; "
        "open_model('synthetic:dsv4-flash').tokenizer; "
        "assert not any(name.split('.')[0] == 'mlx' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
