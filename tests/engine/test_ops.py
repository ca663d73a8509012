"""The two back ends compute the same things; selections break ties by the lowest index in both."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine import backend
from kvdb_engine.errors import ModelError
from kvdb_engine.ops import Ops
from kvdb_engine.ops_numpy import NumpyOps
from kvdb_engine.rounding import halve, widen
from kvdb_engine.weights import HostTensor

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["numpy", "mlx-cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param != "numpy":
        pytest.importorskip("mlx.core")
    return backend.select(request.param)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def expected_top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.array([sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in scores])


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_selection(ops: Ops, n_tokens: int, levels: int) -> None:
    scores = (RNG.integers(-levels, levels, (n_tokens, 300)) / 7).astype(np.float32)
    scores[:, 5] = -0.0
    scores[:, 9] = -1e30
    best = expected_top(scores, 40)
    assert np.array_equal(ops.host(ops.top_rows(ops.array(scores), 40)), np.sort(best, axis=1))
    assert np.array_equal(ops.host(ops.top_experts(ops.array(scores), 6)), best[:, :6])
    everything = ops.top_rows(ops.array(scores), 300)
    assert np.array_equal(ops.host(everything), np.tile(np.arange(300), (n_tokens, 1)))


def test_all_zero_scores_give_the_first_rows(ops: Ops) -> None:
    found = ops.top_rows(ops.array(np.zeros((2, 50), np.float32)), 8)
    assert np.array_equal(ops.host(found), np.tile(np.arange(8), (2, 1)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 500.0])
def test_rounding_is_equal_bit_by_bit(ops: Ops, scale: float) -> None:
    x = f32(7, 192) * np.float32(scale)
    assert ops.host(ops.round_kv(ops.array(x), 64)).tobytes() == widen(NumpyOps().round_kv(x, 64)).tobytes()
    assert ops.host(ops.round_f16(ops.array(x))).tobytes() == x.astype(np.float16).astype(np.float32).tobytes()


def test_index_rounding_differs_only_where_a_value_lies_on_a_border(ops: Ops) -> None:
    x = f32(50, 4, 128)
    ours, plain = ops.host(ops.round_index(ops.array(x))), NumpyOps().round_index(x)
    assert np.mean(ours != plain) < 1e-3


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_numbers_agree_with_float64(ops: Ops, n_tokens: int) -> None:
    x, w, v = f32(n_tokens, 64), f32(32, 64), f32(64)

    def close(ours: object, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
        assert np.abs(ops.host(ours) - wanted).max() < tolerance

    wide = x.astype(np.float64)
    close(ops.linear(ops.weight(HostTensor(w)), ops.array(x)), wide @ w.T.astype(np.float64), 1e-4)
    close(ops.norm(ops.array(x), ops.array(v), 1e-6), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * v)
    close(ops.softmax(ops.array(x), axis=-1), np.exp(wide) / np.exp(wide).sum(-1, keepdims=True))
    close(ops.router_scores(ops.array(x)), np.sqrt(np.log1p(np.exp(wide))))
    close(ops.sigmoid(ops.array(x)), 1 / (1 + np.exp(-wide)))
    m = np.abs(f32(n_tokens, 4, 4)) + 0.1
    wanted = m.astype(np.float64)
    wanted = wanted / (wanted.sum(-2, keepdims=True) + 1e-6)
    for _ in range(19):
        wanted = wanted / (wanted.sum(-1, keepdims=True) + 1e-6)
        wanted = wanted / (wanted.sum(-2, keepdims=True) + 1e-6)
    close(ops.sinkhorn(ops.array(m), 20, 1e-6), wanted)
    table = (f32(n_tokens, 8), f32(n_tokens, 8))
    heads = f32(n_tokens, 3, 24)
    turned = ops.host(ops.rotate(ops.array(heads), (ops.array(table[0]), ops.array(table[1]))))
    assert np.array_equal(turned[..., :8], heads[..., :8])
    a, b, cos, sin = heads[..., 8::2], heads[..., 9::2], table[0][:, None], table[1][:, None]
    assert np.abs(turned[..., 8::2] - (a * cos - b * sin)).max() < 1e-5
    assert np.abs(turned[..., 9::2] - (a * sin + b * cos)).max() < 1e-5


@pytest.mark.parametrize("n_tokens", [1, 2, 17])
def test_experts(ops: Ops, n_tokens: int) -> None:
    gate, up, down = f32(5, 16, 8), f32(5, 16, 8), f32(5, 8, 16)
    x, share = f32(n_tokens, 8), np.abs(f32(n_tokens, 2))
    ids = np.argsort(RNG.random((n_tokens, 4)), axis=1)[:, :2].astype(np.int32)  # expert 4 is never used
    weights = ops.expert_weights(HostTensor(gate), HostTensor(up), HostTensor(down))
    found = ops.host(ops.experts(weights, ops.array(x), ops.array(ids), ops.array(share), 1.5))
    wanted = np.zeros((n_tokens, 8))
    for t in range(n_tokens):
        for e, s in zip(ids[t], share[t], strict=True):
            g, u = np.minimum(gate[e] @ x[t], 1.5), np.clip(up[e] @ x[t], -1.5, 1.5)
            wanted[t] += down[e] @ (g / (1 + np.exp(-g)) * u * s)
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("half", [False, True])
def test_appending_keeps_older_runs_valid(ops: Ops, half: bool) -> None:
    run = ops.no_rows(3, half)
    versions = []
    wanted = np.zeros((0, 3), np.float32)
    for size in (1, 2, 70, 1, 200):
        new = f32(size, 3).astype(np.float16 if half else np.float32).astype(np.float32)
        run = ops.append(run, ops.round_f16(ops.array(new)) if half else ops.array(new))
        assert ops.row_bytes(run) >= (2 if half else 4) * 3 * run.n_rows
        wanted = np.concatenate([wanted, new])
        versions.append((run, wanted))
    early = versions[1][0]
    branch = ops.append(early, ops.array(np.full((1, 3), 7, np.float32)))
    assert np.array_equal(ops.host(ops.view(branch))[-1], [7, 7, 7])
    for held, values in versions:
        assert np.array_equal(ops.host(ops.view(held)), values)
    wide = ops.append(ops.no_rows(3, False), ops.array(np.full((2, 3), 0.1, np.float32)))
    wide = ops.append(wide, ops.round_f16(ops.array(np.ones((1, 3), np.float32))))
    assert np.array_equal(ops.host(ops.view(wide))[:, 0], np.array([0.1, 0.1, 1], np.float32))


def test_halves_are_widened_exactly(ops: Ops) -> None:
    """Every f16 there is, and back; what is no f16 stays as it is."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    codes = codes[np.isfinite(codes)].reshape(-1, 8)
    wide = ops.host(ops.widen(ops.array(codes)))
    assert wide.tobytes() == codes.astype(np.float32).tobytes()
    assert halve(wide).tobytes() == codes.tobytes()
    for odd in (0.1, 65520.0, 2.0**-25, 1e30, np.inf):
        wide[5, 3] = odd
        assert halve(wide) is wide


def test_fused_sinkhorn_equals_its_operations() -> None:
    mx = pytest.importorskip("mlx.core")
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        pytest.skip("kernels of our own need Metal or CUDA")
    gpu = backend.select("mlx")
    matrices = gpu.array(np.abs(f32(300, 4, 4)) + 0.1)
    fused, plain = gpu.sinkhorn(matrices, 20, 1e-6), gpu.sinkhorn_ops(matrices, 20, 1e-6)  # type: ignore[attr-defined]
    assert np.abs(gpu.host(fused) - gpu.host(plain)).max() < 1e-6


def test_unknown_back_end() -> None:
    with pytest.raises(ModelError, match="unknown"):
        backend.select("abacus")
