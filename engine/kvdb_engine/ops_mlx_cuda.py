"""Fused CUDA kernels for the MLX back end: compiled once per process, launched as MLX operations.

Knows the kernels' parameters and limits (ops_mlx_kernels.cu draws them); which composition a kernel replaces is the
caller's business. Every method that finds a shape or a weight outside its kernel's limits returns None, and the caller
computes op by op.

The source needs no headers. Each kernel is compiled alone, all of them at once in threads: MLX copies and hashes the
binary it is given at every launch, so it had better be small.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from kvdb_engine.errors import ModelError

_KERNEL = re.compile(r"^KERNEL (kvdb_\w+)\(.*?^}\n", re.M | re.S)
SOURCE = Path(__file__).with_name("ops_mlx_kernels.cu")
TILE = 64  # rows per tile of the expert kernels, as in the source
_ROWS_NORM, _ROWS_WEIGHT, _ROWS_KV, _ROWS_INDEX, _ROWS_HALF, _ROWS_INVERSE = 1, 2, 4, 8, 16, 32
_SHARED_BYTES_MAX = 160 << 10

Array = Any
Shapes = Sequence[tuple[tuple[int, ...], Any]]


@dataclass(frozen=True, slots=True)
class Quantised:
    """weights.AffineCodes or BlockFloats on the device: a matrix, or a stack of them.

    kind: what products take and give: bf16, f16 or float32; with affine codes the type of the scales. mode: affine,
    mxfp4 or mxfp8; only affine codes have biases.
    """

    codes: Array
    scales: Array
    biases: Array | None
    group_size: int
    bits: int
    kind: Any
    mode: str = "affine"

    @property
    def form(self) -> dict[str, Any]:
        """How MLX's own operations are told to read it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def is_half(self) -> bool:
        """Whether products have 16 bits, and affine scales and biases too."""
        return self.kind in (mx.bfloat16, mx.float16)

    @property
    def inputs(self) -> list[Array]:
        """What a kernel is given: codes, scales, and biases (anything where there are none)."""
        return [self.codes, self.scales, self.scales if self.biases is None else self.biases]

    @property
    def expert_codes(self) -> int:
        """CODES_ of the expert kernels; -1 if they cannot read it."""
        known = {(2, "affine"): 0, (4, "affine"): 1, (4, "mxfp4"): 2}
        return known.get((self.bits, self.mode), -1) if self.is_half else -1

    @property
    def halves(self) -> int:
        """The kernels' flag: 1 for f16 scales."""
        return int(self.kind == mx.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., out, in)."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 32 // self.bits)


@runtime_checkable
class DeviceTensor(Protocol):
    """A weights.Tensor that is made on the device and never passes through the host."""

    def on_device(self) -> Any:
        """An MLX array, or Quantised."""


class Launcher(Protocol):
    """Runs a kernel by name."""

    def launch(
        self,
        name: str,
        inputs: Sequence[Array],
        outputs: Shapes,
        scalars: Sequence[int | float],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> list[Array]:
        """grid: blocks. outputs: (shape, dtype) of each. scalars: int or float exactly as the kernel declares."""


class Kernels:
    """The kernels on the default CUDA device. Raises ModelError when they cannot be compiled."""

    def __init__(self) -> None:
        architecture = str(mx.device_info()["architecture"])
        sources = kernel_sources(SOURCE.read_text(encoding="utf-8"))
        with ThreadPoolExecutor() as pool:
            binaries = pool.map(lambda source: compile_source(source.encode(), architecture), sources.values())
            self._binaries = dict(zip(sources, binaries, strict=True))

    def launch(
        self,
        name: str,
        inputs: Sequence[Array],
        outputs: Shapes,
        scalars: Sequence[int | float],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
    ) -> list[Array]:
        """See Launcher."""
        return mx.fast.precompiled_cuda_kernel(
            name=name,
            compiled_source=self._binaries[name],
            inputs=inputs,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            # The binding takes a float only if float32 holds it exactly.
            scalars=[float(np.float32(n)) if isinstance(n, float) else n for n in scalars],
            grid=(grid[0] * threads, grid[1], 1),
            threadgroup=(threads, 1, 1),
            shared_memory=shared_bytes,
            ensure_row_contiguous=True,
        )


def kernel_sources(text: str) -> dict[str, str]:
    """The source of each kernel, with all that is not a kernel."""
    kernels = {found.group(1): found.group(0) for found in _KERNEL.finditer(text)}
    common = _KERNEL.split(text)[::2]
    return {name: "".join(common) + kernel for name, kernel in kernels.items()}


def compile_source(source: bytes, architecture: str) -> bytes:
    """A cubin of CUDA source without headers. architecture: such as sm_90. Raises ModelError with NVRTC's log."""
    library = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"kvdb.cu", 0, None, None)
    # No contraction of products and sums but where the source says fmaf: as in the op-level forms.
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--fmad=false")
    failed = library.nvrtcCompileProgram(program, len(options), options)
    size_of, read = (
        (library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
        if failed
        else (library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    )
    size_of(program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    read(program, found)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise ModelError(f"CUDA kernels do not compile: {found.value.decode(errors='replace')}")
    return found.raw


def _nvrtc() -> ctypes.CDLL:
    # MLX links NVRTC, so it is in the process already, and opening it by name finds that copy.
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ()) if spec] if spec else []
    for version in (13, 12):
        name = f"libnvrtc.so.{version}"
        for path in (name, *(str(found) for folder in folders for found in folder.glob(f"**/{name}"))):
            try:
                library = ctypes.CDLL(path)
            except OSError:
                continue
            # It opens its headers by name when it compiles; they may lie beside it, outside the loader's path.
            for found in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
                ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
            return library
    raise ModelError("libnvrtc is missing: pip install 'kvdb[cuda]'")


def _like(one: Any, two: Any) -> bool:
    return bool(one.form == two.form and one.kind == two.kind)


def _is_bf16(weight: Any) -> bool:
    return not isinstance(weight, Quantised) and weight.dtype == mx.bfloat16


def _is_8_bit(weight: Any) -> bool:
    return isinstance(weight, Quantised) and weight.bits == 8 and weight.is_half


def _is_f32(*arrays: Any) -> bool:
    return all(not isinstance(array, Quantised) and array.dtype == mx.float32 for array in arrays)


def _is_f16(*arrays: Any) -> bool:
    return all(array.dtype == mx.float16 for array in arrays)


class Fused:
    """The kernels as functions of MLX arrays."""

    def __init__(self, launcher: Launcher) -> None:
        self._launch = launcher.launch

    def linears(self, weights: Sequence[Any], x: Array) -> tuple[Array, ...] | None:
        """x @ weight.T for one token and several weights. x: (1, in). One launch."""
        inner = x.shape[-1]
        if x.shape[0] != 1 or inner % 512 or any(w.shape[-2] % 8 or w.shape[-1] != inner for w in weights):
            return None
        sizes = [w.shape[-2] for w in weights]
        shapes = [((1, size), mx.float32) for size in sizes]
        if all(_is_8_bit(w) and _like(w, weights[0]) for w in weights):
            if len(weights) > 2:
                return None
            return tuple(self._gemv_q8(weights, x, shapes, inner, max(sizes)))
        if all(map(_is_bf16, weights)) and len(weights) <= 5:
            missing = 5 - len(weights)
            found = self._launch(
                "kvdb_gemv_bf16",
                [x, *weights, *[weights[0]] * missing],
                [*shapes, *[((1, 1), mx.float32)] * missing],
                [inner, *sizes[:4], *[0] * (4 - len(sizes))],
                (sum(sizes) // 8, 1),
                128,
                4 * inner,
            )
            return tuple(found[: len(weights)])
        return None

    def _gemv_q8(self, weights: Sequence[Quantised], x: Array, shapes: Shapes, inner: int, per_x: int) -> list[Array]:
        one, two = weights[0], weights[-1]
        n0, n1 = one.shape[-2], two.shape[-2] if len(weights) == 2 else 0
        if one.codes.ndim == 3:
            n0 *= one.codes.shape[0]
        return self._launch(
            "kvdb_gemv_q8",
            [x, *one.inputs, *two.inputs],
            [*shapes, *[((1, 1), mx.float32)] * (2 - len(weights))],
            [inner, one.group_size, n0, n1, per_x, one.halves, int(one.mode == "mxfp8")],
            ((n0 + n1) // 8, 1),
            128,
            4 * inner,
        )[: len(weights)]

    def grouped_linear(self, weight: Any, x: Array) -> Array | None:
        """Block-diagonal product of one token. x: (1, G, in); weight: (G, out, in)."""
        if not _is_8_bit(weight) or x.shape[0] != 1:
            return None
        groups, out, inner = weight.shape
        if inner % 512 or out % 8:
            return None
        return self._gemv_q8([weight], x, [((1, groups, out), mx.float32)], inner, out)[0]

    def swiglu(self, gate: Array, up: Array, limit: float) -> Array | None:
        """The gated unit, value by value."""
        if not _is_f32(gate, up):
            return None
        return self._launch(
            "kvdb_swiglu",
            [gate, up],
            [(gate.shape, mx.float32)],
            [gate.size, float(limit)],
            (-(-gate.size // 256), 1),
            256,
        )[0]

    def mix(self, fn: Any, streams: Array, eps: float) -> Array | None:
        """fn applied to the normalised streams of one token."""
        if streams.shape[0] != 1 or not _is_f32(fn, streams) or fn.shape[1] % 4:
            return None
        outputs, inner = fn.shape
        return self._launch(
            "kvdb_hc_mix",
            [streams, fn],
            [((1, outputs), mx.float32)],
            [inner, float(eps)],
            (outputs, 1),
            512,
        )[0]

    def split(
        self,
        mixes: Array,
        streams: Array,
        scale: Sequence[float],
        base: Array,
        norm: Array,
        iterations: int,
        hc_eps: float,
        norm_eps: float,
    ) -> tuple[Array, Array, Array] | None:
        """The sub-layer's normalised input, post and comb, from the mixes."""
        n_tokens, n, dim = streams.shape
        if n != 4 or not _is_f32(mixes, streams, base, norm):
            return None
        x, post, comb = self._launch(
            "kvdb_hc_split",
            [mixes, streams, base, norm],
            [((n_tokens, dim), mx.float32), ((n_tokens, 4), mx.float32), ((n_tokens, 4, 4), mx.float32)],
            [dim, *map(float, scale), float(hc_eps), float(norm_eps), iterations],
            (n_tokens, 1),
            1024 if n_tokens == 1 and dim >= 1024 else 256,
        )
        return x, post, comb

    def join(self, streams: Array, outputs: Sequence[Array], post: Array, comb: Array) -> Array | None:
        """The streams after a sub-layer whose output is the sum of one or two arrays."""
        n_tokens, n, dim = streams.shape
        if n != 4 or len(outputs) > 2 or not _is_f32(streams, *outputs, post, comb):
            return None
        return self._launch(
            "kvdb_hc_join",
            [streams, outputs[0], outputs[-1], post, comb],
            [(streams.shape, mx.float32)],
            [dim, int(len(outputs) == 2)],
            (-(-dim // 256), n_tokens),
            256,
        )[0]

    def rows(
        self,
        x: Array,
        table: tuple[Array, Array],
        older: Array | None,
        *,
        norm: bool,
        weight: Array | None,
        eps: float,
        scale: float,
        kv: bool,
        index: bool,
        half: bool,
        inverse: bool = False,
    ) -> Array | None:
        """Rows normalised, turned, scaled, rounded, after the older ones. x: (T, D) or (T, H, D). f16 if rounded."""
        dim, pairs = x.shape[-1], table[0].shape[-1]
        threads = -(-dim // 32) * 32
        if not _is_f32(x) or threads > 1024 or dim % 2 or (index and (dim & (dim - 1) or dim < 32)) or not x.size:
            return None
        heads = x.shape[1] if x.ndim == 3 else 1
        n_older = 0 if older is None else older.shape[0]
        kind = mx.float16 if kv or half else mx.float32
        if older is not None and older.dtype != kind:
            return None
        flags = _ROWS_NORM * norm | _ROWS_WEIGHT * (weight is not None) | _ROWS_KV * kv | _ROWS_INDEX * index
        flags |= _ROWS_HALF * half | _ROWS_INVERSE * inverse
        shape = x.shape if x.ndim == 3 else (n_older + x.shape[0], dim)
        return self._launch(
            "kvdb_rows",
            [older if n_older else x, x, x if weight is None else weight, *table],
            [(shape, kind)],
            [n_older, dim, heads, pairs, float(eps), float(scale), flags],
            (n_older + x.size // dim, 1),
            threads,
        )[0]

    def frontier(
        self, open_kv: Array, open_score: Array, kv: Array, gate: Array, ape: Array, slot: int
    ) -> tuple[Array, Array] | None:
        """The open group with one more row."""
        if kv.shape[0] != 1 or not _is_f32(open_kv, open_score, kv, gate, ape):
            return None
        n_open, columns = open_kv.shape
        shape = ((n_open + 1, columns), mx.float32)
        new_kv, new_score = self._launch(
            "kvdb_frontier",
            [open_kv if n_open else kv, open_score if n_open else gate, kv, gate, ape],
            [shape, shape],
            [n_open, columns, slot],
            (-(-(n_open + 1) * columns // 256), 1),
            256,
        )
        return new_kv, new_score

    def pool(
        self, previous: tuple[Array, Array] | None, kv: Array, score: Array, width: int, ratio: int
    ) -> Array | None:
        """One group pooled: (1, width). kv, score: the closed group; previous: the one before, where groups overlap."""
        if kv.shape[0] != ratio or not _is_f32(kv, score):
            return None
        overlap = kv.shape[1] != width
        return self._launch(
            "kvdb_pool",
            [*(previous or (kv, score)), kv, score],
            [((1, width), mx.float32)],
            [width, ratio, int(overlap), int(previous is not None)],
            (-(-width // 64), 1),
            64,
        )[0]

    def index_scores(self, queries: Array, share: Array, rows: Array) -> Array | None:
        """The indexer's scores of all rows for one token: (1, n)."""
        n_tokens, heads, dim = queries.shape
        if n_tokens != 1 or dim % 4 or dim > 128 or not _is_f32(queries, share) or not _is_f16(rows):
            return None
        n = rows.shape[0]
        return self._launch(
            "kvdb_index_scores",
            [queries, share, rows],
            [((1, n), mx.float32)],
            [n, heads, dim],
            (-(-n // 64), 1),
            64,
            4 * heads * dim,
        )[0]

    def top_rows(self, scores: Array, count: int) -> Array | None:
        """Column numbers of the largest scores, ascending."""
        n_tokens, n = scores.shape
        if not _is_f32(scores) or n < count:
            return None
        return self._launch(
            "kvdb_top_rows", [scores], [((n_tokens, count), mx.int32)], [n, count], (n_tokens, 1), 1024
        )[0]

    def route(
        self, logits: Array, bias: Array | None, given: Array | None, count: int, floor: float, scale: float
    ) -> tuple[Array, Array] | None:
        """Expert ids and shares, (T, count) each."""
        n_tokens, n_experts = logits.shape
        if count > 32 or n_experts > 4096 or not _is_f32(logits):
            return None
        ids, share = self._launch(
            "kvdb_route",
            [logits, logits if bias is None else bias, logits if given is None else given],
            [((n_tokens, count), mx.int32), ((n_tokens, count), mx.float32)],
            [n_experts, count, int(bias is not None), int(given is not None), float(floor), float(scale)],
            (n_tokens, 1),
            32,
            8 * n_experts,
        )
        return ids, share

    def experts(self, gate: Any, up: Any, down: Any, x: Array, ids: Array, share: Array, limit: float) -> Array | None:
        """Routed experts of 2 or 4 bits. x: (T, D) f32; ids, share: (T, k)."""
        weights = (gate, up, down)
        if not all(isinstance(w, Quantised) and w.expert_codes >= 0 for w in weights) or not _like(gate, up):
            return None
        if x.shape[0] == 1:
            return self._experts_of_one(gate, up, down, x, ids, share, limit)
        return self._experts_of_many(gate, up, down, x, ids, share, limit)

    def _experts_of_one(
        self, gate: Quantised, up: Quantised, down: Quantised, x: Array, ids: Array, share: Array, limit: float
    ) -> Array | None:
        _, width, inner = gate.shape
        count = ids.shape[1]
        if inner % 512 or width % 512 or inner % 32 or 4 * count * width > _SHARED_BYTES_MAX:
            return None
        middle = self._launch(
            "kvdb_experts_up",
            [x, ids, share, *gate.inputs, *up.inputs],
            [((count, width), mx.float32)],
            [inner, width, gate.group_size, float(limit), gate.halves, gate.expert_codes],
            (width // 16, count),
            256,
            4 * inner,
        )[0]
        return self._launch(
            "kvdb_experts_down",
            [middle, ids, *down.inputs],
            [((1, inner), mx.float32)],
            [inner, width, down.group_size, count, down.halves, down.expert_codes],
            (inner // 32, 1),
            512,
            4 * count * width,
        )[0]

    def _experts_of_many(
        self, gate: Quantised, up: Quantised, down: Quantised, x: Array, ids: Array, share: Array, limit: float
    ) -> Array | None:
        n_experts, width, inner = gate.shape
        n_tokens, count = ids.shape
        if inner % 128 or width % 64:
            return None
        n_entries = n_tokens * count
        # Whole tiles for every expert: never more than this, whatever the routing.
        n_tiles = n_entries // TILE + min(n_experts, n_entries)
        tiles, entries = self._launch(
            "kvdb_experts_plan",
            [ids],
            [((n_tiles,), mx.int32), ((n_tiles, TILE), mx.int32)],
            [n_entries, n_experts, n_tiles],
            (n_experts, 1),
            256,
            4 * n_experts,
        )
        plan = [tiles, entries]
        middle = self._launch(
            "kvdb_experts_up_tiles",
            [x.astype(mx.bfloat16), *plan, share, *gate.inputs, *up.inputs],
            [((n_tiles * TILE, width), mx.bfloat16)],
            [inner, width, gate.group_size, count, float(limit), gate.halves, gate.expert_codes],
            (width // 64, n_tiles),
            256,
        )[0]
        out = self._launch(
            "kvdb_experts_down_tiles",
            [middle, *plan, *down.inputs],
            [((n_tokens, count, inner), mx.float32)],
            [inner, width, down.group_size, down.halves, down.expert_codes],
            (inner // 128, n_tiles),
            256,
        )[0]
        return out.sum(1)

    def attend(
        self,
        queries: Array,
        near: Array,
        far: Array | None,
        picked: Array | None,
        sinks: Array,
        table: tuple[Array, Array],
    ) -> Array | None:
        """Attention of one token, turned back. queries: (1, H, D) with RoPE and scale; near, far: (n, D) f16."""
        _, heads, dim = queries.shape
        rows = [near] if far is None else [near, far]
        if dim % 128 or dim > 512 or not _is_f32(queries, sinks) or not _is_f16(*rows):
            return None
        n_far = 0 if far is None else (far.shape[0] if picked is None else picked.shape[-1])
        return self._launch(
            "kvdb_attend",
            [queries, near, far if n_far else near, picked if picked is not None and n_far else near, sinks, *table],
            [((1, heads, dim), mx.float32)],
            [dim, near.shape[0], n_far, int(picked is not None), table[0].shape[-1]],
            (heads, 1),
            512,
            4 * 16 * dim,
        )[0]
