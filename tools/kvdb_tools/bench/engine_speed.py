"""Speed of one back end: `python -m kvdb_tools.bench.engine_speed MODEL BACKEND LENGTHS CONTEXTS`.

In a process of its own, because which BLAS library MLX uses is decided when it is first imported. Prints one JSON
object. LENGTHS are the prefills to time and CONTEXTS, which begin with 0, the states to decode at, both as 1,2,3. Long
contexts are computed by numpy and handed over as a ds4 payload: a slow back end need not prefill them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import numpy.typing as npt

from kvdb_engine.backend import matmul_gflops
from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.engine import Engine
from kvdb_engine.model import state_arrays
from kvdb_engine.state import State
from kvdb_engine.state_records import to_dsv4
from kvdb_engine.weights_random import random_model

_STEPS = 24


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    model, backend = arguments[:2]
    lengths, contexts = ([int(number) for number in some.split(",")] for some in arguments[2:])
    info = open_model(model)
    engine = Engine(info, backend_name=backend)
    ids = _ids(info, max(*lengths, *contexts) + _STEPS)
    states = _states(info, engine, ids, contexts)
    found: dict[str, object] = {"backend": engine.ops.name, "gflops": matmul_gflops(engine.ops)}
    found["prefill"] = {length: _prefill(engine, ids[:length]) for length in lengths}
    decode = _decode(engine, states, ids)
    found["decode"] = {n: total for n, (total, _) in decode.items()}
    if engine.ops.name == "numpy":
        least = Engine(_least(info), backend_name=backend)
        found["python"] = _decode(least, {0: least.new_state()}, ids % 64)[0][0] / decode[0][0]
    else:
        found["python"] = decode[0][1] / decode[0][0]
    print(json.dumps(found))
    return 0


def _ids(info: ModelInfo, count: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(7).integers(7, info.config.vocab, count).astype(np.uint32)


def _states(info: ModelInfo, engine: Engine, ids: npt.NDArray[np.uint32], contexts: Sequence[int]) -> dict[int, State]:
    """States of this engine at each context."""
    numpy = engine if engine.ops.name == "numpy" else Engine(info, backend_name="numpy")
    state, found = numpy.new_state(), {}
    for context in contexts:
        for _ in numpy.prefill(state, ids[state.n_tokens : context]):
            pass
        same = state.clone() if numpy is engine else None
        found[context] = same or (engine.load_dsv4(to_dsv4(state, context + _STEPS)) if context else engine.new_state())
    return found


def _clock(engine: Engine) -> Callable[[], float]:
    """Processor time where one thread does everything, so that a busy machine disturbs less; else time."""
    return time.process_time if engine.ops.name == "numpy" else time.perf_counter


def _prefill(engine: Engine, ids: npt.NDArray[np.uint32]) -> float:
    """Tokens a second; the better of two runs, short prompts of five."""
    best, clock = float("inf"), _clock(engine)
    for _ in range(5 if len(ids) < 1000 else 2 if len(ids) < 10_000 else 1):
        state = engine.new_state()
        began = clock()
        for _ in engine.prefill(state, ids):
            pass
        best = min(best, clock() - began)
    return len(ids) / best


def _decode(engine: Engine, states: Mapping[int, State], ids: npt.NDArray[np.uint32]) -> dict[int, tuple[float, float]]:
    """By context: (ms a token, ms until all of it is described), medians. Described first, computed later: by MLX only.

    One token at each context in turn, so that what else the machine does falls on all alike.
    """
    clock = _clock(engine)
    times: dict[int, list[tuple[float, float]]] = {context: [] for context in states}
    for number in range(_STEPS):
        token = ids[number : number + 1]
        for context, state in states.items():
            began = clock()
            layers, logits = engine.model.forward(state.layers, token, state.n_tokens)
            described = clock() - began
            engine.ops.evaluate([logits, *state_arrays(layers)])
            state.advance(layers, token, logits)
            times[context].append((clock() - began, described))
    return {
        context: (1e3 * median(whole for whole, _ in taken[4:]), 1e3 * median(part for _, part in taken[4:]))
        for context, taken in times.items()
    }


def _least(info: ModelInfo) -> ModelInfo:
    """As many layers, calls and tokens, but hardly any values: what a step then takes is Python and calls."""
    least = replace(
        info.config, hidden=128, q_rank=128, n_heads=2, o_groups=1, o_rank=64, expert_width=64, index_heads=1, vocab=64
    )
    return random_model(least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
