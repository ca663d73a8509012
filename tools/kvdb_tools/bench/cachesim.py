"""A store of snapshots without bytes: what a budget and an eviction policy do to a trace, in seconds instead of days.

It keeps the rules of the real store: pages of a trie shared by all snapshots that reach them, a tail each, the longest
stored prefix answers a prompt, evicting a snapshot frees its tail and the pages that nobody else reaches. Sizes are
those of the layout. What the running request starts from is evicted last.

Which snapshots a trace can take, and which of them are prefixes of which prompt, does not depend on the policy: it is
worked out once (`build_workload`), so that a run only has to look at numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import numpy.typing as npt

from kvdb_protocol.layout import Layout
from kvdb_protocol.record import record_bytes
from kvdb_tools.traces import Trace

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Headers of page and tail payloads, and decoded text of about four bytes a token.
_HEAD_BYTES = 160
_TEXT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Point:
    """A snapshot that a trace takes. pages: its full pages. ancestors: points that are prefixes, longest first."""

    n_tokens: int
    pages: tuple[int, ...]
    tail_bytes: int
    ancestors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """A request. candidates: points that are prefixes of its prompt, longest first. points: those it takes."""

    time_s: float
    n_tokens: int
    candidates: tuple[int, ...]
    points: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Traces merged in order of time. page_bytes: one page's record."""

    events: tuple[Event, ...]
    points: tuple[Point, ...]
    n_pages: int
    page_bytes: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(event.n_tokens for event in self.events)


def build_workload(traces: Sequence[Trace], layout: Layout, *, spacing_s: float, every_tokens: int) -> Workload:
    """Merge traces, each starting `spacing_s` after the one before.

    Each request takes a snapshot of its prompt's full blocks and, as it prefills, one every `every_tokens` tokens.
    """
    block = traces[0].block_tokens
    # A page of whole blocks: where blocks are larger than pages, a block's pages come and go together anyway.
    page_tokens = max(layout.page_tokens, block)
    per_page = page_tokens // block
    nodes: dict[tuple[int, int], int] = {}
    merged: list[tuple[float, list[int], list[int]]] = []
    point_nodes: dict[int, None] = {}
    for number, trace in enumerate(traces):
        for request in trace.requests:
            path: list[int] = []
            at = -1 - number
            for one in request.blocks[: request.n_in // block]:
                at = nodes.setdefault((at, one), len(nodes))
                path.append(at)
            if path:
                step = every_tokens // block
                taken = [*path[step - 1 : -1 : step], path[-1]]
                point_nodes.update(dict.fromkeys(taken))
                merged.append((number * spacing_s + request.time_s, path, taken))
    merged.sort(key=lambda entry: entry[0])
    numbers = {node: number for number, node in enumerate(point_nodes)}
    tail_bytes = cache(lambda n_tokens: snapshot_tail_bytes(layout, n_tokens))
    pages: dict[int, int] = {}
    points: dict[int, Point] = {}
    events = []
    for time_s, path, taken in merged:
        here = [(place, numbers[node]) for place, node in enumerate(path) if node in numbers]
        candidates = tuple(number for _, number in reversed(here))
        for node in taken:
            number = numbers[node]
            if number in points:
                continue
            rank = candidates.index(number)
            n_blocks = here[len(here) - 1 - rank][0] + 1
            own = tuple(pages.setdefault(node, len(pages)) for node in path[per_page - 1 : n_blocks : per_page])
            n_tokens = n_blocks * block
            points[number] = Point(n_tokens, own, tail_bytes(n_tokens), candidates[rank + 1 :])
        events.append(Event(time_s, len(path) * block, candidates, tuple(numbers[node] for node in taken)))
    page_bytes = record_bytes(_HEAD_BYTES + page_tokens * (4 + _TEXT_BYTES) + _rows_bytes(layout, page_tokens))
    return Workload(tuple(events), tuple(points[number] for number in range(len(points))), len(pages), page_bytes)


def _rows_bytes(layout: Layout, n_tokens: int) -> int:
    return sum(
        layout.section_bytes(stream, stream.codec, n_tokens // layout.ratios[stream.layer]) for stream in layout.streams
    )


def snapshot_tail_bytes(layout: Layout, n_tokens: int) -> int:
    """Bytes on disk of the tail of a state of `n_tokens`."""
    rows = sum(layout.section_bytes(s, s.codec, layout.tail_rows(s, n_tokens)) for s in layout.tail_sections)
    n_own = n_tokens % layout.page_tokens
    return record_bytes(_HEAD_BYTES + n_own * (4 + _TEXT_BYTES) + 4 * layout.vocab + rows)


@dataclass(frozen=True, slots=True)
class Columns:
    """What policies see of the stored snapshots, one array each.

    freed: bytes that evicting it frees. total: bytes of its whole state. covered: tokens of the longest other stored
    snapshot that is a prefix of it, so what is lost is n_tokens - covered. children: stored snapshots of which it is
    that prefix. hits: prompts it answered. Times in seconds. next_use: known to the clairvoyant alone.
    """

    n_tokens: F64
    covered: F64
    freed: F64
    total: F64
    created: F64
    used: F64
    hits: F64
    children: F64
    next_use: F64

    def only(self, numbers: I64) -> Columns:
        """The columns of some snapshots."""
        return Columns(*(getattr(self, field.name)[numbers] for field in fields(self)))


Policy = Callable[[Columns, float], F64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. saved: prompt tokens that snapshots answered. hits: requests that found one."""

    saved: int
    n_tokens: int
    hits: int
    requests: int
    evicted: int
    peak_bytes: float

    @property
    def share(self) -> float:
        """Share of the prompt tokens that needed no prefill."""
        return self.saved / self.n_tokens


class CacheSim:
    """One run of a workload under one budget and policy."""

    def __init__(self, work: Workload, budget_bytes: float, policy: Policy, half_life_s: float = 21600.0) -> None:
        """policy: a score for each snapshot; the lowest is evicted. half_life_s: after which a hit counts half."""
        n = len(work.points)
        self.work = work
        self.budget = budget_bytes
        self.policy = policy
        self.half_life_s = half_life_s
        self.bytes = 0.0
        self.columns = Columns(*(np.zeros(n) for _ in fields(Columns)))
        self.columns.n_tokens[:] = [point.n_tokens for point in work.points]
        self.columns.total[:] = [point.tail_bytes + work.page_bytes * len(point.pages) for point in work.points]
        self._stored = np.zeros(n, np.bool_)
        self._reach = [0] * work.n_pages
        # xor of the numbers of all snapshots that reach a page: where there is one, that one.
        self._owners = [0] * work.n_pages
        self._cover = [-1] * n
        self._covers: dict[int, set[int]] = {}
        self._uses = _future_uses(work)
        self._n_evicted = 0

    def run(self) -> Outcome:
        """Play all requests."""
        points = self.work.points
        saved = hits = 0
        peak = 0.0
        for event in self.work.events:
            found = next((number for number in event.candidates if self._stored[number]), -1)
            known = points[found].n_tokens if found >= 0 else 0
            saved += known
            hits += found >= 0
            if found >= 0:
                self._touch(found, event.time_s, 1)
            for number in event.points:
                if points[number].n_tokens > known:
                    self._store(number, event.time_s)
                    self._make_room(number, found, event.time_s)
                    peak = max(peak, self.bytes)
        return Outcome(saved, self.work.n_tokens, hits, len(self.work.events), self._n_evicted, peak)

    def _touch(self, number: int, now: float, n_hits: int) -> None:
        columns = self.columns
        columns.hits[number] = columns.hits[number] * 2 ** (-(now - columns.used[number]) / self.half_life_s) + n_hits
        columns.used[number] = now
        uses = self._uses[number]
        while uses and uses[-1] <= now:
            uses.pop()
        columns.next_use[number] = uses[-1] if uses else np.inf

    def _store(self, number: int, now: float) -> None:
        point = self.work.points[number]
        columns = self.columns
        for column in (columns.hits, columns.children):
            column[number] = 0
        columns.created[number] = columns.used[number] = now
        self._touch(number, now, 0)
        own = float(point.tail_bytes)
        for page in point.pages:
            reach = self._reach[page]
            if reach == 0:
                own += self.work.page_bytes
            elif reach == 1:
                columns.freed[self._owners[page]] -= self.work.page_bytes
            self._reach[page] = reach + 1
            self._owners[page] ^= number
        columns.freed[number] = own
        self.bytes += own
        self._stored[number] = True
        above = next((one for one in point.ancestors if self._stored[one]), -1)
        siblings = self._covers.setdefault(above, set())
        mine = {one for one in siblings if number in self.work.points[one].ancestors}
        siblings -= mine
        self._covers[number] = set()
        for one in mine:
            self._set_cover(one, number)
        self._set_cover(number, above)
        if above >= 0:
            columns.children[above] -= len(mine)

    def _set_cover(self, number: int, above: int) -> None:
        self._cover[number] = above
        self._covers.setdefault(above, set()).add(number)
        self.columns.covered[number] = self.work.points[above].n_tokens if above >= 0 else 0
        if above >= 0:
            self.columns.children[above] += 1

    def _evict(self, number: int) -> None:
        point = self.work.points[number]
        columns = self.columns
        self._n_evicted += 1
        self.bytes -= columns.freed[number]
        for page in point.pages:
            self._owners[page] ^= number
            self._reach[page] -= 1
            if self._reach[page] == 1:
                columns.freed[self._owners[page]] += self.work.page_bytes
        self._stored[number] = False
        above = self._cover[number]
        self._covers[above].discard(number)
        if above >= 0:
            columns.children[above] -= 1
        for one in self._covers.pop(number):
            self._set_cover(one, above)

    def _make_room(self, new: int, source: int, now: float) -> None:
        while self.bytes > self.budget:
            numbers = np.flatnonzero(self._stored)
            candidates = numbers[(numbers != new) & (numbers != source)]
            if not len(candidates):
                # What the request starts from goes next; a state that alone exceeds the budget is not kept.
                candidates = numbers[numbers != new] if len(numbers) > 1 else numbers
            chosen = self.columns.only(candidates)
            self._evict(int(candidates[int(np.argmin(self.policy(chosen, now)))]))


def _future_uses(work: Workload) -> list[list[float]]:
    """For each point, latest first, the times at which it is the longest prefix that any policy could have stored."""
    uses: list[list[float]] = [[] for _ in work.points]
    taken: set[int] = set()
    for event in work.events:
        best = next((number for number in event.candidates if number in taken), -1)
        if best >= 0:
            uses[best].append(event.time_s)
        taken.update(event.points)
    for times in uses:
        times.reverse()
    return uses
