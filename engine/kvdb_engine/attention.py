"""Attention of one layer: window rows, compressed rows, a learned sink, and a grouped output projection.

One shared row per token is key and value of all heads, so scores are one matrix product of (tokens * heads, head_dim)
with the rows. Queries are taken in blocks of ops.attention_block tokens: each block sees only the window rows around it
(banded) and either all compressed rows or the ones its indexer picked, so the cost of a chunk does not grow with the
square of its length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from kvdb_engine.compressor import CompressorState, CompressorWeights, Geometry, compress
from kvdb_engine.config import ModelConfig
from kvdb_engine.indexer import IndexerWeights, IndexQueries, index_queries, pick_rows
from kvdb_engine.ops import BLOCK as BLOCK
from kvdb_engine.ops import Array, Ops, linears
from kvdb_engine.rope import Rope


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
    """The live state of one layer. window: (min(n_tokens, window), head_dim), oldest row first; f16 if rounded."""

    window: Array
    compressed: CompressorState | None = None
    index: CompressorState | None = None


@dataclass(frozen=True, slots=True)
class Positions:
    """Where a chunk stands: its first position, the layer kind's RoPE, and cos and sin of its tokens.

    row_tables: the same for compressed rows, by (ratio, first, count), filled as layers ask.
    """

    first: int
    rope: Rope
    table: tuple[Array, Array]
    row_tables: dict[tuple[int, int, int], tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Projected:
    """What attention needs of a chunk's T tokens; every shape follows from T and the weights.

    queries: (T, heads, head_dim), turned and scaled. kv: (T, head_dim), plain. columns: the compressor's kv and gate
    projections, then the indexer's. asked: what the indexer is asked, if it is.
    """

    queries: Array
    kv: Array
    columns: tuple[Array, ...] = ()
    asked: IndexQueries | None = None


def attend(
    ops: Ops, config: ModelConfig, weights: AttentionWeights, ratio: int, state: LayerState, x: Array, at: Positions
) -> tuple[Array, LayerState]:
    """One layer's attention over T new tokens. x: (T, hidden), normalised. Returns (T, hidden) and the new state."""
    projected = project(ops, config, weights, ratio, x, at.table, asks(config, ratio, at.first + x.shape[0]))
    mixed, after = mix(ops, config, weights, ratio, state, projected, at)
    return give(ops, config, weights, mixed), after


def asks(config: ModelConfig, ratio: int, n_tokens: int) -> bool:
    """Whether a layer's indexer has to choose: once there are more rows than it may pick."""
    return ratio == 4 and n_tokens // ratio > config.index_topk


def project(
    ops: Ops,
    config: ModelConfig,
    weights: AttentionWeights,
    ratio: int,
    x: Array,
    table: tuple[Array, Array],
    asks: bool,
) -> Projected:
    """Everything that depends on the new tokens alone."""
    n_tokens, eps = x.shape[0], config.norm_eps
    latent, kv = linears(ops, (weights.q_a, weights.kv), x)
    latent = ops.norm(latent, weights.q_norm, eps)
    plain = ops.linear(weights.q_b, latent).reshape(n_tokens, config.n_heads, config.head_dim)
    queries = ops.fused_rows(plain, table, norm=True, eps=eps, scale=config.head_dim**-0.5)
    if queries is None:
        queries = ops.rotate(ops.norm(plain, None, eps), table) * config.head_dim**-0.5
    if not ratio:
        return Projected(queries, kv)
    own, indexer = _present(weights.compressor), weights.indexer
    projections = [own.kv, own.gate]
    if indexer is not None:
        projections += [indexer.compressor.kv, indexer.compressor.gate]
    if indexer is None or not asks:
        return Projected(queries, kv, linears(ops, projections, x))
    *columns, share = linears(ops, [*projections, indexer.share], x)
    asked = index_queries(
        ops,
        indexer,
        x,
        latent,
        table,
        heads=config.index_heads,
        dim=config.index_dim,
        rounded=config.kv_rounding,
        share=share,
    )
    return Projected(queries, kv, tuple(columns), asked)


def give(ops: Ops, config: ModelConfig, weights: AttentionWeights, mixed: Array) -> Array:
    """The output projection. mixed: (T, heads, head_dim), turned back. Returns (T, hidden)."""
    n_tokens = mixed.shape[0]
    grouped = mixed.reshape(n_tokens, config.o_groups, -1)
    low = ops.grouped_linear(weights.o_a, grouped).reshape(n_tokens, -1)
    return ops.linear(weights.o_b, low)


def mix(
    ops: Ops,
    config: ModelConfig,
    weights: AttentionWeights,
    ratio: int,
    state: LayerState,
    new: Projected,
    at: Positions,
) -> tuple[Array, LayerState]:
    """Take the new tokens into the state and let them attend: (T, heads, head_dim), turned back, and the state."""
    n_tokens, eps = new.kv.shape[0], config.norm_eps
    keys = ops.fused_rows(
        new.kv, at.table, older=state.window, norm=True, weight=weights.kv_norm, eps=eps, kv=config.kv_rounding
    )
    if keys is None:
        raw = ops.rotate(ops.norm(new.kv, weights.kv_norm, eps), at.table)
        if config.kv_rounding:
            raw = ops.round_kv(raw, config.rope_dim)
        keys = ops.concatenate([state.window, raw], axis=0)
    window = keys[-config.window :]
    if n_tokens > 1:
        window = ops.own(window)

    compressed, index, rows, index_rows = state.compressed, state.index, None, None
    if ratio:
        compressed, index = _take_in(ops, config, weights, ratio, state, new, at)
        rows = ops.view(_present(compressed).rows)
        if new.asked is not None:
            index_rows = ops.view(_present(index).rows)
    after = LayerState(window, compressed, index)

    if n_tokens == 1 and ops.fuses_attention:
        picked = None
        if new.asked is not None:
            picked = pick_rows(ops, new.asked, index_rows, None, config.index_topk)
        mixed = ops.fused_attend(new.queries, window, rows, picked, weights.sinks, at.table)
        if mixed is not None:
            return mixed, after
    outputs = []
    size = ops.attention_block
    for start in range(0, n_tokens, size):
        stop = min(start + size, n_tokens)
        block = _Block(at.first, start, stop, keys.shape[0] - n_tokens)
        outputs.append(
            _attend_block(ops, config, weights.sinks, ratio, block, new.queries, keys, rows, new.asked, index_rows)
        )
    mixed = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=0)
    turned = ops.fused_rows(mixed, at.table, inverse=True)
    return ops.rotate(mixed, at.table, inverse=True) if turned is None else turned, after


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
    near = ops.widen(keys[low:high])
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
            far = ops.widen(rows[:n_rows])
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
    ops: Ops,
    config: ModelConfig,
    weights: AttentionWeights,
    ratio: int,
    state: LayerState,
    new: Projected,
    at: Positions,
) -> tuple[CompressorState, CompressorState | None]:
    """Update the compressors with T tokens before anyone attends: a token sees the row that it finishes."""

    def finish_kv(rows: Array, first: int) -> Array:
        table = _row_table(ops, ratio, first, rows.shape[0], at)
        done = ops.fused_rows(rows, table, kv=config.kv_rounding)
        if done is not None:
            return done
        rows = ops.rotate(rows, table)
        return ops.round_kv(rows, config.rope_dim) if config.kv_rounding else rows

    def finish_index(rows: Array, first: int) -> Array:
        table = _row_table(ops, ratio, first, rows.shape[0], at)
        done = ops.fused_rows(rows, table, index=config.kv_rounding, half=config.kv_rounding)
        if done is not None:
            return done
        rows = ops.rotate(rows, table)
        return ops.round_f16(ops.round_index(rows)) if config.kv_rounding else rows

    columns = new.columns
    geometry = Geometry(ratio, config.head_dim, config.norm_eps)
    own, current = _present(weights.compressor), _present(state.compressed)
    compressed = compress(ops, own, geometry, current, columns[0], at.first, finish_kv, (columns[0], columns[1]))
    if state.index is None:
        return compressed, None
    geometry = Geometry(ratio, config.index_dim, config.norm_eps)
    own = _present(weights.indexer).compressor
    index = compress(ops, own, geometry, state.index, columns[2], at.first, finish_index, (columns[2], columns[3]))
    return compressed, index


def _row_table(ops: Ops, ratio: int, first: int, count: int, at: Positions) -> tuple[Array, Array]:
    """cos and sin at the first tokens of `count` groups; one table serves all layers of a chunk."""
    found = at.row_tables.get((ratio, first, count))
    if found is None:
        cos, sin = at.rope.table(first + ratio * np.arange(count, dtype=np.int64))
        found = at.row_tables[ratio, first, count] = (ops.array(cos), ops.array(sin))
    return found


_T = TypeVar("_T")


def _present(value: _T | None) -> _T:
    """A part that every layer of this ratio has; build_model and new states guarantee it."""
    assert value is not None
    return value
