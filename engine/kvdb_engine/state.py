"""State: everything the next token depends on, live in memory.

A `State` is the engine's mutable handle on immutable parts: a step replaces the parts, it never changes them (rows of
a run are appended past the end that others see, ops.Rows). So `clone` copies references, whatever the length, and a
fork can neither see nor disturb its origin.

Conversion to bytes is in state_records.py (pages, tails, ds4 payloads).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvdb_engine.attention import LayerState
from kvdb_engine.ops import Array, Ops
from kvdb_engine.packing import F32
from kvdb_protocol.layout import Layout

U32 = npt.NDArray[np.uint32]


class _Ids:
    """Token ids with the same rule as rows: whoever stands at the end appends in place, others copy first."""

    __slots__ = ("data", "used")

    def __init__(self, data: U32, used: int) -> None:
        self.data = data
        self.used = used


class State:
    """The live state of one timeline.

    layers: one LayerState each. logits: of the next token, None before the first one. Owned by one thread.
    """

    __slots__ = ("_ids", "_logits", "layers", "layout", "n_tokens", "ops")

    def __init__(
        self, ops: Ops, layout: Layout, layers: tuple[LayerState, ...], ids: U32, logits: Array | None
    ) -> None:
        self.ops = ops
        self.layout = layout
        self.layers = layers
        self.n_tokens = len(ids)
        self._ids = _Ids(np.array(ids, np.uint32), len(ids))
        self._logits = logits

    @property
    def ids(self) -> U32:
        """(n_tokens,) token ids; a view that must not be changed."""
        return self._ids.data[: self.n_tokens]

    @property
    def logits(self) -> F32:
        """(vocab,) logits of the next token as numpy float32; zeros before the first token."""
        if self._logits is None:
            return np.zeros(self.layout.vocab, np.float32)
        return self.ops.host(self._logits)

    @property
    def nbytes(self) -> int:
        """Bytes of memory this state holds or shares, room to grow included."""
        ops = self.ops
        total = self._ids.data.nbytes + (0 if self._logits is None else ops.nbytes(self._logits))
        for layer in self.layers:
            total += ops.nbytes(layer.window)
            for part in (layer.compressed, layer.index):
                if part is not None:
                    frontier = (part.open_kv, part.open_score, part.previous_kv, part.previous_score)
                    total += ops.row_bytes(part.rows) + sum(ops.nbytes(rows) for rows in frontier if rows is not None)
        return total

    def clone(self) -> State:
        """An independent handle on the same state. O(1): nothing is copied."""
        other = object.__new__(State)
        other.ops, other.layout, other.layers = self.ops, self.layout, self.layers
        other.n_tokens, other._ids, other._logits = self.n_tokens, self._ids, self._logits
        return other

    def advance(self, layers: tuple[LayerState, ...], new: U32, logits: Array) -> None:
        """Take over the result of a forward pass over the tokens `new`."""
        ids, wanted = self._ids, self.n_tokens + len(new)
        if ids.used != self.n_tokens or wanted > len(ids.data):
            data = np.empty(max(64, 2 * wanted), np.uint32)
            data[: self.n_tokens] = ids.data[: self.n_tokens]
            ids = _Ids(data, self.n_tokens)
        ids.data[self.n_tokens : wanted] = new
        ids.used = wanted
        self.layers, self._ids, self.n_tokens, self._logits = layers, ids, wanted, logits
