"""Routing: which experts, with which shares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvdb_engine.moe import MoeWeights, feed_forward
from kvdb_engine.ops import ExpertWeights
from kvdb_engine.ops_numpy import NumpyOps
from tests.engine.checkpoints import CONFIG, from_hf

RNG = np.random.default_rng(8)
CONFIG_ = dataclasses.replace(from_hf(CONFIG), swiglu_limit=1.0)
HIDDEN, WIDTH, E, K = CONFIG_.hidden, CONFIG_.expert_width, CONFIG_.n_experts, CONFIG_.experts_per_token


def f32(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, 1.0)
    return gate / (1 + np.exp(-gate)) * np.clip(up, -1, 1)


@pytest.mark.parametrize("kind", ["bias", "no bias", "table"])
def test_feed_forward(kind: str) -> None:
    x, ids = f32(7, HIDDEN) * 4, RNG.integers(0, CONFIG_.vocab, 7).astype(np.uint32)
    table = np.argsort(RNG.random((CONFIG_.vocab, E)), axis=1)[:, :K].astype(np.int32) if kind == "table" else None
    bias = f32(E) * 8 if kind == "bias" else None
    experts = ExpertWeights(f32(E, WIDTH, HIDDEN), f32(E, WIDTH, HIDDEN), f32(E, HIDDEN, WIDTH))
    weights = MoeWeights(
        f32(E, HIDDEN), bias, table, experts, f32(WIDTH, HIDDEN), f32(WIDTH, HIDDEN), f32(HIDDEN, WIDTH)
    )
    found = feed_forward(NumpyOps(), CONFIG_, weights, x, ids)
    for t in range(7):
        p = np.sqrt(np.log1p(np.exp(weights.router.astype(np.float64) @ x[t])))
        biased = p if bias is None else p + bias
        chosen = table[ids[t]] if table is not None else sorted(range(E), key=lambda e: (-biased[e], e))[:K]
        share = p[chosen] / max(p[chosen].sum(), 2.0**-14) * CONFIG_.route_scale
        wanted = weights.shared_down @ swiglu(weights.shared_gate @ x[t], weights.shared_up @ x[t])
        for e, s in zip(chosen, share, strict=True):
            wanted = wanted + experts.down[e] @ (swiglu(experts.gate[e] @ x[t], experts.up[e] @ x[t]) * s)
        assert np.abs(found[t] - wanted).max() < 1e-4
