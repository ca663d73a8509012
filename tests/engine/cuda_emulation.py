"""The CUDA kernels of the MLX back end, compiled for this processor: a stand-in for ops_mlx_cuda.Kernels."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kvdb_engine.ops_mlx_cuda import SOURCE

_HERE = Path(__file__).parent
_SIGNATURE = re.compile(r"^KERNEL (kvdb_\w+)\(([^)]*)\)", re.M)
_HOST = {
    mx.float32: np.float32,
    mx.int32: np.int32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
}


def build(folder: Path) -> Path:
    """Compile the kernels; needs g++. Returns the library's path."""
    text = SOURCE.read_text().replace("extern __shared__ float4 dynamic[];", "")
    launchers = []
    for name, parameters in _SIGNATURE.findall(text):
        names = [part.split()[-1].lstrip("*") for part in parameters.split(",")]
        launchers.append(
            f'extern "C" void launch_{name}({parameters}, int grid_x, int grid_y, int threads) {{'
            f" run_grid(grid_x, grid_y, threads, [&] {{ {name}({', '.join(names)}); }}); }}"
        )
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(f'#include "{_HERE / "cuda_emulation.h"}"\n{text}\n' + "\n".join(launchers) + "\n")
    command = ["g++", "-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library


class EmulatedKernels:
    """Launches like ops_mlx_cuda.Kernels, at once and on the processor. calls: how often each kernel ran."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.calls: dict[str, int] = {}

    def launch(
        self,
        name: str,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], Any]],
        scalars: Sequence[int | float],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> list[mx.array]:
        assert shared_bytes <= 16 << 14 and threads % 32 == 0 and threads <= 1024
        self.calls[name] = self.calls.get(name, 0) + 1
        mx.eval(list(inputs))
        held = []
        for array in inputs:
            raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
            held.append(np.ascontiguousarray(np.array(raw)))
        made = [np.full(shape, 0x7F if _HOST[dtype] == np.uint16 else 77, _HOST[dtype]) for shape, dtype in outputs]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*held, *made)]
        numbers = [ctypes.c_float(n) if isinstance(n, float) else ctypes.c_int(n) for n in scalars]
        getattr(self._library, f"launch_{name}")(*pointers, *numbers, *map(ctypes.c_int, (*grid, threads)))
        found = []
        for array, (_, dtype) in zip(made, outputs, strict=True):
            result = mx.array(array)
            found.append(result.view(mx.bfloat16) if dtype == mx.bfloat16 else result)
        return found
