"""How much a stored snapshot is worth keeping: pure arithmetic over numbers, or over numpy columns of them.

The eviction policies order snapshots by these scores, lowest first. The same functions run in the daemon, one snapshot
at a time, and in `kvdb-bench eviction`, which replays traces over whole columns; so what is measured is what runs.
The measurements and the alternatives that lost are in docs/decisions/eviction-value.md.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Number = TypeVar("Number", float, F64)

# A hit counts half after six hours, as in ds4.
HALF_LIFE_S = 21600.0
# A snapshot that was used a moment ago is not infinitely likely to be used next.
SOON_S = 5.0
# A state that nothing continues yet is waiting for its next step: that is worth one hit. One that was continued is
# needed again only for a retry or another branch: each branch that exists is worth this many.
CONTINUED_WEIGHT = 0.2


def decayed_hits(hits: Number, idle_s: Number) -> Number:
    """A hit count that was right `idle_s` seconds ago, now."""
    left: Number = hits * 2.0 ** (idle_s / -HALF_LIFE_S)
    return left


def value(
    hits: Number, idle_s: Number, children: Number, is_tip: Number, lost_s: Number, freed_bytes: Number
) -> Number:
    """Expected seconds of prefill saved per byte that evicting the snapshot frees, up to one constant factor.

    hits: decayed count of restores and prompts answered. idle_s: seconds since the last one, or since creation.
    children: stored snapshots that continue this one; is_tip: 1 if there are none, else 0.
    lost_s: seconds of prefill from the longest other stored prefix of it to it: what its next use would cost.
    freed_bytes: its tail and the pages that no other snapshot reaches; bytes that stay do not count.

    The chance that the next request wants it is taken as (hits + expectation) / time since its last use.
    """
    wanted = hits + is_tip + CONTINUED_WEIGHT * children
    return wanted / (idle_s + SOON_S) * lost_s / freed_bytes


def ds4_score(hits: Number, n_tokens: Number, file_bytes: Number) -> Number:
    """ds4's score, the baseline: (decayed hits + 1) x tokens per byte of the whole state; few hits count as none."""
    return (hits * (hits >= 0.01) + 1.0) * n_tokens / file_bytes
