"""mHC against its definition, written out for one token."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine.hyper import HyperHeadWeights, HyperWeights, collapse_streams, join_streams, split_streams
from kvdb_engine.ops_numpy import NumpyOps

RNG = np.random.default_rng(4)
EPS = 1e-6


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("n_tokens", [1, 6])
def test_split_and_join(n: int, n_tokens: int) -> None:
    hidden = 8
    weights = HyperWeights(f32(2 * n + n * n, n * hidden), (0.7, 1.3, 0.9), f32(2 * n + n * n))
    streams, output = f32(n_tokens, n, hidden), f32(n_tokens, hidden)
    u, post, comb = split_streams(NumpyOps(), weights, streams, iterations=20, hc_eps=EPS, norm_eps=EPS)
    joined = join_streams(streams, output, post, comb)
    for t in range(n_tokens):
        X = streams[t].astype(np.float64)
        v = X.ravel() / np.sqrt(np.mean(X**2) + EPS)
        m = weights.fn @ v
        pre = sigmoid(m[:n] * 0.7 + weights.base[:n]) + EPS
        wanted_post = 2 * sigmoid(m[n : 2 * n] * 1.3 + weights.base[n : 2 * n])
        c = (m[2 * n :] * 0.9 + weights.base[2 * n :]).reshape(n, n)
        c = np.exp(c - c.max(1, keepdims=True))
        c = c / c.sum(1, keepdims=True) + EPS
        c = c / (c.sum(0, keepdims=True) + EPS)
        for _ in range(19):
            c = c / (c.sum(1, keepdims=True) + EPS)
            c = c / (c.sum(0, keepdims=True) + EPS)
        assert np.abs(u[t] - sum(pre[i] * X[i] for i in range(n))).max() < 1e-5
        assert np.abs(post[t] - wanted_post).max() < 1e-5 and np.abs(comb[t] - c).max() < 1e-5
        for d in range(n):
            wanted = wanted_post[d] * output[t] + sum(c[s][d] * X[s] for s in range(n))
            assert np.abs(joined[t, d] - wanted).max() < 1e-4


def test_collapse() -> None:
    weights = HyperHeadWeights(f32(4, 4 * 8), 1.1, f32(4))
    streams = f32(3, 4, 8)
    found = collapse_streams(NumpyOps(), weights, streams, hc_eps=EPS, norm_eps=EPS)
    for t in range(3):
        X = streams[t].astype(np.float64)
        w = sigmoid((weights.fn @ (X.ravel() / np.sqrt(np.mean(X**2) + EPS))) * 1.1 + weights.base) + EPS
        assert np.abs(found[t] - sum(w[i] * X[i] for i in range(4))).max() < 1e-5
