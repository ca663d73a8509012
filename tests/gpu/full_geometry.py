"""DeepSeek V4 Flash at full size with random weights, through the engine: speed, memory, snapshot and restore.

    python tests/gpu/full_geometry.py [--layers N] [--context 25000] [--parts] [--decode-only]

Needs a GPU of 100 GiB or more and MLX for it. The logits mean nothing; times, sizes and equality do. Exits 1 if a claim
of the list at the end does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from kvdb_engine import model
from kvdb_engine.engine import Engine
from kvdb_engine.selfcheck import everything
from kvdb_engine.state import State
from kvdb_engine.synthetic_model import FLASH
from kvdb_engine.weights_random import random_model
from tests.engine.conftest import records, restore

GiB = 1 << 30
IDS = np.random.default_rng(11).integers(0, FLASH.vocab, 1 << 18).astype(np.uint32)


def say(*words: object) -> None:
    print(*words, flush=True)


def claim(holds: bool, what: str) -> bool:
    """One line for show.py's table."""
    say(f"{'CLAIM ok  ' if holds else 'CLAIM BAD '}{what}")
    return holds


def decode_ms(engine: Engine, state: State, count: int, warm: int = 8) -> tuple[float, float]:
    """Median and fastest milliseconds of a step, the sampled id's way to the host included."""
    times = []
    for token in IDS[: warm + count]:
        started = time.perf_counter()
        engine.step(state, int(token))
        _ = mx.argmax(state._logits).item()  # type: ignore[arg-type]
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times[warm:])), min(times[warm:])


def show_decode(engine: Engine, state: State, what: str, count: int = 64) -> float:
    """Tokens per second, of the median step."""
    median, fastest = decode_ms(engine, state, count)
    say(f"decode at {what}: {median:.2f} ms/token median, {fastest:.2f} fastest: {1e3 / median:.1f} tok/s")
    return 1e3 / median


def prefill(engine: Engine, state: State, upto: int) -> list[float]:
    """In the engine's chunks; each one's tokens per second."""
    before, started, rates = state.n_tokens, time.perf_counter(), []
    for _ in engine.prefill(state, IDS[state.n_tokens : upto]):
        mx.synchronize()
        now = time.perf_counter()
        n = state.n_tokens - before
        rates.append(n / (now - started))
        say(f"  prefill {before:6} .. {state.n_tokens:6}: {rates[-1]:7.0f} tok/s ({now - started:.3f} s)")
        before, started = state.n_tokens, time.perf_counter()
    return rates


def parts(engine: Engine, base: State, n_tokens: int, count: int) -> None:
    """What a step or chunk takes without one of its parts: the difference is that part's share."""

    def timed(what: str, **changes: Any) -> None:
        kept = {name: getattr(model, name) for name in changes if hasattr(model, name)}
        experts, compiled = engine.ops.experts, engine.model._compiled
        engine.model._compiled = {}
        for name, change in changes.items():
            setattr(model if name in kept else engine.ops, name, change)
        times = []
        try:
            for _ in range(count):
                state = base.clone()
                started = time.perf_counter()
                engine._run(state, IDS[:n_tokens])
                mx.synchronize()
                times.append(time.perf_counter() - started)
        finally:
            engine.ops.experts, engine.model._compiled = experts, compiled  # type: ignore[method-assign]
            for name, before in kept.items():
                setattr(model, name, before)
        say(f"  {n_tokens} tokens at {base.n_tokens}, {what}: {1e3 * float(np.median(times[1:])):.2f} ms")

    def no_mix(ops: Any, c: Any, w: Any, ratio: int, state: Any, new: Any, at: Any) -> tuple[Any, Any]:
        return new.queries, state

    def no_ffn(ops: Any, c: Any, w: Any, x: Any, given: Any) -> tuple[Any, ...]:
        return (x,)

    def no_experts(w: Any, x: Any, ids: Any, share: Any, limit: float) -> Any:
        return x * share.sum(-1, keepdims=True)

    timed("all")
    timed("without rows and scores", mix=no_mix)
    timed("without routed experts", experts=no_experts)
    timed("without MoE", feed_forward_parts=no_ffn)
    timed("projections and mHC alone", mix=no_mix, feed_forward_parts=no_ffn)
    # The graph alone, nothing evaluated meanwhile: the host's share, then the device's.
    start = engine.ops.start
    engine.ops.start = lambda arrays: None  # type: ignore[method-assign]
    for _ in range(3):
        began = time.perf_counter()
        layers, logits = engine.model.forward(base.layers, IDS[:n_tokens], base.n_tokens)
        described = time.perf_counter()
        mx.async_eval(logits, model.state_arrays(layers))  # type: ignore[no-untyped-call]
        handed = time.perf_counter()
        mx.synchronize()
        done = time.perf_counter()
    ms = [1e3 * seconds for seconds in (described - began, handed - described, done - handed)]
    say(f"  describing the graph {ms[0]:.2f} ms, then handing it over {ms[1]:.2f} ms, then waiting {ms[2]:.2f} ms")
    engine.ops.start = start  # type: ignore[method-assign]


def snapshot(engine: Engine, live: State) -> bool:
    """Write, restore, continue; whether everything is equal."""
    started = time.perf_counter()
    pages, tail = records(engine, live)
    written = time.perf_counter()
    size = sum(map(len, pages)) + len(tail)
    restored = restore(engine, pages, tail)
    mx.eval(model.state_arrays(restored.layers))
    done = time.perf_counter()
    say(
        f"snapshot of {live.n_tokens} tokens: {len(pages)} pages and a tail of {len(tail) / 2**20:.1f} MiB, "
        f"{size / 2**20:.1f} MiB in all ({size / live.n_tokens:.0f} bytes/token; live "
        f"{live.nbytes / 2**20:.0f} MiB); "
        f"to records {written - started:.2f} s, restored {done - written:.2f} s"
    )
    equal = everything(engine, restored) == everything(engine, live)
    say(f"  restored state {'is bit-equal' if equal else 'DIFFERS'}")
    for token in IDS[:20]:
        engine.step(live, int(token))
        engine.step(restored, int(token))
        equal &= live.logits.tobytes() == restored.logits.tobytes()
    say(f"  20 tokens decoded on both: {'bit-equal logits' if equal else 'DIFFERENT'}")
    for _ in zip(engine.prefill(live, IDS[:3000]), engine.prefill(restored, IDS[:3000]), strict=True):
        equal &= live.logits.tobytes() == restored.logits.tobytes()
    say(f"  3,000 tokens prefilled on both: {'bit-equal logits' if equal else 'DIFFERENT'}")
    finite = bool(np.isfinite(live.logits).all())
    say(f"  logits: {'finite' if finite else 'NOT FINITE'}, rms {np.sqrt(np.mean(live.logits**2)):.2f}")
    return equal and finite


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """Later sections are still worth their time when one fails."""
    try:
        return work()
    except Exception:
        say(f"{what} FAILED")
        traceback.print_exc()
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=FLASH.n_layers)
    parser.add_argument("--context", type=int, default=25_000)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--decode-only", action="store_true")
    options = parser.parse_args()
    config = replace(FLASH, n_layers=options.layers, ratios=FLASH.ratios[: options.layers])
    started = time.perf_counter()
    engine = Engine(random_model(config), backend_name="mlx")
    say(
        f"{config.n_layers} layers on {engine.ops.name} ({mx.device_info().get('device_name')}): built in "
        f"{time.perf_counter() - started:.1f} s, {mx.get_active_memory() / GiB:.1f} GiB of weights"
    )
    say(f"the engine counts {engine.stats()['weight_bytes'] / GiB:.1f} GiB of weights")  # type: ignore[operator]
    mx.reset_peak_memory()
    state = engine.new_state()
    # Before any claim: the first steps load kernels and wake the device.
    decode_ms(engine, engine.new_state(), 24)
    at_0 = attempt("decode", lambda: show_decode(engine, state, "0"))
    if engine.ops.compiles and not options.decode_only:
        engine.ops.compiles = False
        attempt("decode", lambda: show_decode(engine, engine.new_state(), "0, steps described each time", 24))
        engine.ops.compiles = True
    if options.parts:
        attempt("parts of a step", lambda: parts(engine, state, 1, 12))
    if options.decode_only:
        return 0
    say("a prefill before any claim: kernels that no earlier program has compiled take seconds")
    attempt("prefill", lambda: prefill(engine, engine.new_state(), 2 * 2048))
    long = engine.new_state()
    rates = attempt("prefill", lambda: prefill(engine, long, options.context // 2048 * 2048))
    attempt("rest", lambda: prefill(engine, long, options.context))
    at_end = attempt("long decode", lambda: show_decode(engine, long.clone(), str(long.n_tokens)))
    say(f"memory: {mx.get_active_memory() / GiB:.1f} GiB now, {mx.get_peak_memory() / GiB:.1f} GiB at most")
    if options.parts:
        attempt("parts of a long step", lambda: parts(engine, long, 1, 8))
        attempt("parts of a chunk", lambda: parts(engine, long, 2048, 3))
    equal = attempt("snapshot", lambda: snapshot(engine, long))
    peak = mx.get_peak_memory() / GiB
    warm = rates or [0.0]
    fine = [
        claim((at_0 or 0) >= 40, f"full geometry: decode at 0 tokens: {at_0 or 0:.1f} tok/s (at least 40)"),
        claim(
            (at_end or 0) >= 40, f"full geometry: decode at {options.context}: {at_end or 0:.1f} tok/s (at least 40)"
        ),
        claim(
            min(warm) >= 1000,
            f"full geometry: prefill, 2,048-token chunks, kernels warm: {min(warm):.0f} to {max(warm):.0f} tok/s "
            "(at least 1,000)",
        ),
        claim(peak < 139, f"full geometry: peak memory {peak:.1f} GiB (an H200 has 139)"),
        claim(bool(equal), f"full geometry: a restored state of {options.context} tokens continues bit by bit"),
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
