"""The engine on this GPU against ds4's vectors, against numpy, and against itself; exits 1 if something is off.

    python tests/gpu/equivalence.py

Besides: the silent traps of MLX that ops_mlx.py avoids, each with a check that would notice.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# float32 throughout: what is compared here is the arithmetic, not the precision of 16-bit products.
os.environ.setdefault("KVDB_MLX_EXACT", "1")

import mlx.core as mx
import numpy as np

from kvdb_engine import backend, selfcheck
from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.fidelity import Vectors, argmax_agreement, compare, decode_logits, one_step, prefill_table, run
from kvdb_engine.ops_mlx import MlxOps
from kvdb_engine.weights import BlockFloats, CompactTensor, HostTensor

FAILED: list[str] = []
RNG = np.random.default_rng(5)


def check(fine: bool, what: str) -> None:
    print(f"  {'ok  ' if fine else 'BAD '} {what}", flush=True)
    if not fine:
        FAILED.append(what)


def ds4_vectors(name: str) -> None:
    """The same bounds as tests/engine/test_ds4_fidelity.py."""
    vectors = Vectors(Path(__file__).parent.parent / "vectors" / "ds4")
    engine = vectors.engine(name)
    for row in one_step(engine, vectors):
        check(row.largest < 1e-4, f"{row.what}: largest difference {row.largest:.1e}")
    for chunk in (1024, 128, 1):
        for row in prefill_table(engine, vectors, chunk):
            fine = row.correlation > 0.998 and row.median < 0.05 * max(row.rms, 1)
            check(fine, f"chunk {chunk}: {row.what}: median {row.median:.1e}, correlation {row.correlation:.6f}")
    ours, theirs = decode_logits(engine, vectors), vectors.from_token_1
    agree, counted = argmax_agreement(ours, theirs, np.ones(len(theirs), np.float32))
    check(agree >= counted - 1, f"same argmax where the best two differ by more than 1: {agree} of {counted}")


def nano_against_numpy(name: str) -> None:
    """The same tokens on both back ends, in one chunk, in chunks of 128, and one by one: what the traps spoil."""
    info = open_model("dsv4-nano")
    ids = RNG.integers(7, info.config.vocab, 700).astype(np.uint32)
    here, there = Engine(info, backend_name=name), Engine(info, backend_name="numpy")
    wanted = run(there, ids, 128).logits
    for chunk in (2048, 128, 1):
        row = compare(f"chunk {chunk}", run(here, ids, chunk).logits, wanted)
        check(
            row.correlation > 0.998, f"nano, chunk {chunk}: median {row.median:.1e}, correlation {row.correlation:.6f}"
        )


def traps(ops: MlxOps) -> None:
    """What was silently wrong in MLX on CUDA: none of it may reach a result."""
    # gather_mm with sorted indices and sliced or inserted axes: routed experts, for one token and many.
    gate, up, down = (RNG.standard_normal(s).astype(np.float32) / 8 for s in ((9, 64, 64), (9, 64, 64), (9, 64, 64)))
    plain = backend.select("numpy")
    for n_tokens in (1, 2, 17, 300):
        x = RNG.standard_normal((n_tokens, 64)).astype(np.float32)
        ids = np.argsort(RNG.random((n_tokens, 9)), axis=1)[:, :3].astype(np.int32)
        share = RNG.random((n_tokens, 3)).astype(np.float32)
        both = []
        for each in (plain, ops):
            weights = each.expert_weights(HostTensor(gate), HostTensor(up), HostTensor(down))
            both.append(each.host(each.experts(weights, each.array(x), each.array(ids), each.array(share), 10.0)))
        check(float(np.abs(both[0] - both[1]).max()) < 1e-4, f"experts of {n_tokens} tokens")
    # gather_mm itself, as the engine never calls it: sorted ids with sliced halves, and with an inserted axis.
    both, ids = RNG.standard_normal((9, 128, 64)).astype(np.float32), np.sort(RNG.integers(0, 9, 300)).astype(np.uint32)
    x = RNG.standard_normal((300, 64)).astype(np.float32)
    wanted = np.einsum("ti,toi->to", x, both[ids, :64])
    sliced = mx.array(both)[:, :64].swapaxes(1, 2)
    for what, x_axis, weights in (
        ("sliced experts", mx.array(x.reshape(300, 1, 64)), sliced),
        ("an inserted axis", mx.array(x)[:, None], mx.contiguous(sliced)),
    ):
        found = mx.gather_mm(x_axis, weights, rhs_indices=mx.array(ids), sorted_indices=True)
        error = float(np.abs(np.array(found)[:, 0] - wanted).max())
        print(f"       for the record: MLX's sorted gather_mm with {what} is off by {error:.1e}")
    # argsort and argpartition break ties by array length; sorts of rank 3 may take the wrong rows.
    fused = ops.fused
    for n in (40, 700, 5000):
        scores = (RNG.integers(-3, 3, (3, n)) / 7).astype(np.float32)
        wanted = plain.host(plain.top_rows(scores.copy(), 30))
        for ops.fused in (fused, None):
            found = ops.host(ops.top_rows(ops.array(scores), 30))
            check(np.array_equal(found, wanted), f"ties go to the lowest row of {n}{'' if ops.fused else ', op by op'}")
        ops.fused = fused
    turned = np.ascontiguousarray((RNG.integers(-3, 3, (700, 3)) / 7).astype(np.float32))
    wanted = plain.host(plain.top_rows(np.ascontiguousarray(turned.T), 30))
    check(
        np.array_equal(ops.host(ops.top_rows(ops.array(turned).swapaxes(0, 1), 30)), wanted),
        "a turned view sorts right",
    )
    # f32 norm weights turn bf16 into f32 and back: every product must hand on float32.
    norm = ops.norm(ops.array(np.ones((2, 64), np.float32)), ops.array(np.ones(64, np.float32)), 1e-6)
    check(norm.dtype == mx.float32, "norms stay float32")
    for kind in ("BF16", "F16"):
        halves = ops.linear(mx.ones((8, 64), mx.bfloat16 if kind == "BF16" else mx.float16), norm)
        check(halves.dtype == mx.float32, f"products with {kind} weights hand on float32")
    # TF32 would show as errors near 3e-4 of the result.
    a, b = RNG.standard_normal((256, 512)).astype(np.float32), RNG.standard_normal((512, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b
    error = np.abs(ops.host(ops.array(a) @ ops.array(b)) - exact).max() / np.abs(exact).max()
    check(float(error) < 1e-6, f"float32 products are exact: {error:.1e}")
    for bits in (4, 8):
        codes, scales = RNG.integers(0, 1 << 32, (512, 16 * bits), dtype=np.uint64), np.full((512, 16), 120, np.uint8)
        floats = BlockFloats((codes & 0x3F3F3F3F).astype(np.uint32), scales, bits)
        for n_tokens in (1, 300):
            x = RNG.standard_normal((n_tokens, 512)).astype(np.float32)
            exact = x.astype(np.float64) @ floats.dense().T
            found = ops.host(ops.linear(ops.weight(CompactTensor(floats)), ops.array(x)))
            error = np.abs(found - exact).max() / np.abs(exact).max()
            check(float(error) < 1e-3, f"mxfp{bits} products of {n_tokens} tokens: {error:.1e}")


def main() -> int:
    ops = backend.select("mlx")
    assert isinstance(ops, MlxOps)
    print(f"{ops.name} on {mx.device_info().get('device_name', 'a processor')}, kernels: {ops.fused is not None}")
    for what, work in (
        ("traps", lambda: traps(ops)),
        ("ds4", lambda: ds4_vectors("mlx")),
        ("nano", lambda: nano_against_numpy("mlx")),
    ):
        print(what, flush=True)
        started = time.perf_counter()
        try:
            work()  # type: ignore[no-untyped-call]
        except Exception as error:
            check(False, f"{what}: {type(error).__name__}: {error}")
        print(f"  {time.perf_counter() - started:.1f} s", flush=True)
    check(selfcheck.main(["dsv4-nano", "mlx"]) == 0, "live, restored and forked states are equal bit by bit")
    print("ALL FINE" if not FAILED else f"{len(FAILED)} FAILED: {FAILED}")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
