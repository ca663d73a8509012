"""FFN of one layer: routed experts chosen per token, and one shared expert.

The router's scores are sqrt(softplus(z)). Hash layers take their experts from a table by token id; the others take the
best by score + bias, ties to the lower id. Shares always come from the unbiased scores, are normalised and scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvdb_engine.config import ModelConfig
from kvdb_engine.ops import Array, ExpertWeights, Ops

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
    scores = ops.router_scores(ops.linear(weights.router, x))
    if weights.table is not None:
        chosen = ops.array(weights.table[ids])
    else:
        biased = scores if weights.bias is None else scores + weights.bias
        chosen = ops.top_experts(biased, config.experts_per_token)
    share = ops.take_columns(scores, chosen)
    share = share / ops.maximum(share.sum(-1)[:, None], SHARE_FLOOR) * config.route_scale
    routed = ops.experts(weights.experts, x, chosen, share, config.swiglu_limit)
    middle = ops.swiglu(ops.linear(weights.shared_gate, x), ops.linear(weights.shared_up, x), config.swiglu_limit)
    return routed + ops.linear(weights.shared_down, middle)
