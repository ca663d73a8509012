"""The compressor against its definition, written out token by token."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine.compressor import CompressorState, CompressorWeights, Geometry, compress
from kvdb_engine.ops_numpy import NumpyOps

WIDTH, HIDDEN = 6, 5
OPS = NumpyOps()
RNG = np.random.default_rng(2)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def plain(w: CompressorWeights, ratio: int, x: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(position of the first token, normalised row) of every finished group, in float64."""
    kv = x.astype(np.float64) @ w.kv.T
    score = x.astype(np.float64) @ w.gate.T + np.tile(w.ape, (len(x) // ratio + 1, 1))[: len(x)]
    rows = []
    for group in range(len(x) // ratio):
        own = slice(group * ratio, (group + 1) * ratio)
        row = np.empty(WIDTH)
        for column in range(WIDTH):
            if ratio == 4:
                entries = [(score[t, WIDTH + column], kv[t, WIDTH + column]) for t in range(own.start, own.stop)]
                if group:
                    entries += [(score[t, column], kv[t, column]) for t in range(own.start - 4, own.start)]
            else:
                entries = [(score[t, column], kv[t, column]) for t in range(own.start, own.stop)]
            shares = np.exp([s for s, _ in entries])
            row[column] = np.dot(shares / shares.sum(), [v for _, v in entries])
        rows.append((own.start, row / np.sqrt(np.mean(row**2) + 1e-6) * w.norm))
    return rows


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("cuts", [(302,), (1,) * 302, (3, 1, 4, 120, 5, 169), (127, 1, 1, 173)])
def test_any_chunking_gives_the_rows_of_the_definition(ratio: int, cuts: tuple[int, ...]) -> None:
    columns = WIDTH * (2 if ratio == 4 else 1)
    w = CompressorWeights(f32(columns, HIDDEN), f32(columns, HIDDEN), f32(ratio, columns), f32(WIDTH))
    x = f32(302, HIDDEN)
    nothing = np.zeros((0, columns), np.float32)
    state = CompressorState(OPS.no_rows(WIDTH, False), nothing, nothing)
    firsts: list[int] = []

    def finish(rows: np.ndarray, first: int) -> np.ndarray:
        firsts.extend(range(first, first + ratio * len(rows), ratio))
        return rows

    at = 0
    for size in cuts:
        state = compress(OPS, w, Geometry(ratio, WIDTH, 1e-6), state, x[at : at + size], at, finish)
        at += size
        assert state.open_kv.shape == state.open_score.shape == (at % ratio, columns)
        assert (state.previous_kv is not None) == (ratio == 4 and at >= 4)
    wanted = plain(w, ratio, x)
    assert firsts == [first for first, _ in wanted]
    assert np.abs(OPS.view(state.rows) - np.stack([row for _, row in wanted])).max() < 1e-4
    assert np.abs(state.open_kv - x[302 - 302 % ratio :] @ w.kv.T).max() < 1e-5
