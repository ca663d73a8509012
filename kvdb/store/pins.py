"""Ranges of segments that must stay: someone reads them, or they wait to be committed.

What a round frees is punched out, and what it empties is unlinked, only once no pin lies on it. A pin is let go by
`release` or with its object, in any thread and at any moment (also by the garbage collector): letting go takes no lock.
Pins are in memory only: after a crash nobody reads any more, and start-up gives back what had to wait.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence

from kvdb.store.work import Extent, merged


class Pin:
    """Keeps one range, and the file that it lies in."""

    __slots__ = ("_let_go", "extent")

    def __init__(self, extent: Extent, let_go: deque[Extent]) -> None:
        self.extent = extent
        self._let_go: deque[Extent] | None = let_go

    def release(self) -> None:
        """The range may go. May be called again."""
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go.append(self.extent)

    def __del__(self) -> None:
        self.release()


class Pins:
    """The pins of one store, and what waits for them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Counter[Extent]] = {}
        self._let_go: deque[Extent] = deque()
        self._late: list[Extent] = []
        self._late_files: list[int] = []

    def hold(self, extent: Extent) -> Pin:
        """Keep a range from now on."""
        with self._lock:
            self._held.setdefault(extent.segment, Counter())[extent] += 1
        return Pin(extent, self._let_go)

    def free(self, freed: Sequence[Extent], emptied: Sequence[int]) -> None:
        """These ranges and files are dead: `sort` gives them out as soon as nothing holds them."""
        with self._lock:
            self._late += freed
            self._late_files += emptied

    def sort(self, freed: Sequence[Extent], emptied: Sequence[int]) -> tuple[list[Extent], list[int]]:
        """What may be given back now of ranges and files freed now or earlier; the rest is kept for later."""
        with self._lock:
            self._forget_released()
            extents, files = [*self._late, *freed], [*self._late_files, *emptied]
            is_held = self._asker()
            self._late = [extent for extent in extents if is_held(extent)]
            self._late_files = [segment for segment in files if segment in self._held]
            late, late_files = set(self._late), set(self._late_files)
            return [one for one in extents if one not in late], [one for one in files if one not in late_files]

    def reclaim(self, extent: Extent) -> None:
        """A range is about to be committed, while it is pinned: neither it nor its file may go, if they were freed."""
        with self._lock:
            self._late = [rest for one in self._late for rest in one.without(extent)]
            self._late_files = [segment for segment in self._late_files if segment != extent.segment]

    @property
    def are_late(self) -> bool:
        """Whether something that waited for its pins may be given back now."""
        with self._lock:
            if not self._late and not self._late_files:
                return False
            self._forget_released()
            return any(segment not in self._held for segment in self._late_files) or not all(
                map(self._asker(), self._late)
            )

    def _forget_released(self) -> None:
        while self._let_go:
            extent = self._let_go.popleft()
            held = self._held[extent.segment]
            held[extent] -= 1
            if not held[extent]:
                del held[extent]
            if not held:
                del self._held[extent.segment]

    def _asker(self) -> Callable[[Extent], bool]:
        """What says whether a pin lies on a range; to compare each range with each pin takes too long for many."""
        held_parts: dict[int, list[Extent]] = {}

        def is_held(extent: Extent) -> bool:
            held = self._held.get(extent.segment)
            if held is None:
                return False
            if extent in held:
                return True
            parts = held_parts.get(extent.segment)
            if parts is None:
                parts = held_parts[extent.segment] = merged(held)
            at = bisect_left(parts, extent.end, key=_offset)  # the first part that begins behind it
            return at > 0 and parts[at - 1].end > extent.offset

        return is_held


def _offset(extent: Extent) -> int:
    return extent.offset
