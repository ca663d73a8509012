"""Values with members: the fields of a hash, the scored members of a sorted set.

Such a value is changed in place only while nobody else can see it: `round` is the keyspace's round in which this object
was made by a writer, and a commit round that takes the value away ends that. `writable` makes a copy when needed, so
one large hash is copied once a commit round at most, not once a command.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping

_NEVER = -1
_HASH_MASK = (1 << 62) - 1
_WHOLE = 128  # containers up to this size are scanned in one call


class _Order:
    """Members by their hash: the order SCAN walks in, in which no member moves. Built when first asked for."""

    __slots__ = ("_items",)

    def __init__(self, items: list[tuple[int, bytes]] | None = None) -> None:
        self._items = items

    def add(self, member: bytes) -> None:
        """A new member."""
        if self._items is not None:
            insort(self._items, (hash(member) & _HASH_MASK, member))

    def copy(self) -> _Order:
        """For a copy of the container."""
        return _Order(self._items.copy() if self._items is not None else None)

    def scan(self, members: Mapping[bytes, object], cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Some members from `cursor` on, and the next cursor (0: done). Deleted members are passed over."""
        if len(members) <= _WHOLE:
            return 0, list(members)
        items = self._items
        if items is None or len(items) > 2 * len(members):
            items = self._items = sorted((hash(member) & _HASH_MASK, member) for member in members)
        start = bisect_left(items, (cursor, b""))
        stop = min(start + count, len(items))
        # Members of equal hash go together, or the cursor could not tell them apart.
        while 0 < stop < len(items) and items[stop][0] == items[stop - 1][0]:
            stop += 1
        found = [member for _, member in items[start:stop] if member in members]
        return (items[stop][0] if stop < len(items) else 0), list(dict.fromkeys(found))


class Fields(dict[bytes, bytes]):
    """The fields of a hash, in order of their first setting."""

    __slots__ = ("_order", "round")

    def __init__(self, items: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(items)
        self.round = _NEVER
        self._order = _Order()

    def writable(self, current_round: int) -> Fields:
        """This object if only the caller can see it, else a copy."""
        if self.round == current_round:
            return self
        copy = self.duplicate()
        copy.round = current_round
        return copy

    def duplicate(self) -> Fields:
        """A copy that shares nothing."""
        copy = Fields(self)
        copy._order = self._order.copy()
        return copy

    def add(self, field: bytes, value: bytes) -> bool:
        """Set a field; whether it is new."""
        before = len(self)
        self[field] = value
        if len(self) == before:
            return False
        self._order.add(field)
        return True

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Some fields and the next cursor."""
        return self._order.scan(self, cursor, count)


class Members:
    """The members of a sorted set, by name and in order of (score, name). Scores are never NaN."""

    __slots__ = ("_order", "ordered", "round", "scores")

    def __init__(self, scores: Mapping[bytes, float] | None = None) -> None:
        self.scores = dict(scores or {})
        self.ordered = sorted((score, member) for member, score in self.scores.items())
        self.round = _NEVER
        self._order = _Order()

    def __len__(self) -> int:
        return len(self.scores)

    def writable(self, current_round: int) -> Members:
        """This object if only the caller can see it, else a copy."""
        if self.round == current_round:
            return self
        copy = self.duplicate()
        copy.round = current_round
        return copy

    def duplicate(self) -> Members:
        """A copy that shares nothing."""
        copy = Members()
        copy.scores = self.scores.copy()
        copy.ordered = self.ordered.copy()
        copy._order = self._order.copy()
        return copy

    def add(self, member: bytes, score: float) -> bool:
        """Set a member's score; whether it is new. Minus zero becomes zero, as in Redis' small sets."""
        score += 0.0
        old = self.scores.get(member)
        if old is None:
            self._order.add(member)
        elif old == score:
            return False
        else:
            del self.ordered[self._place(member, old)]
        self.scores[member] = score
        insort(self.ordered, (score, member))
        return old is None

    def remove(self, member: bytes) -> bool:
        """Remove a member; whether it was there."""
        score = self.scores.pop(member, None)
        if score is None:
            return False
        del self.ordered[self._place(member, score)]
        return True

    def remove_range(self, start: int, stop: int) -> int:
        """Remove the members at ranks start to stop (exclusive); how many."""
        gone = self.ordered[start:stop]
        del self.ordered[start:stop]
        for _, member in gone:
            del self.scores[member]
        return len(gone)

    def rank(self, member: bytes) -> int | None:
        """Rank of a member, lowest score first."""
        score = self.scores.get(member)
        return None if score is None else self._place(member, score)

    def _place(self, member: bytes, score: float) -> int:
        return bisect_left(self.ordered, (score, member))

    def first_at_least(self, score: float, exclusive: bool) -> int:
        """Rank of the first member with a score of at least (exclusive: above) `score`."""
        if exclusive:
            return bisect_right(self.ordered, score, key=lambda item: item[0])
        return bisect_left(self.ordered, score, key=lambda item: item[0])

    def first_named(self, name: bytes, exclusive: bool) -> int:
        """Rank of the first member named `name` or later (exclusive: later), when all scores are equal."""
        if exclusive:
            return bisect_right(self.ordered, name, key=lambda item: item[1])
        return bisect_left(self.ordered, name, key=lambda item: item[1])

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Some members and the next cursor."""
        return self._order.scan(self.scores, cursor, count)
