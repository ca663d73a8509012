"""Which back end computes in this process. The only place that decides, and the only one that imports MLX on purpose.

auto        MLX where it has a GPU (Metal, CUDA); numpy otherwise
numpy       processors: numpy with its own BLAS
mlx         MLX on its default device
mlx-cpu     MLX on the processor, with an OpenBLAS loaded first when the `fastblas` extra is installed

Why not MLX on processors: the wheel's own BLAS reaches a fiftieth of the machine, and an operation costs 7 to 10 us
instead of 1 (docs/engine.md has the measurements).
"""

from __future__ import annotations

import importlib.util
import os
import time

import numpy as np

from kvdb_engine.errors import ModelError
from kvdb_engine.ops import Ops
from kvdb_engine.ops_numpy import NumpyOps

NAMES = ("auto", "numpy", "mlx", "mlx-cpu")
_MATRIX = 256
_selected: dict[str, Ops] = {}


def select(name: str = "auto") -> Ops:
    """The back end of that name; always the same object within a process. Raises ModelError if it cannot be had."""
    if name not in NAMES:
        raise ModelError(f"back end {name!r} is unknown; known are {', '.join(NAMES)}")
    if name == "auto":
        name = os.environ.get("KVDB_BACKEND", "") or ("mlx" if _mlx_has_gpu() else "numpy")
        return select(name)
    if name not in _selected:
        _selected[name] = NumpyOps() if name == "numpy" else _mlx(name)
    return _selected[name]


def _mlx_has_gpu() -> bool:
    if importlib.util.find_spec("mlx") is None:
        return False
    # MLX for processors ships as mlx-cpu; importing mlx.core there would cost start-up time for nothing.
    if importlib.util.find_spec("mlx.lib") is None and importlib.util.find_spec("mlx.core") is None:
        return False
    import mlx.core as mx

    return bool(mx.metal.is_available()) or (hasattr(mx, "cuda") and bool(mx.cuda.is_available()))


def _mlx(name: str) -> Ops:
    if name == "mlx-cpu" and importlib.util.find_spec("ngsolve_openblas") is not None:
        # Before mlx.core: MLX's BLAS calls go to whichever library the process loaded first.
        import ngsolve_openblas  # noqa: F401
    try:
        from kvdb_engine.ops_mlx import MlxOps
    except ImportError as error:
        raise ModelError("MLX is not installed: pip install 'kvdb[engine]' (or 'kvdb[cuda]')") from error
    return MlxOps(cpu=name == "mlx-cpu")


def matmul_gflops(ops: Ops) -> float:
    """GFLOP/s of a small float32 product, the best of three: whether a fast BLAS is at work shows at once.

    Takes milliseconds; the processor's reference BLAS does about 3, an OpenBLAS 50 and more.
    """
    a = ops.array(np.random.default_rng(1).standard_normal((_MATRIX, _MATRIX)).astype(np.float32))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        ops.evaluate([ops.linear(a, a)])
        best = min(best, time.perf_counter() - began)
    return 2 * _MATRIX**3 / best / 1e9
