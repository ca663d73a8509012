"""Sampling: logits + position + seed -> token id, without any state.

The random number for the token at `position` is a pure function of (seed, position): the splitmix64 output function
over a counter. So a restored or forked session with the same seed continues identically, and another seed gives
another branch. Needs numpy only: the daemon samples stored logits without an engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a token. Defaults as in ds4.

    temperature: 0 or less takes the most likely id (the lowest id on ties). top_k: 0 = no limit. top_p: 1 = no limit.
    min_p: drops ids less likely than min_p times the most likely one. seed: any integer, taken modulo 2^64.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that have no meaning; the message names the field."""
        if not np.isfinite(self.temperature):
            raise ValueError(f"temperature must be finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")


GREEDY = Sampling(temperature=0.0)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on seed and position alone."""
    key = _mix((seed & _MASK) ^ 0x6B76_6462_7365_6564)
    return (_mix((key + _GOLDEN * (position + 1)) & _MASK) >> 11) * 2.0**-53


def log_probabilities(logits: F32) -> F64:
    """Natural log of the softmax over the whole vocabulary, in float64. logits: (vocab,) float32."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    return wide


def log_probabilities_of(logits: F32, ids: npt.ArrayLike) -> F64:
    """`log_probabilities(logits)[ids]`, in one buffer: fresh memory for all of them would cost more than the sum."""
    largest = np.float64(logits.max())
    weights = logits.astype(np.float64)
    weights -= largest
    np.exp(weights, out=weights)
    found: F64 = logits[np.asarray(ids)].astype(np.float64) - largest - np.log(weights.sum())
    return found


def logprob(logits: F32, token_id: int) -> float:
    """Log-probability of one id at temperature 1, without any cut."""
    return float(log_probabilities_of(logits, token_id))


def best_ids(logits: F32, count: int) -> npt.NDArray[np.intp]:
    """The `count` most likely ids, best first; equal logits in the order of their ids.

    Sorting a vocabulary of 129,280 takes 17 ms, finding its best few 0.2 ms: only those at or above the last wanted
    one are sorted.
    """
    if not 0 < count < len(logits):
        return np.argsort(-logits, kind="stable")[: max(count, 0)]
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    return _in_order(logits, np.flatnonzero(logits >= least))[:count]


def _in_order(logits: F32, ids: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Rising `ids` in the order of falling logit, equal ones by id."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def top(logits: F32, count: int) -> list[tuple[int, float, float]]:
    """The `count` most likely ids as (id, logit, logprob), best first; equal logits in the order of their ids."""
    order = best_ids(logits, count)
    logs = log_probabilities_of(logits, order)
    return list(zip(order.tolist(), logits[order].tolist(), logs.tolist(), strict=True))


def sample(logits: F32, position: int, sampling: Sampling) -> int:
    """Draw the id of the token at `position` (0-based: the number of tokens before it).

    logits: (vocab,) float32, not modified. Ids are walked in the order of falling logit, equal ones by id, so the
    result does not depend on how a sort breaks ties.
    """
    if sampling.temperature <= 0:
        return int(np.argmax(logits))
    if sampling.top_k:
        order = best_ids(logits, sampling.top_k)
    elif sampling.min_p:
        # Ids far below the cut need not be sorted; the margin keeps every id that the exact test below could keep.
        least = float(logits.max()) + sampling.temperature * (math.log(sampling.min_p) - 1e-3) - 1e-3
        order = _in_order(logits, np.flatnonzero(logits >= least))
    else:
        order = best_ids(logits, len(logits))
    scaled = logits[order].astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    if sampling.min_p:
        weights = weights[: int(np.count_nonzero(weights >= sampling.min_p))]
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1:
        # The shortest prefix that reaches top_p of what is left; at least one id.
        keep = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:keep]
    drawn = uniform(sampling.seed, position) * cumulative[-1]
    chosen = min(int(np.searchsorted(cumulative, drawn, side="right")), len(cumulative) - 1)
    return int(order[chosen])
