"""Lightning indexer: which compressed rows a token of a ratio-4 layer attends to.

Its own small compressor makes one index row per compressed row. A query's score of a row is a weighted sum over the
index heads of max(0, query . row); the best `index_topk` rows win. Equal scores go to the lowest row: with few heads
exact ties are common (max(0, .) gives exact zeros), and prefill and decode must choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvdb_engine.compressor import CompressorWeights
from kvdb_engine.ops import Array, Ops


@dataclass(frozen=True, slots=True)
class IndexerWeights:
    """query: (heads * dim, q_rank), share: (heads, hidden), both linear weights."""

    query: object
    share: object
    compressor: CompressorWeights


@dataclass(frozen=True, slots=True)
class IndexQueries:
    """What the tokens of a chunk ask: queries (T, heads, dim), share (T, heads) with all scales folded in."""

    queries: Array
    share: Array


def index_queries(
    ops: Ops,
    weights: IndexerWeights,
    x: Array,
    latent: Array,
    table: tuple[Array, Array],
    *,
    heads: int,
    dim: int,
    rounded: bool,
    share: Array | None = None,
) -> IndexQueries:
    """Queries of T tokens.

    share: weights.share times x, if that is known. x: (T, hidden); latent: (T, q_rank), the normalised query
    latent; table: RoPE at each token.
    """
    plain = ops.linear(weights.query, latent).reshape(x.shape[0], heads, dim)
    queries = ops.fused_rows(plain, table, index=rounded)
    if queries is None:
        queries = ops.rotate(plain, table)
        if rounded:
            queries = ops.round_index(queries)
    if share is None:
        share = ops.linear(weights.share, x)
    return IndexQueries(queries, share * (dim * heads) ** -0.5)


def pick_rows(ops: Ops, asked: IndexQueries, rows: Array, visible: Array | None, count: int) -> Array:
    """The `count` best rows for each token: (T, count), ascending.

    rows: (n_rows, dim) as they are kept, n_rows >= count. visible: (T, 1) number of rows each token may see, None if
    all. A token that sees fewer than `count` rows gets rows it must not see as well: the caller masks them.
    """
    n_tokens, heads, dim = asked.queries.shape
    scores = ops.fused_scores(asked.queries, asked.share, rows)
    if scores is None:
        scores = ops.maximum(asked.queries.reshape(n_tokens * heads, dim) @ ops.widen(rows).swapaxes(0, 1), 0.0)
        scores = (asked.share[:, None, :] @ scores.reshape(n_tokens, heads, rows.shape[0]))[:, 0]
    if visible is not None:
        scores = ops.keep(ops.arange(0, rows.shape[0])[None] < visible, scores)
    return ops.top_rows(scores, count)
