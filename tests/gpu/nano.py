"""Speed of dsv4-nano on this GPU: prefill of 128, 2,048 and 16,384 tokens, and decode behind each.

python tests/gpu/nano.py
"""

from __future__ import annotations

import sys
import time

import mlx.core as mx
import numpy as np

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine

REPEATS, STEPS = 3, 60


def main() -> int:
    """The best of three prefills and the median step; one line each for show.py's table."""
    info = open_model("dsv4-nano")
    engine = Engine(info, backend_name="mlx")
    ids = np.random.default_rng(5).integers(7, info.config.vocab, 16_384).astype(np.uint32)
    for n_tokens in (128, 2048, 16_384):
        seconds = []
        for _ in range(REPEATS):
            state, started = engine.new_state(), time.perf_counter()
            for _done in engine.prefill(state, ids[:n_tokens]):
                pass
            mx.synchronize()
            seconds.append(time.perf_counter() - started)
        times = []
        for token in ids[:STEPS]:
            started = time.perf_counter()
            engine.step(state, int(token))
            _ = mx.argmax(state._logits).item()  # type: ignore[arg-type]
            times.append(time.perf_counter() - started)
        rate = 1 / float(np.median(times[10:]))
        print(f"CLAIM ok  dsv4-nano: prefill of {n_tokens:,} tokens {n_tokens / min(seconds):,.0f} tok/s, "
              f"decode behind them {rate:.0f} tok/s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
