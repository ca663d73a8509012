"""Routed experts of one layer at full geometry, in every form they are stored in: memory and time.

    python tests/gpu/experts.py

2-bit and 4-bit affine codes (MLX folders, GGUF Q4_K) and FP4 (Hugging Face) through the engine's kernels; beside them
MLX's own gather_qmm on the same weights. Exits 1 if the kernels are not used, or are off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from kvdb_engine import backend
from kvdb_engine.model import nbytes
from kvdb_engine.ops import ExpertWeights
from kvdb_engine.ops_mlx import MlxOps
from kvdb_engine.ops_mlx_cuda import Quantised
from kvdb_engine.synthetic_model import FLASH

# Bits per weight in the file: Q4_K has 144 bytes for 256 values, FP4 a scale byte for 32.
FORMS = (
    ("2-bit affine, groups of 128", 2, 128, "affine", 2.25),
    ("4-bit affine, groups of 32 (Q4_K)", 4, 32, "affine", 4.5),
    ("FP4 with E8M0 scales", 4, 32, "mxfp4", 4.25),
)


def stack(out: int, inner: int, bits: int, group: int, mode: str) -> Quantised:
    """Random codes for all experts."""
    shape = (FLASH.n_experts, out, inner)
    words = (*shape[:2], inner * bits // 32)
    codes = mx.random.randint(0, 1 << 16, words, mx.uint32) << 16 | mx.random.randint(0, 1 << 16, words, mx.uint32)
    if mode == "mxfp4":
        return Quantised(codes, mx.full((*shape[:2], inner // 32), 119, mx.uint8), None, 32, 4, mx.bfloat16, mode)
    scale = mx.full((*shape[:2], inner // group), 0.004, mx.bfloat16)
    return Quantised(codes, scale, -scale * 2 ** (bits - 1), group, bits, mx.bfloat16)


def microseconds(work: Callable[[], mx.array], count: int) -> float:
    mx.eval(work())
    mx.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        mx.eval(work())
    mx.synchronize()
    return 1e6 * (time.perf_counter() - started) / count


def measure(ops: MlxOps, weights: ExpertWeights, n_tokens: int, count: int) -> tuple[float, float, bool]:
    """Microseconds with the engine's kernels, then with gather_qmm, and whether both give the same."""
    x = mx.random.normal((n_tokens, FLASH.hidden))
    ids = mx.argsort(mx.random.uniform(shape=(n_tokens, FLASH.n_experts)), axis=1)[:, : FLASH.experts_per_token]
    ids, share = ids.astype(mx.int32), mx.random.uniform(shape=ids.shape)
    mx.eval(x, ids, share)

    def work() -> mx.array:
        found: mx.array = ops.experts(weights, x, ids, share, FLASH.swiglu_limit)
        return found

    fused = ops.fused
    assert fused is not None
    done = fused.experts(weights.gate, weights.up, weights.down, x, ids, share, FLASH.swiglu_limit)
    own = microseconds(work, count)
    ops.fused = None
    theirs = work()
    mlx = microseconds(work, max(2, count // 4))
    ops.fused = fused
    near = done is not None and float(np.corrcoef(np.array(done).ravel(), np.array(theirs).ravel())[0, 1]) > 0.999
    return own, mlx, near


def main() -> int:
    """One line per form for show.py's table."""
    ops = backend.select("mlx")
    assert isinstance(ops, MlxOps)
    bad = 0
    for what, bits, group, mode, in_file in FORMS:
        into, out_of = (FLASH.expert_width, FLASH.hidden), (FLASH.hidden, FLASH.expert_width)
        weights = ExpertWeights(*(stack(*shape, bits, group, mode) for shape in (into, into, out_of)))
        mx.eval(*(part for one in (weights.gate, weights.up, weights.down) for part in one.inputs))
        n_weights = 3 * FLASH.n_experts * FLASH.expert_width * FLASH.hidden
        ratio = 8 * nbytes(weights) / n_weights / in_file
        words, holds = [], ratio <= 1.3
        for n_tokens, count in ((1, 50), (2048, 4)):
            own, mlx, near = measure(ops, weights, n_tokens, count)
            holds &= near
            words.append(
                f"{n_tokens:,} tokens {own:,.0f} us (gather_qmm {mlx:,.0f}{'' if near else ', BUT THEY DIFFER'})"
            )
        bad += not holds
        verdict = "ok  " if holds else "BAD "
        print(f"CLAIM {verdict}experts, {what}: {ratio:.2f} x the file in memory; {'; '.join(words)}", flush=True)
        mx.clear_cache()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
