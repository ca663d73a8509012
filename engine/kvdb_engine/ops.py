"""Ops: the array operations the model is written in, once, for every back end.

The model's files (hyper, compressor, indexer, attention, moe, model) say what is computed; an `Ops` says how. There are
two: `ops_numpy` (processors; numpy brings a fast BLAS and costs about 1 us an operation) and `ops_mlx` (Metal, CUDA,
and MLX's own CPU device). Arrays of both understand indexing, arithmetic, `@`, `reshape`, `swapaxes` and `sum`; what
they do not share is here.

Invariant of every implementation: the shapes, and therefore the bits, of a result follow from the arguments alone. No
choice may depend on how an argument came to be (computed, restored, forked).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from kvdb_engine.packing import F32

# numpy.ndarray or mlx.core.array. The two share no base class, and a union would forbid every operator to the type
# checker, so this is the one place where Any crosses a module border.
Array: TypeAlias = Any

# What a masked score is set to: finite, as in ds4's files, so that no arithmetic on it makes a NaN.
MASKED = -1.0e30

# Queries that attend at once where nothing else is known to be better: a longer block computes more scores in vain.
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """An append-only run of rows of one width, shared by forks. `buffer` belongs to the Ops that made it.

    Rows that were rounded to f16 are kept as f16, which loses nothing (docs/decisions/half-rows.md).
    """

    buffer: Any
    n_rows: int


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Routed experts of one layer, stacked.

    gate_up: (n_experts, 2 * width, hidden), gate first; down: (n, hidden, width).
    """

    gate: Any
    up: Any
    down: Any


class Unfused(Protocol):
    """Steps that a back end may compute at once (ops_mlx_cuda). None means: not here, compute op by op.

    The caller's own composition says what each step is; whether it is fused may depend on shapes and weights only.
    """

    attention_block: int = BLOCK
    prefill_chunk: int = 256  # long enough for full speed, short enough that who cancels waits little
    fuses_attention: bool = False  # whether fused_attend can be asked at all

    compiles: bool = False  # whether `compile` gives more than the function itself

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose arguments and results are arrays in tuples: described once per shape, then replayed."""
        return function

    def fused_linears(self, weights: Sequence[Any], x: Array) -> tuple[Array, ...] | None:
        """`linear` of several weights and one x."""
        return None

    def fused_split(
        self, weights: Any, streams: Array, norm: Array, iterations: int, hc_eps: float, norm_eps: float
    ) -> tuple[Array, Array, Array] | None:
        """hyper.split_streams, its first result normalised."""
        return None

    def fused_join(self, streams: Array, outputs: Sequence[Array], post: Array, comb: Array) -> Array | None:
        """hyper.join_streams of the sum of one or two outputs."""
        return None

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
        """norm (if asked), rotate, times scale, then round_kv (kv), round_index (index), round_f16 (half, with index).

        f16 with kv or half, else f32. older: rows that come before the result as they are.
        """
        return None

    def fused_frontier(
        self, open_kv: Array, open_score: Array, kv: Array, gate: Array, ape: Array, slot: int
    ) -> tuple[Array, Array] | None:
        """A compressor's open group with one more token: kv, and gate + ape[slot]."""
        return None

    def fused_pool(
        self, previous: tuple[Array, Array] | None, kv: Array, score: Array, width: int, ratio: int
    ) -> Array | None:
        """One finished group of a compressor, pooled: (1, width)."""
        return None

    def fused_scores(self, queries: Array, share: Array, rows: Array) -> Array | None:
        """The indexer's scores of all rows, (T, n_rows): sum over heads of share * max(0, query . row)."""
        return None

    def fused_attend(
        self,
        queries: Array,
        near: Array,
        far: Array | None,
        picked: Array | None,
        sinks: Array,
        table: tuple[Array, Array],
    ) -> Array | None:
        """Attention of one token over window rows, compressed rows (or the picked ones) and the sink, turned back."""
        return None

    def fused_route(
        self, logits: Array, bias: Array | None, given: Array | None, count: int, floor: float, scale: float
    ) -> tuple[Array, Array] | None:
        """Experts (the best by score + bias, or the given ones) and their shares."""
        return None

    def start(self, arrays: Sequence[Array]) -> None:
        """Begin to compute these, if the back end can do so while the caller goes on."""
        return None


class Ops(Unfused, Protocol):
    """Array operations of one back end. Shapes: T tokens, D values; f32 unless said otherwise."""

    name: str

    def array(self, host: Any) -> Array:
        """A host array (numpy) as an array of this back end; copied."""

    def host(self, array: Array) -> F32:
        """The values as a numpy float32 array; waits for the computation."""

    def evaluate(self, arrays: Sequence[Array]) -> None:
        """Wait until these are computed."""

    def weight(self, tensor: Any, exact: bool = False) -> Any:
        """A loaded matrix (weights.Tensor) in the form `linear` wants. exact: in float32, whatever the others are."""

    def expert_weights(self, gate: Any, up: Any, down: Any) -> ExpertWeights:
        """Stacked expert tensors in the form `experts` wants."""

    def linear(self, weight: Any, x: Array) -> Array:
        """x @ weight.T. x: (T, in), weight: (out, in)."""

    def grouped_linear(self, weight: Any, x: Array) -> Array:
        """Block-diagonal product. x: (T, G, in), weight: (G, out, in). Returns (T, G, out)."""

    def embed(self, weight: Any, ids: Any) -> Array:
        """Rows of the embedding as f32. ids: (T,) numpy ints."""

    def concatenate(self, parts: Sequence[Array], axis: int) -> Array:
        """Join along an axis."""

    def norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight along the last axis."""

    def rotate(self, x: Array, table: tuple[Array, Array], inverse: bool = False) -> Array:
        """RoPE on the last values of x: (T, ..., D); table: cos and sin, each (T, pairs); pairs are adjacent values."""

    def sigmoid(self, x: Array) -> Array:
        """Logistic function."""

    def softmax(self, x: Array, axis: int) -> Array:
        """Softmax along an axis, maximum subtracted."""

    def maximum(self, x: Array, bound: float) -> Array:
        """Elementwise maximum with a number."""

    def keep(self, mask: Array, x: Array) -> Array:
        """x where mask holds, MASKED elsewhere. mask broadcasts against x; x may be overwritten."""

    def arange(self, start: int, stop: int) -> Array:
        """Whole numbers from start to stop."""

    def round_kv(self, rows: Array, rope_dim: int) -> Array:
        """KV rows as they are kept (rounding.py): f16."""

    def round_index(self, x: Array) -> Array:
        """Hadamard and FP4 along the last axis (rounding.py)."""

    def round_f16(self, x: Array) -> Array:
        """To f16."""

    def widen(self, x: Array) -> Array:
        """f16 as f32, exactly; f32 as it is."""

    def own(self, x: Array) -> Array:
        """x in memory of its own: a slice would keep the whole array alive that it was cut from."""

    def nbytes(self, x: Array) -> int:
        """Bytes of memory that an array takes."""

    def sinkhorn(self, matrices: Array, iterations: int, eps: float) -> Array:
        """Normalise (T, n, n) matrices: columns, then iterations - 1 times rows and columns."""

    def router_scores(self, logits: Array) -> Array:
        """sqrt(softplus(x))."""

    def top_experts(self, scores: Array, count: int) -> Array:
        """(T, count) ids of the largest scores of (T, E); ties go to the lower id."""

    def take_columns(self, x: Array, columns: Array) -> Array:
        """x[t, columns[t, j]] for (T, E) and (T, k)."""

    def top_rows(self, scores: Array, count: int) -> Array:
        """(T, count) row numbers, ascending, of the largest scores of (T, n_rows); ties go to the lower row."""

    def gather(self, rows: Array, index: Array) -> Array:
        """rows[index], widened: (n_rows, D), (T, k) -> (T, k, D)."""

    def experts(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        """Sum over j of down(silu(min(gate x, limit)) * clip(up x, limit) * share[t, j]) of expert ids[t, j]."""

    def swiglu(self, gate: Array, up: Array, limit: float) -> Array:
        """silu(min(gate, limit)) * clip(up, -limit, limit)."""

    def no_rows(self, width: int, half: bool) -> Rows:
        """An empty run, of f16 or f32."""

    def append(self, rows: Rows, new: Array) -> Rows:
        """The run with (k, width) more rows; `rows` itself stays valid. An f32 run takes f16 rows too."""

    def view(self, rows: Rows) -> Array:
        """(n_rows, width), as they are kept."""

    def row_bytes(self, rows: Rows) -> int:
        """Bytes of memory that a run takes, room to grow included."""


def linears(ops: Ops, weights: Sequence[Any], x: Array) -> tuple[Array, ...]:
    """x @ weight.T for each weight; at once where the back end can."""
    done = ops.fused_linears(weights, x)
    return tuple(ops.linear(weight, x) for weight in weights) if done is None else done
