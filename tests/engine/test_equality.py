"""A state that was stored, restored or forked continues bit by bit like one that was not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvdb_engine.engine import Engine
from kvdb_engine.state import State
from tests.engine.conftest import BACKEND

Runs = Callable[[Engine, np.ndarray], State]
RoundTrip = Callable[[Engine, State], State]
Hash = Callable[[Engine, State], bytes]

BORDERS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    63,
    64,
    127,
    128,
    129,
    255,
    256,
    257,
    259,
    260,
    383,
    384,
    511,
    512,
    513,
    640,
    1023,
    1025,
)


def continue_both(engine: Engine, a: State, b: State, steps: np.ndarray, chunk: np.ndarray, hashed: Hash) -> None:
    """Decode some tokens on both, then extend both by a chunk; logits and all rows must be equal after each."""
    assert a.logits.tobytes() == b.logits.tobytes()
    for token in steps:
        engine.step(a, int(token))
        engine.step(b, int(token))
        assert a.logits.tobytes() == b.logits.tobytes(), f"decode at {a.n_tokens}"
    for _ in zip(engine.prefill(a, chunk), engine.prefill(b, chunk), strict=True):
        assert a.logits.tobytes() == b.logits.tobytes(), f"prefill up to {a.n_tokens}"
    assert hashed(engine, a) == hashed(engine, b)


@pytest.mark.parametrize("n_tokens", BORDERS)
def test_restored_equals_live(
    nano: Engine, stream: np.ndarray, n_tokens: int, prefilled: Runs, round_trip: RoundTrip, fingerprint_of: Hash
) -> None:
    live = prefilled(nano, stream[:n_tokens])
    restored = round_trip(nano, live)
    assert restored.n_tokens == n_tokens and np.array_equal(restored.ids, live.ids)
    assert fingerprint_of(nano, live) == fingerprint_of(nano, restored)
    follow = stream[n_tokens : n_tokens + 150]
    continue_both(nano, live, restored, follow[:6], follow[6:], fingerprint_of)


def test_restored_equals_live_across_decode(
    nano: Engine, stream: np.ndarray, prefilled: Runs, round_trip: RoundTrip, fingerprint_of: Hash
) -> None:
    """Snapshots after each of many decode steps, over group borders of both ratios."""
    live = prefilled(nano, stream[:250])
    for token in stream[250:262]:
        nano.step(live, int(token))
        restored = round_trip(nano, live)
        branch = live.clone()
        continue_both(nano, branch, restored, stream[300:303], stream[400:410], fingerprint_of)


def test_fork_equals_origin(nano: Engine, stream: np.ndarray, prefilled: Runs, fingerprint_of: Hash) -> None:
    origin = prefilled(nano, stream[:530])
    before = fingerprint_of(nano, origin)
    forks = [origin.clone() for _ in range(3)]
    for number, fork in enumerate(forks):
        for token in stream[1000 * number : 1000 * number + 9]:
            nano.step(fork, int(token))
        for _ in nano.prefill(fork, stream[2000 : 2000 + 77 * number]):
            pass
    assert fingerprint_of(nano, origin) == before, "a fork disturbed its origin"
    alone = prefilled(nano, stream[:530])
    continue_both(nano, origin, alone, stream[530:536], stream[536:700], fingerprint_of)
    # The third fork, computed again without siblings.
    again = prefilled(nano, stream[:530])
    for token in stream[2000:2009]:
        nano.step(again, int(token))
    for _ in nano.prefill(again, stream[2000:2154]):
        pass
    assert fingerprint_of(nano, again) == fingerprint_of(nano, forks[2])


def test_interleaved_forks_do_not_see_each_other(
    nano: Engine, stream: np.ndarray, prefilled: Runs, fingerprint_of: Hash
) -> None:
    a = prefilled(nano, stream[:129])
    b = a.clone()
    for left, right in zip(stream[129:150], stream[529:550], strict=True):
        nano.step(a, int(left))
        nano.step(b, int(right))
    alone = prefilled(nano, stream[:129])
    for token in stream[129:150]:
        nano.step(alone, int(token))
    assert fingerprint_of(nano, alone) == fingerprint_of(nano, a)
    assert a.ids.tolist() == stream[:150].tolist() and b.ids.tolist()[129:] == stream[529:550].tolist()


def test_closing_a_prefill_leaves_a_valid_state(
    nano: Engine, stream: np.ndarray, prefilled: Runs, fingerprint_of: Hash
) -> None:
    state = nano.new_state()
    work = nano.prefill(state, stream[:1000])
    assert next(work) == nano.prefill_chunk
    work.close()
    assert state.n_tokens == nano.prefill_chunk
    for _ in nano.prefill(state, stream[nano.prefill_chunk : 700]):
        pass
    assert fingerprint_of(nano, state) == fingerprint_of(nano, prefilled(nano, stream[:700]))


@pytest.mark.parametrize("n_prefix", [256, 1024])
def test_a_prefill_over_a_stored_prefix_on_a_chunk_border_gives_the_same_bits(
    nano: Engine, stream: np.ndarray, n_prefix: int, prefilled: Runs, round_trip: RoundTrip, fingerprint_of: Hash
) -> None:
    """Chunk borders are absolute: what follows such a prefix runs in the shapes of a prefill without it."""
    state = round_trip(nano, prefilled(nano, stream[:n_prefix]))
    for _ in nano.prefill(state, stream[n_prefix:1300]):
        pass
    assert fingerprint_of(nano, state) == fingerprint_of(nano, prefilled(nano, stream[:1300]))


@pytest.mark.parametrize("n_prefix", [1, 300, 1023])
def test_a_prefill_over_any_other_prefix_differs_by_noise(
    nano: Engine, stream: np.ndarray, n_prefix: int, prefilled: Runs
) -> None:
    """One chunk is cut in two, so its sums are taken in other shapes; the bound is that of any other chunking."""
    state = prefilled(nano, stream[:n_prefix])
    for _ in nano.prefill(state, stream[n_prefix:1300]):
        pass
    fresh = prefilled(nano, stream[:1300])
    gap = np.abs(state.logits - fresh.logits)
    assert np.median(gap) < 0.05 and np.corrcoef(state.logits, fresh.logits)[0, 1] > 0.999


def test_long_restore_beyond_the_index_top_k(
    nano: Engine, stream: np.ndarray, prefilled: Runs, round_trip: RoundTrip, fingerprint_of: Hash
) -> None:
    live = prefilled(nano, stream[:1501])
    continue_both(nano, live, round_trip(nano, live), stream[1501:1509], stream[1509:1800], fingerprint_of)


def test_prefill_and_decode_agree_within_noise(nano: Engine, stream: np.ndarray, prefilled: Runs) -> None:
    """Other shapes round otherwise: equal up to float32 noise and the rare rounding decision it flips."""
    at_once = prefilled(nano, stream[:200])
    one_by_one = nano.new_state()
    for token in stream[:200]:
        nano.step(one_by_one, int(token))
    gap = np.abs(at_once.logits - one_by_one.logits)
    assert np.median(gap) < 0.05 and np.corrcoef(at_once.logits, one_by_one.logits)[0, 1] > 0.999


def test_states_are_equal_in_a_second_engine(
    nano: Engine, stream: np.ndarray, prefilled: Runs, fingerprint_of: Hash
) -> None:
    other = Engine(nano.info, backend_name=BACKEND, prefill_chunk=nano.prefill_chunk)
    assert fingerprint_of(nano, prefilled(nano, stream[:300])) == fingerprint_of(other, prefilled(other, stream[:300]))
