"""What the worker needs of an engine. Two exist: the model in MLX, and the synthetic one for load tests.

A state is mutable and belongs to one session; `clone` is O(1) and gives an independent one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvdb_protocol.ids import Buffer
from kvdb_protocol.page import Page
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import Tail


class LiveState(Protocol):
    """A session's live state."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the timeline."""

    @property
    def ids(self) -> Sequence[int] | NDArray[np.uint32]:
        """Token ids of the timeline."""

    @property
    def nbytes(self) -> int:
        """Memory the state holds, in bytes; what clones share counts for each."""

    def clone(self: S) -> S:
        """An independent state at the same tokens, in O(1)."""


S = TypeVar("S", bound=LiveState)


class EngineLike(Protocol[S]):
    """Computes states and turns them into sections of rows and back."""

    def new_state(self) -> S:
        """A state of no tokens."""

    def prefill(self, state: S, ids: NDArray[np.uint32]) -> Iterator[int]:
        """Append `ids` chunk by chunk, yielding how many are done; the state is valid at each yield."""

    def step(self, state: S, token: int) -> None:
        """Append one token."""

    def logits(self, state: S) -> Buffer:
        """f32[vocab], little-endian: the logits of the next token."""

    def page_sections(self, state: S, number: int) -> Sequence[PackedSection]:
        """The rows of full page `number`, packed, in the order of layout.streams."""

    def tail_sections(self, state: S) -> Sequence[PackedSection]:
        """The packed sections of the tail, in the order of layout.tail_sections."""

    def load(self, pages: Iterable[Page], tail: Tail) -> S:
        """The state whose records these are. A page's views are valid only until the next page is taken."""

    def stats(self) -> dict[str, Any]:
        """What it runs on, for ENGINE STATUS."""
