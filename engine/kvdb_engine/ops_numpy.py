# ruff: noqa: D102 - the methods are documented in ops.Ops
"""Ops on numpy arrays: the back end for processors.

Determinism: numpy and its BLAS choose their kernels by shape and strides. Every array here is C-contiguous or a leading
slice of one, whether it was computed, restored or forked, so equal positions give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from kvdb_engine.ops import MASKED, Array, ExpertWeights, Rows, Unfused
from kvdb_engine.packing import F32
from kvdb_engine.rounding import hadamard, round_fp4, round_kv, widen


class _Growing:
    """A buffer whose first `used` rows are taken.

    Whoever stands at the end appends in place; others copy first (append). So forks share rows, and a lone timeline
    grows at amortised constant cost.
    """

    __slots__ = ("data", "used")

    def __init__(self, data: np.ndarray[Any, Any], used: int) -> None:
        self.data = data
        self.used = used


class NumpyOps(Unfused):
    """See ops.Ops."""

    name = "numpy"

    def __init__(self) -> None:
        self._hadamards: dict[int, F32] = {}
        # One BLAS thread: results then do not depend on the number of processors, and a busy machine is no trap (idle
        # BLAS threads spin: with two processes on two processors, prefill fell to a quarter).
        threadpool_limits(limits=1, user_api="blas")

    def array(self, host: Any) -> Array:
        return np.array(host, order="C")

    def host(self, array: Array) -> F32:
        return np.asarray(widen(array), dtype=np.float32)

    def evaluate(self, arrays: Sequence[Array]) -> None:
        pass

    def weight(self, tensor: Any, exact: bool = False) -> Any:
        return np.ascontiguousarray(tensor.dense())

    def expert_weights(self, gate: Any, up: Any, down: Any) -> ExpertWeights:
        return ExpertWeights(self.weight(gate), self.weight(up), self.weight(down))

    def linear(self, weight: Any, x: Array) -> Array:
        return x @ weight.T

    def grouped_linear(self, weight: Any, x: Array) -> Array:
        return (x.swapaxes(0, 1) @ weight.swapaxes(1, 2)).swapaxes(0, 1)

    def embed(self, weight: Any, ids: Any) -> Array:
        return weight[ids]

    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        return np.concatenate(parts, axis=axis)

    def norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        mean = np.add.reduce(x * x, axis=-1, keepdims=True) / np.float32(x.shape[-1])
        out = x / np.sqrt(mean + np.float32(eps))
        if weight is not None:
            out *= weight
        return out

    def rotate(self, x: Array, table: tuple[Array, Array], inverse: bool = False) -> Array:
        cos, sin = table
        if inverse:
            sin = -sin
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        first = x.shape[-1] - 2 * cos.shape[-1]
        out = x.copy()
        even, odd = x[..., first::2], x[..., first + 1 :: 2]
        out[..., first::2] = even * cos - odd * sin
        out[..., first + 1 :: 2] = even * sin + odd * cos
        return out

    def sigmoid(self, x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    def softmax(self, x: Array, axis: int) -> Array:
        out = x - np.maximum.reduce(x, axis=axis, keepdims=True)
        np.exp(out, out=out)
        out /= np.add.reduce(out, axis=axis, keepdims=True)
        return out

    def maximum(self, x: Array, bound: float) -> Array:
        return np.maximum(x, np.float32(bound))

    def keep(self, mask: Array, x: Array) -> Array:
        np.copyto(x, np.float32(MASKED), where=~mask)
        return x

    def arange(self, start: int, stop: int) -> Array:
        return np.arange(start, stop)

    def round_kv(self, rows: Array, rope_dim: int) -> Array:
        return round_kv(rows, rope_dim)

    def round_index(self, x: Array) -> Array:
        width = x.shape[-1]
        if width not in self._hadamards:
            self._hadamards[width] = hadamard(width)
        turned = (x.reshape(-1, width) @ self._hadamards[width]) * np.float32(width**-0.5)
        return round_fp4(turned).reshape(x.shape)

    def round_f16(self, x: Array) -> Array:
        return x.astype(np.float16)

    def widen(self, x: Array) -> Array:
        return widen(x)

    def own(self, x: Array) -> Array:
        return x if x.base is None else x.copy()

    def nbytes(self, x: Array) -> int:
        return int(x.nbytes)

    def sinkhorn(self, matrices: Array, iterations: int, eps: float) -> Array:
        n_tokens, n, _ = matrices.shape
        if n_tokens == 1 and n == 4:
            values = _sinkhorn_4(matrices.ravel().tolist(), iterations, eps)
            return np.array(values, np.float32).reshape(1, 4, 4)
        # Tokens last: numpy then runs along them, and not along rows of four numbers.
        m = np.ascontiguousarray(matrices.transpose(1, 2, 0))
        bound = np.float32(eps)
        m /= np.add.reduce(m, axis=0, keepdims=True) + bound
        for _ in range(iterations - 1):
            m /= np.add.reduce(m, axis=1, keepdims=True) + bound
            m /= np.add.reduce(m, axis=0, keepdims=True) + bound
        return np.ascontiguousarray(m.transpose(2, 0, 1))

    def router_scores(self, logits: Array) -> Array:
        return np.sqrt(np.logaddexp(logits, np.float32(0)))

    def top_experts(self, scores: Array, count: int) -> Array:
        return np.argsort(-scores, axis=-1, kind="stable")[:, :count]

    def take_columns(self, x: Array, columns: Array) -> Array:
        return np.take_along_axis(x, columns, axis=-1)

    def top_rows(self, scores: Array, count: int) -> Array:
        n_rows = scores.shape[-1]
        threshold = np.partition(scores, n_rows - count, axis=-1)[:, n_rows - count, None]
        chosen = scores > threshold
        ties = scores == threshold
        room = count - np.count_nonzero(chosen, axis=-1)[:, None]
        chosen |= ties & (np.cumsum(ties, axis=-1) <= room)
        return np.nonzero(chosen)[1].reshape(len(scores), count)

    def gather(self, rows: Array, index: Array) -> Array:
        return widen(rows[index])

    def experts(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        out = np.zeros_like(x)
        if len(x) == 1:
            for expert, weight in zip(ids[0], share[0], strict=True):
                middle = self.swiglu(x @ weights.gate[expert].T, x @ weights.up[expert].T, limit)
                middle *= weight
                out += middle @ weights.down[expert].T
            return out
        for expert in np.unique(ids):
            token, slot = np.nonzero(ids == expert)
            mine = x[token]
            middle = self.swiglu(mine @ weights.gate[expert].T, mine @ weights.up[expert].T, limit)
            middle *= share[token, slot][:, None]
            out[token] += middle @ weights.down[expert].T
        return out

    def swiglu(self, gate: Array, up: Array, limit: float) -> Array:
        bound = np.float32(limit)
        gate = np.minimum(gate, bound)
        out = np.clip(up, -bound, bound)
        out *= gate
        # exp of a very negative gate overflows to inf and the quotient is 0, which is the right limit.
        with np.errstate(over="ignore"):
            out /= 1 + np.exp(-gate)
        return out

    def no_rows(self, width: int, half: bool) -> Rows:
        return Rows(_Growing(np.empty((0, width), np.float16 if half else np.float32), 0), 0)

    def append(self, rows: Rows, new: Array) -> Rows:
        grown, n_rows = rows.buffer, rows.n_rows
        wanted = n_rows + len(new)
        if grown.used != n_rows or wanted > len(grown.data):
            data = np.empty((max(64, wanted + wanted // 4), new.shape[1]), grown.data.dtype)
            data[:n_rows] = grown.data[:n_rows]
            grown = _Growing(data, n_rows)
        grown.data[n_rows:wanted] = new
        grown.used = wanted
        return Rows(grown, wanted)

    def view(self, rows: Rows) -> Array:
        return rows.buffer.data[: rows.n_rows]

    def row_bytes(self, rows: Rows) -> int:
        return int(rows.buffer.data.nbytes)


def _sinkhorn_4(m: list[float], iterations: int, eps: float) -> list[float]:
    """Sinkhorn of one 4 x 4 matrix in float64, written out: a tenth of the time of numpy calls on 16 numbers."""
    a, b, c, d, e, f, g, h, i, j, k, l, o, p, q, r = m  # noqa: E741
    for turn in range(iterations):
        if turn:
            s, t, u, v = a + b + c + d + eps, e + f + g + h + eps, i + j + k + l + eps, o + p + q + r + eps
            a, b, c, d, e, f, g, h = a / s, b / s, c / s, d / s, e / t, f / t, g / t, h / t
            i, j, k, l, o, p, q, r = i / u, j / u, k / u, l / u, o / v, p / v, q / v, r / v  # noqa: E741
        s, t, u, v = a + e + i + o + eps, b + f + j + p + eps, c + g + k + q + eps, d + h + l + r + eps
        a, b, c, d, e, f, g, h = a / s, b / t, c / u, d / v, e / s, f / t, g / u, h / v
        i, j, k, l, o, p, q, r = i / s, j / t, k / u, l / v, o / s, p / t, q / u, r / v  # noqa: E741
    return [a, b, c, d, e, f, g, h, i, j, k, l, o, p, q, r]
