"""Compressor: turns each group of `ratio` tokens into one row, and keeps the unfinished group (the frontier).

Ratio 128: the group's projections are pooled per column by a softmax over their scores. Ratio 4: groups overlap; a row
pools eight entries, the first half of the previous group's projections and the second half of this group's.

The frontier holds exactly the occupied rows: the open group (n_tokens mod ratio) and, for ratio 4, the previous group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvdb_engine.ops import MASKED, Array, Ops, Rows


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """kv, gate: (c * width, hidden) linear weights, c = 2 for ratio 4; ape: (ratio, c * width); norm: (width,)."""

    kv: object
    gate: object
    ape: Array
    norm: Array


@dataclass(frozen=True, slots=True)
class CompressorState:
    """rows: finished rows. open_*: (n_tokens mod ratio, c * width). previous_*: (4, c * width) or None."""

    rows: Rows
    open_kv: Array
    open_score: Array
    previous_kv: Array | None = None
    previous_score: Array | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """ratio, row width, and the norm's epsilon of one compressor."""

    ratio: int
    width: int
    norm_eps: float

    @property
    def columns(self) -> int:
        """Width of the projections."""
        return self.width * (2 if self.ratio == 4 else 1)


def compress(
    ops: Ops,
    weights: CompressorWeights,
    geometry: Geometry,
    state: CompressorState,
    x: Array,
    position: int,
    finish: Callable[[Array, int], Array],
    projected: tuple[Array, Array] | None = None,
) -> CompressorState:
    """Take in T tokens; append the rows they complete.

    x: (T, hidden). projected: weights.kv and weights.gate times x, if known; of x then only the length counts.
    position: of x[0]. finish(rows, first): RoPE and rounding of normalised rows, where row i covers the tokens from
    first + i * ratio on.
    """
    ratio, n_tokens = geometry.ratio, x.shape[0]
    slot = position % ratio
    new_kv, gate = projected or (ops.linear(weights.kv, x), ops.linear(weights.gate, x))
    taken = ops.fused_frontier(state.open_kv, state.open_score, new_kv, gate, weights.ape, slot)
    if taken is None:
        kv = ops.concatenate([state.open_kv, new_kv], axis=0)
        score = ops.concatenate([state.open_score, gate + _bias(ops, weights.ape, slot, n_tokens)], axis=0)
    else:
        kv, score = taken
    n_new = (slot + n_tokens) // ratio
    if not n_new:
        return CompressorState(state.rows, kv, score, state.previous_kv, state.previous_score)
    closed = n_new * ratio
    group_kv = kv[:closed].reshape(n_new, ratio, geometry.columns)
    group_score = score[:closed].reshape(n_new, ratio, geometry.columns)
    previous_kv = previous_score = None
    if ratio == 4:
        previous_kv, previous_score = group_kv[-1], group_score[-1]
    pooled = None
    if n_new == 1:
        before = None if state.previous_kv is None else (state.previous_kv, state.previous_score)
        pooled = ops.fused_pool(before, kv[:closed], score[:closed], geometry.width, ratio)
    if pooled is None:
        entries_kv, entries_score = group_kv, group_score
        if ratio == 4:
            entries_kv = _overlap(ops, state.previous_kv, group_kv, geometry.width, 0.0)
            entries_score = _overlap(ops, state.previous_score, group_score, geometry.width, MASKED)
        pooled = (ops.softmax(entries_score, axis=1) * entries_kv).sum(1)
    rows = finish(ops.norm(pooled, weights.norm, geometry.norm_eps), position - slot)
    frontier = [kv[closed:], score[closed:], previous_kv, previous_score]
    if n_tokens > 1:
        frontier = [None if part is None else ops.own(part) for part in frontier]
    return CompressorState(ops.append(state.rows, rows), *frontier)


def _bias(ops: Ops, ape: Array, slot: int, n_tokens: int) -> Array:
    """Rows slot, slot + 1, ... of the positional bias, cyclic."""
    if n_tokens == 1:
        return ape[slot : slot + 1]
    repeats = (slot + n_tokens - 1) // len(ape) + 1
    return ops.concatenate([ape] * repeats, axis=0)[slot : slot + n_tokens]


def _overlap(ops: Ops, previous: Array | None, groups: Array, width: int, empty: float) -> Array:
    """(n, 4, 2 * width) -> (n, 8, width): the previous group's first half, then this group's second half.

    empty: stands for the group before the first one.
    """
    first = groups[:1] * 0 + empty if previous is None else previous[None]
    before = ops.concatenate([first, groups[:-1]], axis=0)
    return ops.concatenate([before[:, :, :width], groups[:, :, width:]], axis=1)
