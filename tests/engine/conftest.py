"""Engines and states that several test modules share. Loading is quick, but once a session is enough."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.engine import Engine
from kvdb_engine.fidelity import Vectors
from kvdb_engine.state import State
from kvdb_protocol.ids import NO_PAGE, content_id
from kvdb_protocol.page import Page, decode_page, encode_page
from kvdb_protocol.tail import Tail, decode_tail, encode_tail, tail_header

# The same tests on another back end: KVDB_TEST_BACKEND=mlx on a machine with a GPU (tests/gpu/show.py).
BACKEND = os.environ.get("KVDB_TEST_BACKEND", "numpy")
VECTORS = Path(__file__).parent.parent / "vectors" / "ds4"


@pytest.fixture(scope="session")
def vectors() -> Vectors:
    return Vectors(VECTORS)


@pytest.fixture(scope="session")
def nano_info() -> ModelInfo:
    return open_model("dsv4-nano")


@pytest.fixture(scope="session")
def nano(nano_info: ModelInfo) -> Engine:
    return Engine(nano_info, backend_name=BACKEND, prefill_chunk=256)


@pytest.fixture(scope="session")
def tiny(vectors: Vectors) -> Engine:
    return vectors.engine(BACKEND, prefill_chunk=128)


@pytest.fixture(scope="session")
def stream() -> np.ndarray:
    """Token ids for nano: random, but the same in every run."""
    return np.random.default_rng(20).integers(7, 2560, 40_000).astype(np.uint32)


def records(engine: Engine, state: State) -> tuple[list[bytes], bytes]:
    """The payload bytes of a state's pages and tail, as the worker would write them."""
    info, layout = engine.info, state.layout
    ids = state.ids.astype("<u4")
    parent, pages = NO_PAGE, []
    n_pages = layout.n_pages(state.n_tokens)
    for number in range(n_pages):
        span = ids[number * layout.page_tokens : (number + 1) * layout.page_tokens]
        page = Page(
            info.fingerprint,
            parent,
            number * layout.page_tokens,
            span.tobytes(),
            b"",
            engine.page_sections(state, number),
        )
        payload = b"".join(bytes(piece) for piece in encode_page(page))
        parent = content_id([payload])
        pages.append(payload)
    first = n_pages * layout.page_tokens
    tail = Tail(
        tail_header(layout, state.n_tokens),
        info.fingerprint,
        parent,
        first,
        ids[first:].tobytes(),
        b"",
        engine.logits(state),
        engine.tail_sections(state),
    )
    return pages, b"".join(bytes(piece) for piece in encode_tail(tail))


def restore(engine: Engine, pages: list[bytes], tail: bytes) -> State:
    """A live state from payload bytes. They are read at an odd address, as they may lie in a file's buffer."""

    def shifted(payload: bytes) -> memoryview:
        return memoryview(b"x" + payload)[1:]

    layout = engine.info.layout
    return engine.load([decode_page(layout, shifted(p)) for p in pages], decode_tail(layout, shifted(tail)))


@pytest.fixture(scope="session")
def round_trip() -> Callable[[Engine, State], State]:
    """A state written to records and read back."""
    return lambda engine, state: restore(engine, *records(engine, state))


@pytest.fixture(scope="session")
def fingerprint_of() -> Callable[[Engine, State], bytes]:
    """A hash of everything a state holds."""
    return lambda engine, state: content_id([*(pages := records(engine, state))[0], pages[1]])


@pytest.fixture(scope="session")
def prefilled() -> Callable[[Engine, np.ndarray], State]:
    """A new state of these tokens."""

    def run(engine: Engine, ids: np.ndarray) -> State:
        state = engine.new_state()
        for _ in engine.prefill(state, ids):
            pass
        return state

    return run
