"""SyntheticEngine: an engine without a model, for load tests, crash tests and sizing of the daemon at real geometry.

It answers every call of `interface.EngineLike` with states of exact shape and valid packing whose rows are
pseudo-random functions of the token prefix (synthetic_rows.py). Prefill costs nothing: a row is made when it is packed.
What it generates is noise; it is never chosen unless its name, `synthetic:...`, is given.

Invariant: whatever is packed for a prefix is the same bytes each time, on every machine; with the option verify=yes
`load` compares each loaded byte with what it would have packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvdb_engine.catalog import ModelInfo
from kvdb_engine.errors import ContextFullError, StateError, TokenError
from kvdb_engine.synthetic_model import SyntheticInfo
from kvdb_engine.synthetic_rows import U8, U32, U64, RowPool, mix, token_words
from kvdb_protocol.layout import Codec, Part, Section, frontier_rows
from kvdb_protocol.page import Page
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import Tail

PREFILL_CHUNK = 1 << 16
_SPARE_LOGITS = 1 << 16


class Timeline:
    """Token ids and the running sum of their words; grows at its end, shared by all states that it begins with."""

    __slots__ = ("ids", "sums", "used")

    def __init__(self, capacity: int) -> None:
        self.ids: U32 = np.empty(capacity, np.uint32)
        self.sums: U64 = np.zeros(capacity + 1, np.uint64)
        self.used = 0

    def append(self, ids: U32) -> None:
        """Add tokens; the capacity must be there."""
        end = self.used + len(ids)
        self.ids[self.used : end] = ids
        words = token_words(ids, self.used)
        np.cumsum(words, out=self.sums[self.used + 1 : end + 1])
        self.sums[self.used + 1 : end + 1] += self.sums[self.used]
        self.used = end


class SyntheticState:
    """The live state of one session: a timeline, and how much of it."""

    __slots__ = ("n_tokens", "timeline")

    def __init__(self, timeline: Timeline, n_tokens: int) -> None:
        self.timeline = timeline
        self.n_tokens = n_tokens

    @property
    def ids(self) -> U32:
        """(n_tokens,) token ids; a view that must not be changed."""
        return self.timeline.ids[: self.n_tokens]

    @property
    def nbytes(self) -> int:
        """Bytes of ids and sums; what clones share counts for each."""
        return 12 * self.n_tokens

    def clone(self) -> SyntheticState:
        """A state at the same tokens, in O(1): whoever appends second copies the timeline."""
        return SyntheticState(self.timeline, self.n_tokens)

    def append(self, ids: U32) -> None:
        """Append tokens."""
        end = self.n_tokens + len(ids)
        old = self.timeline
        if self.n_tokens != old.used or end > len(old.ids):
            self.timeline = Timeline(max(1024, 2 * end))
            self.timeline.ids[: self.n_tokens] = old.ids[: self.n_tokens]
            self.timeline.sums[: self.n_tokens + 1] = old.sums[: self.n_tokens + 1]
            self.timeline.used = self.n_tokens
        self.timeline.append(ids)
        self.n_tokens = end


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sections whose rows are made in one go: same part, so same ratio, codec and width. numbers: their places."""

    part: Part
    ratio: int
    pool: RowPool
    salts: U64
    numbers: tuple[int, ...]


class SyntheticEngine:
    """Implements interface.EngineLike[SyntheticState]. Not thread-safe."""

    def __init__(self, info: ModelInfo) -> None:
        """`info` comes from `open_model("synthetic:...")`; nothing is loaded."""
        if not isinstance(info, SyntheticInfo):
            raise StateError(f"model {info.name} is not synthetic")
        self.info = info
        self.layout = info.layout
        self.seed = np.uint64(int.from_bytes(info.family[:8], "little"))
        pools: dict[tuple[Codec, int], RowPool] = {}
        for section in self.layout.tail_sections:
            key = (section.codec, section.width)
            if key not in pools:
                pools[key] = RowPool(*key, self.layout.rope_dim)
        self._page_batches = self._batches(self.layout.streams, pools)
        self._tail_batches = self._batches(self.layout.tail_sections, pools)
        random = np.random.default_rng(self.layout.vocab)
        self._logits = (3 * random.standard_normal(self.layout.vocab + _SPARE_LOGITS)).astype(np.float32)
        self._n_prefilled = self._n_decoded = self._n_verified = 0

    def new_state(self) -> SyntheticState:
        """A state of no tokens."""
        return SyntheticState(Timeline(0), 0)

    def prefill(self, state: SyntheticState, ids: U32) -> Iterator[int]:
        """Append tokens, yielding how many are done. Raises TokenError or ContextFullError before any."""
        wanted = self._checked(state, ids)
        for first in range(0, len(wanted), PREFILL_CHUNK):
            chunk = wanted[first : first + PREFILL_CHUNK]
            state.append(chunk)
            self._n_prefilled += len(chunk)
            yield first + len(chunk)

    def step(self, state: SyntheticState, token: int) -> None:
        """Append one token."""
        state.append(self._checked(state, np.array([token], np.int64)))
        self._n_decoded += 1

    def logits(self, state: SyntheticState) -> bytes:
        """f32[vocab] of the next token: noise, with one token far ahead of the others; zeros before the first token."""
        if not state.n_tokens:
            return bytes(4 * self.layout.vocab)
        word = int(self._hashes(state, np.array([state.n_tokens]), np.zeros(1, np.uint64))[0, 0])
        start = word % _SPARE_LOGITS
        logits = self._logits[start : start + self.layout.vocab].copy()
        # The slice alone tells 65,536 prefixes apart; 24 more bits of the hash go into one logit.
        logits[0] = np.float32((word >> 40) / (1 << 24))
        logits[(word >> 16) % self.layout.vocab] += np.float32(24)
        return logits.tobytes()

    def page_sections(self, state: SyntheticState, number: int) -> Sequence[PackedSection]:
        """The rows of full page `number`, in the order of layout.streams."""
        first = number * self.layout.page_tokens
        return self._pack(state, self._page_batches, first, first + self.layout.page_tokens, len(self.layout.streams))

    def tail_sections(self, state: SyntheticState) -> Sequence[PackedSection]:
        """The packed sections of the tail, in the order of layout.tail_sections."""
        first = self.layout.n_pages(state.n_tokens) * self.layout.page_tokens
        return self._pack(state, self._tail_batches, first, state.n_tokens, len(self.layout.tail_sections))

    def load(self, pages: Iterable[Page], tail: Tail) -> SyntheticState:
        """The state of these records' token ids. Raises StateError when verify is on and a byte differs."""
        state = self.new_state()
        if self.info.verify:
            for number, page in enumerate(pages):
                state.append(self._checked(state, np.frombuffer(page.ids, "<u4")))
                self._compare(f"page {number}", self.layout.streams, page.sections, self.page_sections(state, number))
        else:
            ids = b"".join(bytes(page.ids) for page in pages)
            state.append(self._checked(state, np.frombuffer(ids, "<u4")))
        state.append(self._checked(state, np.frombuffer(tail.ids, "<u4")))
        if state.n_tokens != tail.n_tokens:
            raise StateError(f"the records hold {state.n_tokens} tokens, the tail says {tail.n_tokens}")
        if self.info.verify:
            self._compare("tail", self.layout.tail_sections, tail.sections, self.tail_sections(state))
            if bytes(tail.logits) != self.logits(state):
                raise StateError("tail: logits are not those of this prefix")
        return state

    def stats(self) -> dict[str, Any]:
        """What it is, for ENGINE STATUS."""
        return {
            "backend": "synthetic (no model: random rows for load tests)",
            "verify": int(self.info.verify),
            "prefill_tokens": self._n_prefilled,
            "decode_tokens": self._n_decoded,
            "verified_sections": self._n_verified,
        }

    def _batches(self, sections: Sequence[Section], pools: dict[tuple[Codec, int], RowPool]) -> list[_Batch]:
        found: dict[tuple[Part, int], list[int]] = {}
        for number, section in enumerate(sections):
            # Windows do not depend on the ratio: one batch for all layers.
            ratio = 1 if section.part is Part.WINDOW else self.layout.ratios[section.layer]
            found.setdefault((section.part, ratio), []).append(number)
        batches = []
        for (part, ratio), numbers in found.items():
            first = sections[numbers[0]]
            salts = np.array([sections[number].layer << 8 | part for number in numbers], np.uint64)
            batches.append(_Batch(part, ratio, pools[first.codec, first.width], salts, tuple(numbers)))
        return batches

    def _pack(
        self, state: SyntheticState, batches: Sequence[_Batch], first: int, last: int, n_sections: int
    ) -> list[PackedSection]:
        packed: list[PackedSection | None] = [None] * n_sections
        for batch in batches:
            # Each row's hash covers the tokens up to and with its own last one.
            match batch.part:
                case Part.COMPRESSED | Part.INDEX:
                    counts = np.arange(first // batch.ratio + 1, last // batch.ratio + 1) * batch.ratio
                case Part.WINDOW:
                    counts = np.arange(last - min(last, self.layout.window), last) + 1
                case _:
                    counts = np.arange(last - frontier_rows(batch.ratio, last), last) + 1
            rows = batch.pool.rows(self._hashes(state, counts, batch.salts))
            for number, section_rows in zip(batch.numbers, rows, strict=True):
                packed[number] = PackedSection(batch.pool.codec, _view(section_rows))
        return [section for section in packed if section is not None]

    def _hashes(self, state: SyntheticState, counts: np.ndarray[Any, Any], salts: U64) -> U64:
        """(len(salts), len(counts)) words, of the prefix of each count and the salt."""
        prefixes = mix(state.timeline.sums[counts] + self.seed)
        return mix(prefixes[None, :] + mix(salts)[:, None])

    def _compare(
        self, what: str, names: Sequence[Section], found: Sequence[PackedSection], wanted: Sequence[PackedSection]
    ) -> None:
        for name, ours, theirs in zip(names, wanted, found, strict=True):
            if ours.codec is not theirs.codec or ours.data != theirs.data:
                raise StateError(f"{what}: layer {name.layer} {name.part.name} rows are not those of this prefix")
        self._n_verified += len(names)

    def _checked(self, state: SyntheticState, ids: np.ndarray[Any, Any]) -> U32:
        if len(ids) and (int(ids.max()) >= self.layout.vocab or int(ids.min()) < 0):
            bad = next(int(token) for token in ids if not 0 <= token < self.layout.vocab)
            raise TokenError(f"token id {bad} is outside the vocabulary of {self.layout.vocab}")
        if state.n_tokens + len(ids) > self.layout.context:
            raise ContextFullError(
                f"{state.n_tokens} tokens and {len(ids)} more do not fit the context of {self.layout.context} tokens"
            )
        return ids.astype(np.uint32, copy=False)


def _view(rows: U8) -> memoryview:
    """The bytes of contiguous rows without a copy; an empty array has no castable view."""
    return rows.data.cast("B") if rows.size else memoryview(b"")
