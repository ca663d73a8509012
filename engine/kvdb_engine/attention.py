"""Attention of one layer: window rows, compressed rows, a learned sink, and a grouped output projection.

One shared row per token is key and value of all heads, so scores are one matrix product of (tokens * heads, head_dim)
with the rows. Queries are taken in blocks of BLOCK tokens: each block sees only the window rows around it (banded) and
either all compressed rows or the ones its indexer picked, so the cost of a chunk does not grow with the square of its
length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kvdb_engine.compressor import CompressorState, CompressorWeights, Geometry, compress
from kvdb_engine.config import ModelConfig
from kvdb_engine.indexer import IndexerWeights, IndexQueries, index_queries, pick_rows
from kvdb_engine.ops import Array, Ops
from kvdb_engine.rope import Rope

BLOCK = 64


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Linear weights as in the official names wq_a, wq_b, wkv, wo_a (G, o_rank, in), wo_b; norms and sinks are
    vectors."""

    q_a: object
    q_norm: Array
    q_b: object
    kv: object
    kv_norm: Array
    sinks: Array
    o_a: object
    o_b: object
    compressor: CompressorWeights | None = None
    indexer: IndexerWeights | None = None


@dataclass(frozen=True, slots=True)
class LayerState:
    """The live state of one layer. window: (min(n_tokens, window), head_dim), oldest row first."""

    window: Array
    compressed: CompressorState | None = None
    index: CompressorState | None = None


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a chunk stands: its first position, the layer kind's RoPE, and cos and sin of its tokens."""

    first: int
    rope: Rope
    table: tuple[Array, Array]


def attend(
    ops: Ops, config: ModelConfig, weights: AttentionWeights, ratio: int, state: LayerState, x: Array, at: Positions
) -> tuple[Array, LayerState]:
    """One layer's attention over T new tokens. x: (T, hidden), normalised. Returns (T, hidden) and the new state."""
    n_tokens = x.shape[0]
    latent = ops.norm(ops.linear(weights.q_a, x), weights.q_norm, config.norm_eps)
    queries = ops.linear(weights.q_b, latent).reshape(n_tokens, config.n_heads, config.head_dim)
    queries = ops.rotate(ops.norm(queries, None, config.norm_eps), at.table) * config.head_dim**-0.5
    raw = ops.rotate(ops.norm(ops.linear(weights.kv, x), weights.kv_norm, config.norm_eps), at.table)
    if config.kv_rounding:
        raw = ops.round_kv(raw, config.rope_dim)
    keys = ops.concatenate([state.window, raw], axis=0)

    compressed, index, asked, rows, index_rows = state.compressed, state.index, None, None, None
    if ratio:
        compressed, index = _take_in(ops, config, weights, ratio, state, x, at)
        rows = ops.view(compressed.rows)
        if index is not None and rows.shape[0] > config.index_topk:
            asked = index_queries(
                ops,
                _present(weights.indexer),
                x,
                latent,
                at.table,
                heads=config.index_heads,
                dim=config.index_dim,
                rounded=config.kv_rounding,
            )
            index_rows = ops.view(index.rows)

    outputs = []
    for start in range(0, n_tokens, BLOCK):
        stop = min(start + BLOCK, n_tokens)
        block = _Block(at.first, start, stop, keys.shape[0] - n_tokens)
        outputs.append(_attend_block(ops, config, weights.sinks, ratio, block, queries, keys, rows, asked, index_rows))
    mixed = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=0)
    mixed = ops.rotate(mixed, at.table, inverse=True).reshape(n_tokens, config.o_groups, -1)
    low = ops.grouped_linear(weights.o_a, mixed).reshape(n_tokens, -1)
    return ops.linear(weights.o_b, low), LayerState(keys[-config.window :], compressed, index)


@dataclass(frozen=True, slots=True)
class _Block:
    """Tokens start..stop of a chunk whose first token is at `first`; `older` window rows come before the chunk's
    own."""

    first: int
    start: int
    stop: int
    older: int


def _attend_block(
    ops: Ops,
    config: ModelConfig,
    sinks: Array,
    ratio: int,
    block: _Block,
    queries: Array,
    keys: Array,
    rows: Array | None,
    asked: IndexQueries | None,
    index_rows: Array | None,
) -> Array:
    """(stop - start, heads, head_dim): softmax over window rows, compressed rows and sink, times the rows."""
    n, heads, dim = block.stop - block.start, config.n_heads, config.head_dim
    q = queries[block.start : block.stop]
    flat = q.reshape(n * heads, dim)
    low, high = max(0, block.older + block.start - config.window + 1), block.older + block.stop
    near = keys[low:high]
    scores = (flat @ near.swapaxes(0, 1)).reshape(n, heads, high - low)
    if n > 1:
        key = ops.arange(low, high)[None]
        own = ops.arange(block.older + block.start, block.older + block.stop)[:, None]
        scores = ops.keep(((key <= own) & (key > own - config.window))[:, None], scores)
    parts = [scores]

    n_rows = (block.first + block.stop) // ratio if ratio else 0
    far = None
    gathered = False
    if n_rows and rows is not None:
        visible = None if n == 1 else _visible(ops, ratio, block)
        gathered = asked is not None and n_rows > config.index_topk
        if gathered and asked is not None and index_rows is not None:
            mine = IndexQueries(asked.queries[block.start : block.stop], asked.share[block.start : block.stop])
            picked = pick_rows(ops, mine, index_rows[:n_rows], visible, config.index_topk)
            far = ops.gather(rows, picked)
            scores = q @ far.swapaxes(1, 2)
            if visible is not None:
                scores = ops.keep((picked < visible)[:, None], scores)
        else:
            far = rows[:n_rows]
            scores = (flat @ far.swapaxes(0, 1)).reshape(n, heads, n_rows)
            if visible is not None:
                scores = ops.keep((ops.arange(0, n_rows)[None] < visible)[:, None], scores)
        parts.append(scores)
    parts.append(sinks[None, :, None] + scores[:, :, :1] * 0)
    shares = ops.softmax(ops.concatenate(parts, axis=-1), axis=-1)
    out = (shares[:, :, : high - low].reshape(n * heads, high - low) @ near).reshape(n, heads, dim)
    if far is not None:
        far_shares = shares[:, :, high - low : -1]
        out = out + (far_shares @ far if gathered else (far_shares.reshape(n * heads, -1) @ far).reshape(n, heads, dim))
    return out


def _visible(ops: Ops, ratio: int, block: _Block) -> Array:
    """(n, 1): finished compressed rows at each token of a block, the one it finishes itself included."""
    return (ops.arange(block.first + block.start + 1, block.first + block.stop + 1) // ratio)[:, None]


def _take_in(
    ops: Ops, config: ModelConfig, weights: AttentionWeights, ratio: int, state: LayerState, x: Array, at: Positions
) -> tuple[CompressorState, CompressorState | None]:
    """Update the compressors with T tokens before anyone attends: a token sees the row that it finishes."""
    import numpy as np

    def turn(rows: Array, first: int) -> Array:
        positions = first + ratio * np.arange(rows.shape[0], dtype=np.int64)
        cos, sin = at.rope.table(positions)
        return ops.rotate(rows, (ops.array(cos), ops.array(sin)))

    def finish_kv(rows: Array, first: int) -> Array:
        rows = turn(rows, first)
        return ops.round_kv(rows, config.rope_dim) if config.kv_rounding else rows

    def finish_index(rows: Array, first: int) -> Array:
        rows = turn(rows, first)
        return ops.round_f16(ops.round_index(rows)) if config.kv_rounding else rows

    geometry = Geometry(ratio, config.head_dim, config.norm_eps)
    compressed = compress(
        ops, _present(weights.compressor), geometry, _present(state.compressed), x, at.first, finish_kv
    )
    if state.index is None:
        return compressed, None
    geometry = Geometry(ratio, config.index_dim, config.norm_eps)
    indexer = _present(weights.indexer)
    return compressed, compress(ops, indexer.compressor, geometry, state.index, x, at.first, finish_index)


_T = TypeVar("_T")


def _present(value: _T | None) -> _T:
    """A part that every layer of this ratio has; build_model and new states guarantee it."""
    assert value is not None
    return value
