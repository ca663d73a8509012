"""The engine's own speed on this machine: prefill, decode at growing context, with and without a fast BLAS.

One process for each way of computing (engine_speed.py): numpy, which brings an OpenBLAS and uses one thread of it;
MLX's processor device with an OpenBLAS loaded first (the `fastblas` extra); MLX as installed, with its own BLAS or on a
GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from kvdb_tools.bench.scenario import Cell, MissingError, Result, Settings

_LENGTHS = (128, 2048, 16_384)
_CONTEXTS = (0, 4096, 16_384)
_LIMIT = 1.5  # what decoding at the longest context may cost, as a multiple of decoding at none


def run(settings: Settings) -> Result:
    """Measure every way that this machine has."""
    contexts = (0, 1024, 2048) if settings.quick else _CONTEXTS
    result = Result(
        f"The engine: {settings.model}",
        (
            *("back end", "matmul GFLOP/s", *(f"prefill {length:,} tok/s" for length in _LENGTHS)),
            *("decode at 0 ms", *(f"{context:,} ms" for context in contexts[1:]), f"{contexts[-1]:,} / 0"),
            "Python and calls %",
        ),
    )
    for label, backend, lengths in ways(settings):
        settings.say(f"measuring {label}")
        found = measure(settings.model, backend, lengths, contexts)
        prefill, decode = found["prefill"], found["decode"]
        first, last = (decode[str(context)] for context in (contexts[0], contexts[-1]))
        row: list[Cell] = [label, round(found["gflops"], 1)]
        row += [prefill.get(str(length)) for length in _LENGTHS]
        row += [first, decode[str(contexts[1])], last, last / first, round(100 * min(1.0, found["python"]))]
        result.rows.append(row)
        if backend == "numpy":
            claim = f"decoding at {contexts[-1]:,} tokens costs at most {_LIMIT} x decoding at 0: {last / first:.2f}"
            result.claims.append((claim, last / first <= _LIMIT))
    result.notes += [
        "decode: median of 20 tokens, at each context in turn; prefill: best of up to 5; an empty cell would take "
        "minutes (--full). numpy: processor time of its one thread, which on a quiet machine is the time; MLX: time",
        "Python and calls: of a decode step at 0. numpy: what a model of as many layers but the least widths takes; "
        "MLX: time until the step is described, before it is computed",
    ]
    return result


def ways(settings: Settings) -> list[tuple[str, str, tuple[int, ...]]]:
    """(label, back end, prefills) of each way of computing that is installed."""
    lengths = _LENGTHS[:2] if settings.quick else _LENGTHS
    found: list[tuple[str, str, tuple[int, ...]]] = [("numpy, OpenBLAS, one thread", "numpy", lengths)]
    if importlib.util.find_spec("mlx") is not None:
        slow = lengths[:1] if settings.quick else _LENGTHS if settings.full else _LENGTHS[:2]
        if importlib.util.find_spec("ngsolve_openblas") is not None:
            found.append(("MLX, processor, OpenBLAS", "mlx-cpu", slow))
        found.append(("MLX as installed", "mlx", slow if settings.full else slow[:1]))
    return found


def measure(model: str, backend: str, lengths: tuple[int, ...], contexts: tuple[int, ...]) -> dict[str, Any]:
    """What engine_speed.py prints. Raises MissingError with its message."""
    command = [sys.executable, "-m", "kvdb_tools.bench.engine_speed", model, backend]
    command += [",".join(map(str, some)) for some in (lengths, contexts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"{backend}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no output'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
