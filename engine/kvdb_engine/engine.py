"""Engine: one model, ready to compute. Runs prefill in chunks and decodes token by token, over any number of states.

Chunk borders lie at absolute multiples of the chunk size, so equal histories run in equal shapes. A state is replaced
as a whole after each chunk or step: if the caller stops in between, it is valid at the last complete one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvdb_engine import backend, state_records
from kvdb_engine.catalog import ModelInfo
from kvdb_engine.errors import ContextFullError, TokenError
from kvdb_engine.model import Model, empty_layers, load_weights, nbytes, state_arrays
from kvdb_engine.state import U32, State
from kvdb_protocol.dsv4 import Dsv4Payload
from kvdb_protocol.ids import Buffer
from kvdb_protocol.page import Page
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import Tail


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was loaded. Times are seconds of wall clock inside the engine."""

    backend: str
    load_seconds: float
    matmul_gflops: float  # of a small float32 product when it was loaded: is a fast BLAS at work?
    weight_bytes: int
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Engine:
    """A loaded model. Not thread-safe: one thread computes."""

    def __init__(
        self,
        info: ModelInfo,
        *,
        backend_name: str = "auto",
        prefill_chunk: int | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Load the weights. progress(layers done, layers). Raises ModelError.

        prefill_chunk: tokens per forward pass; None takes what suits the back end.
        """
        started = time.perf_counter()
        self.info = info
        self.ops = backend.select(backend_name)
        self.prefill_chunk = prefill_chunk or self.ops.prefill_chunk
        self.model = Model(self.ops, info.config, load_weights(self.ops, info.config, info.open_weights(), progress))
        seconds, speed = time.perf_counter() - started, round(backend.matmul_gflops(self.ops), 1)
        self._stats = EngineStats(self.ops.name, seconds, speed, nbytes(self.model.weights))

    def new_state(self) -> State:
        """A state of no tokens."""
        nothing = np.zeros(0, np.uint32)
        return State(self.ops, self.info.layout, empty_layers(self.ops, self.info.config), nothing, None)

    def prefill(self, state: State, ids: Sequence[int] | U32) -> Iterator[int]:
        """Append tokens chunk by chunk; yields the number of them done so far, after each chunk.

        The state is valid at every yield and when the generator is closed. Raises TokenError or ContextFullError
        before anything is computed.
        """
        wanted = self._checked(state, ids)
        done = 0
        while done < len(wanted):
            room = self.prefill_chunk - state.n_tokens % self.prefill_chunk
            chunk = wanted[done : done + room]
            started = time.perf_counter()
            self._run(state, chunk)
            self._stats.prefill_seconds += time.perf_counter() - started
            self._stats.prefill_tokens += len(chunk)
            done += len(chunk)
            yield done

    def step(self, state: State, token_id: int) -> None:
        """Append one token; its successor's logits are then in the state."""
        wanted = self._checked(state, [token_id])
        started = time.perf_counter()
        self._run(state, wanted)
        self._stats.decode_seconds += time.perf_counter() - started
        self._stats.decode_tokens += 1

    def logits(self, state: State) -> Buffer:
        """f32[vocab], little-endian: the logits of the next token."""
        return state_records.logits_bytes(state)

    def page_sections(self, state: State, number: int) -> list[PackedSection]:
        """The packed rows of full page `number`, in the order of layout.streams."""
        return state_records.page_sections(state, number)

    def tail_sections(self, state: State) -> list[PackedSection]:
        """The packed sections of the tail, in the order of layout.tail_sections."""
        return state_records.tail_sections(state)

    def load(self, pages: Iterable[Page], tail: Tail) -> State:
        """A live state from a snapshot's records. Raises StateError."""
        return state_records.state_from_records(self.info, pages, tail, self.ops)

    def load_dsv4(self, payload: Dsv4Payload) -> State:
        """A live state from a ds4 payload. Raises StateError."""
        return state_records.from_dsv4(self.info, payload, self.ops)

    def stats(self) -> dict[str, float | str]:
        """What the engine runs on and what it has done since it was loaded (fields of EngineStats)."""
        return asdict(self._stats)

    def _run(self, state: State, ids: U32) -> None:
        layers, logits = self.model.forward(state.layers, ids, state.n_tokens)
        # The states too: what no logits need yet (an open group) would otherwise pile up as work to be done.
        self.ops.evaluate([logits, *state_arrays(layers)])
        state.advance(layers, ids, logits)

    def _checked(self, state: State, ids: Sequence[int] | U32) -> U32:
        vocab, context = self.info.config.vocab, self.info.config.context
        wide = np.asarray(ids, dtype=np.int64)
        if wide.size and (wide.min() < 0 or wide.max() >= vocab):
            bad = int(wide[(wide < 0) | (wide >= vocab)][0])
            raise TokenError(f"token id {bad} is outside the vocabulary of {vocab}")
        if state.n_tokens + wide.size > context:
            raise ContextFullError(
                f"{state.n_tokens} tokens and {wide.size} more do not fit the context of {context} tokens"
            )
        return wide.astype(np.uint32)
