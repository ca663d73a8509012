"""FFN of one layer: routed experts chosen per token, and one shared expert.

The router's scores are sqrt(softplus(z)). Hash layers take their experts from a table by token id; the others take the
best by score + bias, ties to the lower id. Shares always come from the unbiased scores, are normalised and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvdb_engine.config import ModelConfig
from kvdb_engine.ops import Array, ExpertWeights, Ops, linears

SHARE_FLOOR = 2.0**-14  # ds4 divides by at least this much


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """router, shared_*: linear weights. table: (vocab, experts_per_token) host ints of a hash layer, else None."""

    router: object
    bias: Array | None
    table: npt.NDArray[np.int32] | None
    experts: ExpertWeights
    shared_gate: object
    shared_up: object
    shared_down: object


def feed_forward(ops: Ops, config: ModelConfig, weights: MoeWeights, x: Array, ids: npt.NDArray[np.uint32]) -> Array:
    """x: (T, hidden), normalised; ids: the T token ids. Returns (T, hidden)."""
    routed, shared = feed_forward_parts(ops, config, weights, x, given_experts(ops, weights, ids))
    return routed + shared


def given_experts(ops: Ops, weights: MoeWeights, ids: npt.NDArray[np.uint32]) -> Array | None:
    """The experts that a hash layer's table gives these tokens; None in other layers."""
    return None if weights.table is None else ops.array(weights.table[ids])


def feed_forward_parts(
    ops: Ops, config: ModelConfig, weights: MoeWeights, x: Array, given: Array | None
) -> tuple[Array, Array]:
    """What the routed experts give and what the shared one gives; the layer's output is their sum."""
    logits = ops.linear(weights.router, x)
    count, scale = config.experts_per_token, config.route_scale
    routing = ops.fused_route(logits, weights.bias, given, count, SHARE_FLOOR, scale)
    if routing is None:
        scores = ops.router_scores(logits)
        if given is not None:
            chosen = given
        else:
            chosen = ops.top_experts(scores if weights.bias is None else scores + weights.bias, count)
        share = ops.take_columns(scores, chosen)
        share = share / ops.maximum(share.sum(-1)[:, None], SHARE_FLOOR) * scale
    else:
        chosen, share = routing
    routed = ops.experts(weights.experts, x, chosen, share, config.swiglu_limit)
    gate, up = linears(ops, (weights.shared_gate, weights.shared_up), x)
    return routed, ops.linear(weights.shared_down, ops.swiglu(gate, up, config.swiglu_limit))
