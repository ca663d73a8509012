"""The model: weights of all layers, and the forward pass of one chunk of tokens over one state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.attention import AttentionWeights, LayerState, Positions, Projected, asks, give, mix, project
from kvdb_engine.compressor import CompressorState, CompressorWeights
from kvdb_engine.config import ModelConfig
from kvdb_engine.hyper import HyperHeadWeights, HyperWeights, collapse_streams, join_streams, split_streams
from kvdb_engine.indexer import IndexerWeights, IndexQueries
from kvdb_engine.moe import MoeWeights, feed_forward_parts, given_experts
from kvdb_engine.ops import Array, Ops
from kvdb_engine.rope import compressed_rope, window_rope
from kvdb_engine.weights import TensorSource, need, need_experts, regroup

# A back end that computes on its own begins after so many layers, while the next ones are still being described.
LAYERS_PER_START = 10


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. The two norms are (hidden,)."""

    hc_attn: HyperWeights
    attn_norm: Array
    attn: AttentionWeights
    hc_ffn: HyperWeights
    ffn_norm: Array
    ffn: MoeWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Everything that `Model` computes with."""

    embed: object
    layers: tuple[LayerWeights, ...]
    hc_head: HyperHeadWeights
    norm: Array
    head: object


def load_weights(
    ops: Ops, config: ModelConfig, source: TensorSource, progress: Callable[[int, int], None] = lambda done, of: None
) -> ModelWeights:
    """Read all weights of a model. progress(done, of) is called after each layer.

    Raises ModelError naming a tensor that is missing or has another shape than the config says.
    """
    c = config

    def vector(name: str, *shape: int) -> Array:
        return ops.array(need(source, name, shape).dense())

    def matrix(name: str, out: int, inner: int, exact: bool = False) -> object:
        return ops.weight(need(source, name, (out, inner)), exact)

    def hyper(name: str) -> HyperWeights:
        n = c.hc_streams
        outputs = 2 * n + n * n
        scale = need(source, f"{name}_scale", (3,)).dense()
        fn = matrix(f"{name}_fn", outputs, n * c.hidden, exact=True)
        return HyperWeights(fn, tuple(float(s) for s in scale), vector(f"{name}_base", outputs))

    def compressor(name: str, ratio: int, width: int) -> CompressorWeights:
        columns = width * (2 if ratio == 4 else 1)
        return CompressorWeights(
            kv=matrix(f"{name}.wkv", columns, c.hidden),
            gate=matrix(f"{name}.wgate", columns, c.hidden),
            ape=vector(f"{name}.ape", ratio, columns),
            norm=vector(f"{name}.norm", width),
        )

    def attention(layer: int, ratio: int) -> AttentionWeights:
        a = f"layers.{layer}.attn"
        group_in = c.n_heads * c.head_dim // c.o_groups
        o_a = need(source, f"{a}.wo_a", (c.o_groups * c.o_rank, group_in))
        indexer = None
        if ratio == 4:
            indexer = IndexerWeights(
                query=matrix(f"{a}.indexer.wq_b", c.index_heads * c.index_dim, c.q_rank),
                share=matrix(f"{a}.indexer.weights_proj", c.index_heads, c.hidden),
                compressor=compressor(f"{a}.indexer.compressor", ratio, c.index_dim),
            )
        return AttentionWeights(
            q_a=matrix(f"{a}.wq_a", c.q_rank, c.hidden),
            q_norm=vector(f"{a}.q_norm", c.q_rank),
            q_b=matrix(f"{a}.wq_b", c.n_heads * c.head_dim, c.q_rank),
            kv=matrix(f"{a}.wkv", c.head_dim, c.hidden),
            kv_norm=vector(f"{a}.kv_norm", c.head_dim),
            sinks=vector(f"{a}.attn_sink", c.n_heads),
            o_a=ops.weight(regroup(o_a, c.o_groups, c.o_rank)),
            o_b=matrix(f"{a}.wo_b", c.hidden, c.o_groups * c.o_rank),
            compressor=compressor(f"{a}.compressor", ratio, c.head_dim) if ratio else None,
            indexer=indexer,
        )

    def moe(layer: int) -> MoeWeights:
        f = f"layers.{layer}.ffn"
        shared = c.expert_width * c.n_shared_experts
        table = bias = None
        if layer < c.n_hash_layers:
            shape = (c.vocab, c.experts_per_token)
            table = need(source, f"{f}.gate.tid2eid", shape).dense().astype(np.int32)
        elif source.find(f"{f}.gate.bias") is not None:
            bias = vector(f"{f}.gate.bias", c.n_experts)
        into, out_of = (c.n_experts, c.expert_width, c.hidden), (c.n_experts, c.hidden, c.expert_width)
        return MoeWeights(
            router=matrix(f"{f}.gate", c.n_experts, c.hidden, exact=True),
            bias=bias,
            table=table,
            experts=ops.expert_weights(
                need_experts(source, layer, "w1", into),
                need_experts(source, layer, "w3", into),
                need_experts(source, layer, "w2", out_of),
            ),
            shared_gate=matrix(f"{f}.shared_experts.w1", shared, c.hidden),
            shared_up=matrix(f"{f}.shared_experts.w3", shared, c.hidden),
            shared_down=matrix(f"{f}.shared_experts.w2", c.hidden, shared),
        )

    layers = []
    for number, ratio in enumerate(c.ratios):
        name = f"layers.{number}"
        layers.append(
            LayerWeights(
                hc_attn=hyper(f"{name}.hc_attn"),
                attn_norm=vector(f"{name}.attn_norm", c.hidden),
                attn=attention(number, ratio),
                hc_ffn=hyper(f"{name}.hc_ffn"),
                ffn_norm=vector(f"{name}.ffn_norm", c.hidden),
                ffn=moe(number),
            )
        )
        progress(number + 1, c.n_layers)
    head_scale = float(need(source, "hc_head_scale", (1,)).dense()[0])
    head_fn = matrix("hc_head_fn", c.hc_streams, c.hc_streams * c.hidden, exact=True)
    return ModelWeights(
        embed=matrix("embed", c.vocab, c.hidden),
        layers=tuple(layers),
        hc_head=HyperHeadWeights(head_fn, head_scale, vector("hc_head_base", c.hc_streams)),
        norm=vector("norm", c.hidden),
        head=matrix("head", c.vocab, c.hidden),
    )


def nbytes(weights: Any) -> int:
    """Bytes of memory that weights take: ModelWeights, or any part of them."""
    if isinstance(weights, tuple):
        return sum(map(nbytes, weights))
    if is_dataclass(weights):
        return sum(nbytes(getattr(weights, part.name)) for part in fields(weights))
    return int(getattr(weights, "nbytes", 0))


def empty_layers(ops: Ops, config: ModelConfig) -> tuple[LayerState, ...]:
    """The state of every layer before the first token."""

    def compressor(ratio: int, width: int) -> CompressorState:
        columns = width * (2 if ratio == 4 else 1)
        nothing = ops.array(np.zeros((0, columns), np.float32))
        return CompressorState(ops.no_rows(width, config.kv_rounding), nothing, nothing)

    window = ops.array(np.zeros((0, config.head_dim), np.float16 if config.kv_rounding else np.float32))
    return tuple(
        LayerState(
            window,
            compressor(ratio, config.head_dim) if ratio else None,
            compressor(ratio, config.index_dim) if ratio == 4 else None,
        )
        for ratio in config.ratios
    )


def state_arrays(layers: Sequence[LayerState]) -> list[Array]:
    """Every array of these layers' states but the rows' past, which was computed before."""
    found = []
    for layer in layers:
        found.append(layer.window)
        for part in (layer.compressed, layer.index):
            if part is not None:
                arrays = (part.rows.buffer, part.open_kv, part.open_score, part.previous_kv, part.previous_score)
                found += [array for array in arrays if array is not None]
    return found


def _packed(new: Projected) -> tuple[Array, ...]:
    """Projected as a plain tuple of arrays: what a compiled function can return."""
    asked = () if new.asked is None else (new.asked.queries, new.asked.share)
    return (new.queries, new.kv, tuple(new.columns), asked)


def _unpacked(packed: tuple[Any, ...]) -> Projected:
    queries, kv, columns, asked = packed
    return Projected(queries, kv, tuple(columns), IndexQueries(*asked) if asked else None)


class Model:
    """Weights bound to a back end. Holds no state of any session."""

    def __init__(self, ops: Ops, config: ModelConfig, weights: ModelWeights) -> None:
        self.ops = ops
        self.config = config
        self.weights = weights
        self._window_rope = window_rope(config)
        self._compressed_rope = compressed_rope(config)
        self._compiled: dict[tuple[int, bool], Callable[..., Any]] = {}

    def forward(
        self,
        layers: tuple[LayerState, ...],
        ids: npt.NDArray[np.uint32],
        first: int,
        want_logits: bool = True,
        every: bool = False,
    ) -> tuple[tuple[LayerState, ...], Array | None]:
        """Run T tokens at positions first, first + 1, ... over a state of `first` tokens.

        Returns the new layer states (the old ones stay valid) and the (vocab,) logits after the last token, or None;
        every: the (T, vocab) logits after each token, for measuring the model.
        """
        ops, c = self.ops, self.config
        positions = first + np.arange(len(ids), dtype=np.int64)
        at_window = Positions(first, self._window_rope, self._table(positions, compressed=False))
        at_compressed = Positions(first, self._compressed_rope, self._table(positions, compressed=True))
        tables = (at_window.table, at_compressed.table)
        embedded = ops.embed(self.weights.embed, ids)
        streams = ops.concatenate([embedded[:, None]] * c.hc_streams, axis=1)
        compiled = len(ids) == 1 and ops.compiles
        n_tokens = first + len(ids)
        post, comb, new = self._step(-1, asks(c, c.ratios[0], n_tokens), compiled)(streams, tables)
        after = []
        for number, (ratio, weights, state) in enumerate(zip(c.ratios, self.weights.layers, layers, strict=True)):
            mixed, changed = mix(
                ops, c, weights.attn, ratio, state, _unpacked(new), at_compressed if ratio else at_window
            )
            after.append(changed)
            given = given_experts(ops, weights.ffn, ids)
            is_last = number + 1 == c.n_layers
            step = self._step(number, not is_last and asks(c, c.ratios[number + 1], n_tokens), compiled)
            arguments = (streams, tables, post, comb, mixed) + (() if given is None else (given,))
            if is_last:
                (streams,) = step(*arguments)
            else:
                streams, post, comb, new = step(*arguments)
            if len(after) % LAYERS_PER_START == 0:
                ops.start([streams, *state_arrays(after[-LAYERS_PER_START:])])
        if not want_logits:
            return tuple(after), None
        read = streams if every else streams[-1:]
        last = collapse_streams(ops, self.weights.hc_head, read, hc_eps=c.hc_eps, norm_eps=c.norm_eps)
        logits = ops.linear(self.weights.head, ops.norm(last, self.weights.norm, c.norm_eps))
        return tuple(after), logits if every else logits[0]

    def _step(self, number: int, asks: bool, compiled: bool) -> Callable[..., Any]:
        """From what layer `number` mixed to what layer `number + 1` projects: all that depends on no state.

        Takes (streams, tables, post, comb, mixed[, given experts]), for number -1 (streams, tables). Returns the
        streams, and unless this was the last layer post, comb and the packed projections of the next one; for -1
        without the streams. asks: whether the next layer's indexer has to choose.
        """
        if not compiled:
            return partial(self._between, number, asks)
        if (number, asks) not in self._compiled:
            self._compiled[number, asks] = self.ops.compile(partial(self._between, number, asks))
        return self._compiled[number, asks]

    def _between(
        self,
        number: int,
        asks: bool,
        streams: Array,
        tables: tuple[tuple[Array, Array], tuple[Array, Array]],
        post: Array = None,
        comb: Array = None,
        mixed: Array = None,
        given: Array = None,
    ) -> tuple[Any, ...]:
        ops, c = self.ops, self.config
        done: tuple[Array, ...] = ()
        if number >= 0:
            weights = self.weights.layers[number]
            streams = self._join(streams, (give(ops, c, weights.attn, mixed),), post, comb)
            x, post, comb = self._split(weights.hc_ffn, streams, weights.ffn_norm)
            streams = self._join(streams, feed_forward_parts(ops, c, weights.ffn, x, given), post, comb)
            done = (streams,)
        if number + 1 == c.n_layers:
            return done
        weights = self.weights.layers[number + 1]
        ratio = c.ratios[number + 1]
        x, post, comb = self._split(weights.hc_attn, streams, weights.attn_norm)
        new = project(ops, c, weights.attn, ratio, x, tables[1 if ratio else 0], asks)
        return (*done, post, comb, _packed(new))

    def _split(self, weights: HyperWeights, streams: Array, norm: Array) -> tuple[Array, Array, Array]:
        """A sub-layer's normalised input, post and comb."""
        ops, c = self.ops, self.config
        done = ops.fused_split(weights, streams, norm, c.hc_iterations, c.hc_eps, c.norm_eps)
        if done is not None:
            return done
        x, post, comb = split_streams(
            ops, weights, streams, iterations=c.hc_iterations, hc_eps=c.hc_eps, norm_eps=c.norm_eps
        )
        return ops.norm(x, norm, c.norm_eps), post, comb

    def _join(self, streams: Array, outputs: tuple[Array, ...], post: Array, comb: Array) -> Array:
        """The streams after a sub-layer whose output is the sum of `outputs`."""
        done = self.ops.fused_join(streams, outputs, post, comb)
        if done is not None:
            return done
        output = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
        return join_streams(streams, output, post, comb)

    def _table(self, positions: npt.NDArray[np.int64], *, compressed: bool) -> tuple[Array, Array]:
        cos, sin = (self._compressed_rope if compressed else self._window_rope).table(positions)
        return self.ops.array(cos), self.ops.array(sin)
