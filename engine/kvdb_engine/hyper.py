"""mHC: the residual state is `hc_streams` parallel streams, mixed before and after every sub-layer.

Before: the sub-layer's input is a weighted sum of the streams. After: its output is added to each stream with a weight
of its own, and the streams are mixed by a nearly doubly stochastic matrix (Sinkhorn). All weights depend on the token.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvdb_engine.ops import Array, Ops


@dataclass(frozen=True, slots=True)
class HyperWeights:
    """fn: (2n + n*n, n * hidden) as a linear weight; scale: 3 numbers; base: (2n + n*n,)."""

    fn: object
    scale: tuple[float, ...]
    base: Array


@dataclass(frozen=True, slots=True)
class HyperHeadWeights:
    """fn: (n, n * hidden); scale: one number; base: (n,)."""

    fn: object
    scale: float
    base: Array


def _mixes(ops: Ops, fn: object, streams: Array, eps: float) -> Array:
    """fn applied to the normalised, flattened streams. streams: (T, n, hidden). Returns (T, outputs)."""
    flat = streams.reshape(streams.shape[0], -1)
    return ops.linear(fn, ops.norm(flat, None, eps))


def split_streams(
    ops: Ops, weights: HyperWeights, streams: Array, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Array, Array, Array]:
    """Read the streams for one sub-layer.

    streams: (T, n, hidden). Returns the sub-layer's input (T, hidden), post (T, n) and comb (T, n, n) for join_streams.
    """
    n_tokens, n, _ = streams.shape
    mixes = _mixes(ops, weights.fn, streams, norm_eps)
    scale, base = weights.scale, weights.base
    pre = ops.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * ops.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(n_tokens, n, n)
    comb = ops.sinkhorn(ops.softmax(comb, axis=-1) + hc_eps, iterations, hc_eps)
    return (pre[:, None, :] @ streams)[:, 0], post, comb


def join_streams(streams: Array, output: Array, post: Array, comb: Array) -> Array:
    """Write a sub-layer's output back: stream k becomes post[k] * output + sum over j of comb[j, k] * stream j."""
    return post[:, :, None] * output[:, None, :] + comb.swapaxes(1, 2) @ streams


def collapse_streams(ops: Ops, weights: HyperHeadWeights, streams: Array, *, hc_eps: float, norm_eps: float) -> Array:
    """The model's output vector: (T, n, hidden) -> (T, hidden)."""
    mixes = _mixes(ops, weights.fn, streams, norm_eps)
    pre = ops.sigmoid(mixes * weights.scale + weights.base) + hc_eps
    return (pre[:, None, :] @ streams)[:, 0]
