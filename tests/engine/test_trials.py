"""Random timelines: prefill, decode, snapshot and restore, fork, rewind, cancel, in any order.

Every timeline's history (which tokens came by prefill, which by decode) is replayed at the end in a fresh state, in
which nothing was ever stored or forked: all its bytes must be the same. KVDB_TRIALS=1000 runs as many.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvdb_engine.engine import Engine
from kvdb_engine.state import State
from tests.engine.conftest import records, restore

Hash = Callable[[Engine, State], bytes]
N_TRIALS = int(os.environ.get("KVDB_TRIALS", "12"))


@dataclass
class Timeline:
    """A state and how it came to be: (was it prefill, ids) in order."""

    state: State
    history: list[tuple[bool, np.ndarray]] = field(default_factory=list)
    stored: list[tuple[list[bytes], bytes, list[tuple[bool, np.ndarray]]]] = field(default_factory=list)


def prefill(engine: Engine, timeline: Timeline, ids: np.ndarray, stop_after: int | None = None) -> None:
    """Append by prefill; stop_after: cancel after so many chunks. What was done goes into the history."""
    before = timeline.state.n_tokens
    work = engine.prefill(timeline.state, ids)
    for number, _ in enumerate(work):
        if number == stop_after:
            work.close()
            break
    timeline.history.append((True, ids[: timeline.state.n_tokens - before]))


def replay(engine: Engine, history: list[tuple[bool, np.ndarray]]) -> State:
    timeline = Timeline(engine.new_state())
    for is_prefill, ids in history:
        if is_prefill:
            prefill(engine, timeline, ids)
        else:
            for token in ids:
                engine.step(timeline.state, int(token))
    return timeline.state


@pytest.mark.parametrize("trial", range(N_TRIALS))
def test_random_timelines(nano: Engine, fingerprint_of: Hash, trial: int) -> None:
    rng = np.random.default_rng(1000 + trial)
    lines = [Timeline(nano.new_state())]
    length = int(rng.choice([3, 60, 130, 300, 560, 1100], p=[0.15, 0.25, 0.25, 0.2, 0.1, 0.05]))
    prefill(nano, lines[0], rng.integers(7, 2560, rng.integers(1, length + 1)).astype(np.uint32))
    for _ in range(rng.integers(3, 10)):
        line = lines[rng.integers(len(lines))]
        match rng.choice(["step", "extend", "cancel", "snapshot", "restore", "fork", "rewind"]):
            case "step":
                ids = rng.integers(7, 2560, rng.integers(1, 9)).astype(np.uint32)
                for token in ids:
                    nano.step(line.state, int(token))
                line.history.append((False, ids))
            case "extend":
                prefill(nano, line, rng.integers(7, 2560, rng.integers(1, 140)).astype(np.uint32))
            case "cancel":
                prefill(nano, line, rng.integers(7, 2560, 300).astype(np.uint32), int(rng.integers(2)))
            case "snapshot":
                line.stored.append((*records(nano, line.state), list(line.history)))
            case "restore":
                line.state = restore(nano, *records(nano, line.state))
            case "fork":
                lines.append(Timeline(line.state.clone(), list(line.history), list(line.stored)))
            case "rewind":
                if line.stored:
                    pages, tail, history = line.stored[rng.integers(len(line.stored))]
                    line.state, line.history = restore(nano, pages, tail), list(history)
    for line in lines:
        fresh = replay(nano, line.history)
        assert fingerprint_of(nano, fresh) == fingerprint_of(nano, line.state), (trial, line.history)
        assert fresh.logits.tobytes() == line.state.logits.tobytes()
