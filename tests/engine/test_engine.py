"""Chunk borders, statistics, and which back end computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvdb_engine import backend
from kvdb_engine.attention import BLOCK
from kvdb_engine.engine import Engine
from kvdb_engine.state import State


def test_chunks_end_at_absolute_multiples(nano: Engine, stream: np.ndarray) -> None:
    state = nano.new_state()
    assert [state.n_tokens for _ in nano.prefill(state, stream[:700])] == [256, 512, 700]
    assert [state.n_tokens for _ in nano.prefill(state, stream[700:1100])] == [768, 1024, 1100]
    assert list(nano.prefill(state, stream[:300])) == [180, 300]
    assert nano.prefill_chunk % BLOCK == 0


def test_stats_count(nano: Engine, stream: np.ndarray) -> None:
    before = nano.stats()
    state = nano.new_state()
    for _ in nano.prefill(state, stream[:10]):
        pass
    nano.step(state, 7)
    after = nano.stats()
    assert after["backend"] == "numpy"
    assert before["matmul_gflops"] == after["matmul_gflops"] > 0  # type: ignore[operator]
    assert after["prefill_tokens"] == before["prefill_tokens"] + 10  # type: ignore[operator]
    assert after["decode_tokens"] == before["decode_tokens"] + 1  # type: ignore[operator]
    assert after["decode_seconds"] > before["decode_seconds"]  # type: ignore[operator]


def test_a_state_is_unchanged_when_a_step_fails(
    nano: Engine,
    stream: np.ndarray,
    prefilled: Callable[[Engine, np.ndarray], State],
    fingerprint_of: Callable[[Engine, State], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = prefilled(nano, stream[:131])
    before = fingerprint_of(nano, state)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(nano.ops, "softmax", fail)
        with pytest.raises(MemoryError):
            nano.step(state, 7)
        with pytest.raises(MemoryError):
            next(nano.prefill(state, stream[:50]))
    assert fingerprint_of(nano, state) == before
    nano.step(state, 7)
    other = prefilled(nano, stream[:131])
    nano.step(other, 7)
    assert fingerprint_of(nano, state) == fingerprint_of(nano, other)


def test_decode_at_length_costs_little_more(nano: Engine, stream: np.ndarray) -> None:
    """The work of a step beyond the first top-k rows is one product with the index rows: far from linear."""
    import time

    def cost(state: State) -> float:
        nano.step(state, 7)
        times = []
        for token in stream[:25]:
            started = time.process_time()
            nano.step(state, int(token))
            times.append(time.process_time() - started)
        return float(np.median(times))

    short, long = nano.new_state(), nano.new_state()
    for _ in nano.prefill(short, stream[:130]):
        pass
    for _ in nano.prefill(long, stream[:3000]):
        pass
    assert cost(long.clone()) < 2.5 * cost(short.clone())


def test_back_end_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVDB_BACKEND", "numpy")
    assert backend.select() is backend.select("numpy") is backend.select("auto")
    assert backend.select().name == "numpy"
