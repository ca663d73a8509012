# ruff: noqa: D102 - the methods are documented in ops.Ops
"""Ops on MLX arrays: the back end for Metal and CUDA, and for MLX's own CPU device.

MLX is lazy: nothing is computed before `evaluate` or `host`. Results are deterministic for equal shapes on one device.
TF32 products are switched off: they would make a state depend on the card.

Choices that avoid silent traps of MLX 0.32: no gather_mm with sorted indices or inserted axes (wrong rows on CUDA);
selections go through unique 64-bit keys, since argsort and argpartition break ties by array length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# Read by MLX when its CUDA back end starts. Plain launches instead of CUDA graphs: with these a long context
# decodes a third slower (docs/engine-cuda.md).
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")

import mlx.core as mx
import numpy as np

from kvdb_engine import gguf_blocks
from kvdb_engine.gguf_blocks import Blocks, packed_blocks
from kvdb_engine.ops import MASKED, Array, ExpertWeights, Rows, Unfused
from kvdb_engine.ops_mlx_cuda import DeviceTensor, Fused, Kernels, Launcher, Quantised
from kvdb_engine.packing import F32, FP4_BLOCK, FP8_BLOCK
from kvdb_engine.rounding import hadamard
from kvdb_engine.weights import AffineCodes, BlockFloats, Halves, compact

_ROW_CAPACITY_MIN = 64


class MlxOps(Unfused):
    """See ops.Ops."""

    def __init__(self, *, cpu: bool = False, launcher: Launcher | None = None) -> None:
        """cpu: compute on the processor even where a GPU is present.

        launcher: runs the fused kernels; by default there is one on CUDA, and none elsewhere.
        """
        if cpu:
            mx.set_default_device(mx.cpu)
        self.is_gpu = mx.default_device() != mx.cpu
        self.name = "mlx" if self.is_gpu else "mlx-cpu"
        # A GPU multiplies with 16-bit scales and activations at twice the speed or more; a processor only without them.
        # KVDB_MLX_EXACT=1 keeps everything float32, to compare with references: the 16 bits cost about 0.4 %.
        self.halves_scales = (self.is_gpu or launcher is not None) and not os.environ.get("KVDB_MLX_EXACT")
        if self.is_gpu:
            self.prefill_chunk, self.attention_block = 2048, 256
        if launcher is None and self.is_gpu and mx.cuda.is_available():
            launcher = Kernels()
        self.fused = Fused(launcher) if launcher is not None else None
        self.fuses_attention = self.fused is not None
        # Op by op there is less to gain, and MLX would fuse what has to round alike everywhere.
        self.compiles = self.is_gpu and self.fused is not None
        self._hadamards: dict[int, mx.array] = {}

    def array(self, host: Any) -> Array:
        return mx.array(np.ascontiguousarray(host))

    def host(self, array: Array) -> F32:
        # A copy: memory of an MLX array may be reused for a later result.
        return np.array(array.astype(mx.float32), dtype=np.float32)

    def evaluate(self, arrays: Sequence[Array]) -> None:
        mx.eval(list(arrays))

    def weight(self, tensor: Any, exact: bool = False) -> Any:
        if isinstance(tensor, DeviceTensor):
            return tensor.on_device()
        if exact:
            return mx.array(tensor.dense())
        codes, blocks = tensor.affine(), packed_blocks(tensor)
        if codes is not None:
            return self._affine(codes)
        values = None if blocks is not None else compact(tensor)
        if isinstance(values, BlockFloats):
            kind = mx.bfloat16 if self.halves_scales else mx.float32
            stored = (mx.array(values.codes), mx.array(values.scales))
            return Quantised(*stored, None, 32, values.bits, kind, f"mxfp{values.bits}")
        if isinstance(values, Halves) and self.halves_scales:
            return mx.array(values.values).view(mx.bfloat16 if values.kind == "BF16" else mx.float16)
        return mx.array(tensor.dense()) if blocks is None else blocks

    def _affine(self, codes: AffineCodes) -> Quantised:
        scales, biases = mx.array(codes.scales), mx.array(codes.biases)
        if self.halves_scales:
            # As the file has them, if it has 16 bits. Q4_K has products of 16 and 6 bits: the nearest f16 moves a
            # value by less than 1 % of the step between two codes.
            halved = [[part.astype(half) for part in (scales, biases)] for half in (mx.bfloat16, mx.float16)]
            equal = [
                all(
                    mx.array_equal(part.astype(mx.float32), of) for part, of in zip(both, (scales, biases), strict=True)
                )
                for both in halved
            ]
            if any(equal) or all(mx.isfinite(part).all() for part in halved[1]):
                scales, biases = halved[0] if equal[0] else halved[1]
        return Quantised(mx.array(codes.codes), scales, biases, codes.group_size, codes.bits, scales.dtype)

    def expert_weights(self, gate: Any, up: Any, down: Any) -> ExpertWeights:
        return ExpertWeights(self.weight(gate), self.weight(up), self.weight(down))

    def linear(self, weight: Any, x: Array) -> Array:
        done = self.fused_linears((weight,), x)
        return _product(x, weight) if done is None else done[0]

    def grouped_linear(self, weight: Any, x: Array) -> Array:
        done = self.fused.grouped_linear(weight, x) if self.fused else None
        return _product(x.swapaxes(0, 1), weight).swapaxes(0, 1) if done is None else done

    def embed(self, weight: Any, ids: Any) -> Array:
        index = mx.array(ids)
        if isinstance(weight, Quantised):
            biases = None if weight.biases is None else weight.biases[index]
            return mx.dequantize(weight.codes[index], weight.scales[index], biases, **weight.form).astype(mx.float32)
        return weight[index].astype(mx.float32)

    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        return mx.concatenate(list(parts), axis=axis)

    def norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        return mx.fast.rms_norm(x, weight, eps)

    def rotate(self, x: Array, table: tuple[Array, Array], inverse: bool = False) -> Array:
        cos, sin = table
        if inverse:
            sin = -sin
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        first = x.shape[-1] - 2 * cos.shape[-1]
        even, odd = x[..., first::2], x[..., first + 1 :: 2]
        turned = mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return mx.concatenate([x[..., :first], turned.reshape(*x.shape[:-1], -1)], axis=-1)

    def sigmoid(self, x: Array) -> Array:
        return mx.sigmoid(x)

    def softmax(self, x: Array, axis: int) -> Array:
        return mx.softmax(x, axis=axis)

    def maximum(self, x: Array, bound: float) -> Array:
        return mx.maximum(x, bound)

    def keep(self, mask: Array, x: Array) -> Array:
        return mx.where(mask, x, MASKED)

    def arange(self, start: int, stop: int) -> Array:
        return mx.arange(start, stop)

    def round_kv(self, rows: Array, rope_dim: int) -> Array:
        nope = rows.shape[-1] - rope_dim
        if nope % FP8_BLOCK == 0:
            blocks = rows[..., :nope].reshape(*rows.shape[:-1], -1, FP8_BLOCK)
            scale = _block_scale(blocks, 1e-4, 8, 0x600000)
            rounded = mx.from_fp8(mx.to_fp8(blocks / scale), dtype=mx.float32) * scale
            rows = mx.concatenate([rounded.reshape(*rows.shape[:-1], nope), rows[..., nope:]], axis=-1)
        return self.round_f16(rows)

    def round_index(self, x: Array) -> Array:
        width = x.shape[-1]
        if width not in self._hadamards:
            self._hadamards[width] = mx.array(hadamard(width))
        turned = (x.reshape(-1, width) @ self._hadamards[width]) * width**-0.5
        blocks = turned.reshape(-1, width // FP4_BLOCK, FP4_BLOCK)
        scale = _block_scale(blocks, 7.052966e-38, 2, 0x400000)
        return (_nearest_e2m1(blocks / scale) * scale).reshape(x.shape)

    def round_f16(self, x: Array) -> Array:
        return x.astype(mx.float16)

    def widen(self, x: Array) -> Array:
        return x.astype(mx.float32)

    def own(self, x: Array) -> Array:
        return mx.contiguous(x)

    def nbytes(self, x: Array) -> int:
        return int(x.nbytes)

    def sinkhorn(self, matrices: Array, iterations: int, eps: float) -> Array:
        if self.is_gpu:
            return _sinkhorn_kernel(matrices, iterations, eps)
        return self.sinkhorn_ops(matrices, iterations, eps)

    def sinkhorn_ops(self, matrices: Array, iterations: int, eps: float) -> Array:
        """The same in array operations: about 120 of them, each a kernel of its own on a GPU."""
        m = matrices / (matrices.sum(axis=-2, keepdims=True) + eps)
        for _ in range(iterations - 1):
            m = m / (m.sum(axis=-1, keepdims=True) + eps)
            m = m / (m.sum(axis=-2, keepdims=True) + eps)
        return m

    def router_scores(self, logits: Array) -> Array:
        return mx.sqrt(mx.logaddexp(logits, mx.array(0.0)))

    def top_experts(self, scores: Array, count: int) -> Array:
        return _top(scores, count)

    def take_columns(self, x: Array, columns: Array) -> Array:
        return mx.take_along_axis(x, columns, axis=-1)

    def top_rows(self, scores: Array, count: int) -> Array:
        done = self.fused.top_rows(scores, count) if self.fused else None
        return mx.sort(_top(scores, count), axis=-1) if done is None else done

    def gather(self, rows: Array, index: Array) -> Array:
        return rows[index].astype(mx.float32)

    def experts(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        if isinstance(weights.gate, Blocks):
            return gguf_blocks.experts(weights, x, ids, share, lambda gate, up: self.swiglu(gate, up, limit))
        if self.fused:
            done = self.fused.experts(weights.gate, weights.up, weights.down, x, ids, share, limit)
            if done is not None:
                return done
        if x.shape[0] == 1:
            gate, up = _chosen(x, weights.gate, ids[0]), _chosen(x, weights.up, ids[0])
            middle = self.swiglu(gate, up, limit) * share[0][:, None, None]
            return _chosen(middle, weights.down, ids[0]).sum(0)
        return self._experts_in_tiles(weights, x, ids, share, limit)

    def _experts_in_tiles(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        """Many tokens: every expert's rows fill whole tiles, and tiles are multiplied as one batch.

        The number of tiles is the most that any routing can need, so nobody waits for the device to count.
        """
        n_experts, (n_tokens, count) = _n_experts(weights.gate), ids.shape
        n_entries = n_tokens * count
        size = min(64, 1 << (-(-n_entries // n_experts) - 1).bit_length())
        n_tiles = n_entries // size + min(n_experts, n_entries)
        flat = ids.reshape(-1)
        slot = mx.cumsum((flat[None] == mx.arange(n_experts)[:, None]).astype(mx.int32), axis=1)
        last = mx.cumsum((slot[:, -1] + (size - 1)) // size)  # of each expert's tiles, one past
        first = mx.concatenate([mx.zeros(1, mx.int32), last[:-1]])
        place = first[flat] * size + (mx.take_along_axis(slot, flat[None], axis=0)[0] - 1)
        owner = mx.minimum((last[None] <= mx.arange(n_tiles)[:, None]).sum(1), n_experts - 1)
        source = mx.zeros(n_tiles * size, mx.int32)
        source[place] = mx.arange(n_entries, dtype=mx.int32) // count
        shares = mx.zeros(n_tiles * size)
        shares[place] = share.reshape(-1)
        rows = x[source].reshape(n_tiles, size, -1)
        middle = self.swiglu(_chosen(rows, weights.gate, owner), _chosen(rows, weights.up, owner), limit)
        middle = middle * shares.reshape(n_tiles, size, 1)
        out = _chosen(middle, weights.down, owner).reshape(n_tiles * size, -1)
        return out[place].reshape(n_tokens, count, -1).sum(1)

    def swiglu(self, gate: Array, up: Array, limit: float) -> Array:
        done = self.fused.swiglu(gate, up, limit) if self.fused else None
        if done is not None:
            return done
        gate = mx.minimum(gate, limit)
        return gate * mx.sigmoid(gate) * mx.clip(up, -limit, limit)

    def no_rows(self, width: int, half: bool) -> Rows:
        return Rows(mx.zeros((0, width), mx.float16 if half else mx.float32), 0)

    def append(self, rows: Rows, new: Array) -> Rows:
        buffer, wanted = rows.buffer, rows.n_rows + new.shape[0]
        capacity = _capacity(wanted)
        if capacity != buffer.shape[0]:
            # The capacity follows from the number of rows alone, so a restored run looks like one that grew.
            missing = mx.zeros((capacity - rows.n_rows, new.shape[1]), buffer.dtype)
            buffer = mx.concatenate([buffer[: rows.n_rows], missing], axis=0)
        # In place when nobody else holds the buffer, else a copy: MLX decides by reference count.
        start = mx.array([rows.n_rows], dtype=mx.int32)
        return Rows(mx.slice_update(buffer, new.astype(buffer.dtype), start, axes=(0,)), wanted)

    def view(self, rows: Rows) -> Array:
        return rows.buffer[: rows.n_rows]

    def row_bytes(self, rows: Rows) -> int:
        return int(rows.buffer.nbytes)

    def start(self, arrays: Sequence[Array]) -> None:
        if self.is_gpu:
            mx.async_eval(list(arrays))  # type: ignore[no-untyped-call]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return mx.compile(function) if self.compiles else function

    def fused_linears(self, weights: Sequence[Any], x: Array) -> tuple[Array, ...] | None:
        return self.fused.linears(weights, x) if self.fused else None

    def fused_split(
        self, weights: Any, streams: Array, norm: Array, iterations: int, hc_eps: float, norm_eps: float
    ) -> tuple[Array, Array, Array] | None:
        if not self.fused or streams.shape[1] != 4:
            return None
        mixes = self.fused.mix(weights.fn, streams, norm_eps)
        if mixes is None:
            mixes = self.linear(weights.fn, self.norm(streams.reshape(streams.shape[0], -1), None, norm_eps))
        return self.fused.split(mixes, streams, weights.scale, weights.base, norm, iterations, hc_eps, norm_eps)

    def fused_join(self, streams: Array, outputs: Sequence[Array], post: Array, comb: Array) -> Array | None:
        return self.fused.join(streams, outputs, post, comb) if self.fused else None

    def fused_rows(
        self,
        x: Array,
        table: tuple[Array, Array],
        *,
        older: Array | None = None,
        norm: bool = False,
        weight: Array | None = None,
        eps: float = 0.0,
        scale: float = 1.0,
        kv: bool = False,
        index: bool = False,
        half: bool = False,
        inverse: bool = False,
    ) -> Array | None:
        if not self.fused:
            return None
        return self.fused.rows(
            x,
            table,
            older,
            norm=norm,
            weight=weight,
            eps=eps,
            scale=scale,
            kv=kv,
            index=index,
            half=half,
            inverse=inverse,
        )

    def fused_frontier(
        self, open_kv: Array, open_score: Array, kv: Array, gate: Array, ape: Array, slot: int
    ) -> tuple[Array, Array] | None:
        return self.fused.frontier(open_kv, open_score, kv, gate, ape, slot) if self.fused else None

    def fused_pool(
        self, previous: tuple[Array, Array] | None, kv: Array, score: Array, width: int, ratio: int
    ) -> Array | None:
        return self.fused.pool(previous, kv, score, width, ratio) if self.fused else None

    def fused_scores(self, queries: Array, share: Array, rows: Array) -> Array | None:
        return self.fused.index_scores(queries, share, rows) if self.fused else None

    def fused_attend(
        self,
        queries: Array,
        near: Array,
        far: Array | None,
        picked: Array | None,
        sinks: Array,
        table: tuple[Array, Array],
    ) -> Array | None:
        return self.fused.attend(queries, near, far, picked, sinks, table) if self.fused else None

    def fused_route(
        self, logits: Array, bias: Array | None, given: Array | None, count: int, floor: float, scale: float
    ) -> tuple[Array, Array] | None:
        return self.fused.route(logits, bias, given, count, floor, scale) if self.fused else None


# One thread normalises one matrix. The thread's number is written in each language's way in front of it.
_SINKHORN = """
    if (thread >= (unsigned int) size[0]) return;
    float m[N * N];
    for (int k = 0; k < N * N; k++) m[k] = matrices[thread * N * N + k];
    for (int turn = 0; turn < 2 * ITERATIONS - 1; turn++) {
        const bool rows = turn % 2 == 1;
        for (int a = 0; a < N; a++) {
            float sum = 0.0f;
            for (int b = 0; b < N; b++) sum += rows ? m[a * N + b] : m[b * N + a];
            const float divisor = sum + eps[0];
            for (int b = 0; b < N; b++) {
                const int k = rows ? a * N + b : b * N + a;
                m[k] = m[k] / divisor;
            }
        }
    }
    for (int k = 0; k < N * N; k++) out[thread * N * N + k] = m[k];
"""
_kernels: dict[str, Any] = {}


def _sinkhorn_kernel(matrices: Array, iterations: int, eps: float) -> Array:
    """Ops.sinkhorn as one kernel; needs Metal or CUDA."""
    if "sinkhorn" not in _kernels:
        names: dict[str, Any] = {"input_names": ["matrices", "size", "eps"], "output_names": ["out"]}
        if mx.metal.is_available():
            source = "const uint thread = thread_position_in_grid.x;" + _SINKHORN
            _kernels["sinkhorn"] = mx.fast.metal_kernel(name="hyper_sinkhorn", source=source, **names)
        else:
            source = "const unsigned int thread = cooperative_groups::this_grid().thread_rank();" + _SINKHORN
            _kernels["sinkhorn"] = mx.fast.cuda_kernel(name="hyper_sinkhorn", source=source, **names)
    n_matrices, n, _ = matrices.shape
    (out,) = _kernels["sinkhorn"](
        inputs=[matrices, mx.array([n_matrices], dtype=mx.int32), mx.array([eps], dtype=mx.float32)],
        template=[("N", n), ("ITERATIONS", iterations)],
        grid=(n_matrices, 1, 1),
        threadgroup=(min(n_matrices, 128), 1, 1),
        output_shapes=[matrices.shape],
        output_dtypes=[mx.float32],
    )
    return out


def _product(x: Array, weight: Any) -> Array:
    """x @ weight transposed; both may have leading axes. float32, whatever it is computed in."""
    if isinstance(weight, Quantised):
        parts = (weight.codes, weight.scales, weight.biases)
        # Of another type than the scales, x would turn all scales into its own type at every call.
        found = mx.quantized_matmul(x.astype(weight.kind), *parts, transpose=True, **weight.form)
        return found.astype(mx.float32)
    return (x.astype(weight.dtype) @ weight.swapaxes(-1, -2)).astype(mx.float32)


def _chosen(x: Array, weight: Any, ids: Array) -> Array:
    """x with each of the chosen experts: (1, in) or (k, rows, in) -> (k, rows, out)."""
    if isinstance(weight, Quantised):
        rows = x if x.ndim == 3 else mx.broadcast_to(x[None], (ids.shape[0], *x.shape))
        parts = (weight.codes, weight.scales, weight.biases)
        left = mx.arange(ids.shape[0], dtype=mx.uint32)
        found = mx.gather_qmm(
            rows.astype(weight.kind), *parts, left, ids.astype(mx.uint32), transpose=True, **weight.form
        )
        return found.astype(mx.float32)
    return (x.astype(weight.dtype) @ weight[ids].swapaxes(1, 2)).astype(mx.float32)


def _n_experts(weight: Any) -> int:
    return int((weight.codes if isinstance(weight, Quantised) else weight).shape[0])


def _capacity(n_rows: int) -> int:
    """n_rows rounded up to three significant bits: at most a quarter more."""
    if n_rows <= _ROW_CAPACITY_MIN:
        return _ROW_CAPACITY_MIN
    step = 1 << (n_rows.bit_length() - 3)
    return -(-n_rows // step) * step


def _block_scale(blocks: Array, floor: float, shift: int, limit: int) -> Array:
    """packing.block_exponents as powers of two, for (..., n_blocks, block) values; keeps the last axis."""
    bits = mx.maximum(mx.abs(blocks).max(axis=-1, keepdims=True), floor).view(mx.int32)
    exponent = (bits >> 23) - shift + ((bits & 0x7FFFFF) > limit).astype(mx.int32)
    return (exponent << 23).view(mx.float32)


def _nearest_e2m1(values: Array) -> Array:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign; ties to the even code. Comparisons only: safe under fast-math."""
    magnitude = mx.abs(values)
    steps = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))
    gains = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0)
    out = mx.zeros_like(magnitude)
    for (border, even_below), gain in zip(steps, gains, strict=True):
        over = magnitude > border if even_below else magnitude >= border
        out = out + over.astype(mx.float32) * gain
    return mx.where(values.view(mx.int32) < 0, -out, out)


def _top(scores: Array, count: int) -> Array:
    """(T, count) columns of the largest scores, the best first; ties to the lower column.

    Keys are unique: the float's bits, made to sort as integers, above the negated column.
    """
    bits = (scores + 0.0).view(mx.int32).astype(mx.int64)
    rising = mx.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    column = mx.arange(scores.shape[-1], dtype=mx.int64)
    keys = column - (rising << 32)  # the smallest key is the best
    best = mx.sort(keys, axis=-1)[..., :count]
    return (best & 0xFFFFFFFF).astype(mx.int32)
