"""Ops: the array operations the model is written in, once, for every back end.

The model's files (hyper, compressor, indexer, attention, moe, model) say what is computed; an `Ops` says how. There are
two: `ops_numpy` (processors; numpy brings a fast BLAS and costs about 1 us an operation) and `ops_mlx` (Metal, CUDA,
and MLX's own CPU device). Arrays of both understand indexing, arithmetic, `@`, `reshape`, `swapaxes` and `sum`; what
they do not share is here.

Invariant of every implementation: the shapes, and therefore the bits, of a result follow from the arguments alone. No
choice may depend on how an argument came to be (computed, restored, forked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from kvdb_engine.packing import F32

# numpy.ndarray or mlx.core.array. The two share no base class, and a union would forbid every operator to the type
# checker, so this is the one place where Any crosses a module border.
Array: TypeAlias = Any

# What a masked score is set to: finite, as in ds4's files, so that no arithmetic on it makes a NaN.
MASKED = -1.0e30


@dataclass(frozen=True, slots=True)
class Rows:
    """An append-only run of rows of one width, shared by forks. `buffer` belongs to the Ops that made it."""

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


class Ops(Protocol):
    """Array operations of one back end. Shapes: T tokens, D values; f32 unless said otherwise."""

    name: str

    def array(self, host: Any) -> Array:
        """A host array (numpy) as an array of this back end; copied."""

    def host(self, array: Array) -> F32:
        """The values as a numpy float32 array; waits for the computation."""

    def evaluate(self, arrays: Sequence[Array]) -> None:
        """Wait until these are computed."""

    def weight(self, tensor: Any) -> Any:
        """A loaded matrix (weights.Tensor) in the form `linear` wants."""

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
        """KV rows as they are kept (rounding.py)."""

    def round_index(self, x: Array) -> Array:
        """Hadamard and FP4 along the last axis (rounding.py)."""

    def round_f16(self, x: Array) -> Array:
        """To f16 and back."""

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
        """rows[index]: (n_rows, D), (T, k) -> (T, k, D)."""

    def experts(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        """Sum over j of down(silu(min(gate x, limit)) * clip(up x, limit) * share[t, j]) of expert ids[t, j]."""

    def swiglu(self, gate: Array, up: Array, limit: float) -> Array:
        """silu(min(gate, limit)) * clip(up, -limit, limit)."""

    def no_rows(self, width: int) -> Rows:
        """An empty run."""

    def append(self, rows: Rows, new: Array) -> Rows:
        """The run with (k, width) more rows; `rows` itself stays valid."""

    def view(self, rows: Rows) -> Array:
        """(n_rows, width)."""
