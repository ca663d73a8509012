"""Which rows the indexer picks: the best, the lowest of equals, never one that is not visible while others are left."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine.indexer import IndexQueries, pick_rows
from kvdb_engine.ops_numpy import NumpyOps

OPS = NumpyOps()
RNG = np.random.default_rng(6)


def scores(asked: IndexQueries, rows: np.ndarray) -> np.ndarray:
    """(T, n_rows) in float64, head by head."""
    found = np.zeros((len(asked.queries), len(rows)))
    for head in range(asked.queries.shape[1]):
        dots = asked.queries[:, head].astype(np.float64) @ rows.T.astype(np.float64)
        found += asked.share[:, head, None] * np.maximum(dots, 0)
    return found


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_best_rows(heads: int) -> None:
    # Whole numbers: every sum is exact, and with few heads many scores are exactly zero.
    queries = RNG.integers(-3, 4, (20, heads, 8)).astype(np.float32)
    share = RNG.integers(-2, 3, (20, heads)).astype(np.float32)
    rows = RNG.integers(-3, 4, (90, 8)).astype(np.float32)
    visible = RNG.integers(1, 91, (20, 1))
    asked = IndexQueries(queries, share)
    picked = pick_rows(OPS, asked, rows, visible, 12)
    for t, row in enumerate(scores(asked, rows)):
        n = int(visible[t, 0])
        wanted = sorted(sorted(range(n), key=lambda i: (-row[i], i))[:12])
        mine = [int(i) for i in picked[t] if i < n]
        assert mine == wanted and len(set(picked[t].tolist())) == 12


def test_prefill_and_decode_pick_alike() -> None:
    queries = RNG.integers(-3, 4, (9, 2, 8)).astype(np.float32)
    share = RNG.integers(-2, 3, (9, 2)).astype(np.float32)
    rows = RNG.integers(-3, 4, (60, 8)).astype(np.float32)
    visible = np.arange(30, 39)[:, None]
    together = pick_rows(OPS, IndexQueries(queries, share), rows, visible, 10)
    for t in range(9):
        one = IndexQueries(queries[t : t + 1], share[t : t + 1])
        assert np.array_equal(pick_rows(OPS, one, rows[: visible[t, 0]], None, 10)[0], together[t])
