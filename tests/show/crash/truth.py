"""What one client may find after a crash: every acknowledged change, and each unfinished one whole or not at all.

A client works on keys that nobody else touches, so what they hold follows from its own commands. Before a command its
*effect* is written down; an acknowledged effect becomes the truth, one that was refused is forgotten, and those that a
crash interrupted may have happened or not, each as a whole: a MULTI of three commands is one effect.

Two things may take a key away without a command: its own expiry, and eviction. The daemons here evict by
`volatile-lru`, so only a snapshot with an expiry can be evicted; every other key must stay.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

NEVER = float("inf")
CLOCK_S = 0.01  # expiries are kept in whole milliseconds, and two processes read the clock


@dataclass(frozen=True, slots=True)
class Value:
    """What a key holds. digest: of its content, None while nobody has seen it. tokens: of a state, 0 if unknown.

    It expires at some moment between `since` and `by`.
    """

    kind: str
    digest: bytes | None
    tokens: int = 0
    since: float = NEVER
    by: float = NEVER

    @property
    def is_volatile(self) -> bool:
        """Whether it has an expiry."""
        return self.since < NEVER

    def expiring(self, ms: int | None) -> Value:
        """The same with an expiry that a command sent now sets or (None) removes."""
        return replace(self, since=NEVER if ms is None else time.time() + ms / 1000, by=NEVER)

    def settled(self, began: float) -> Value:
        """The same once the command that was sent at `began` is over: the latest moment of its expiry is known."""
        return self if not self.is_volatile or self.by < NEVER else replace(self, by=self.since + time.time() - began)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a read that began at `began` found."""

    kind: str
    digest: bytes
    expires: float
    began: float


Effect = Mapping[bytes, Value | None]
State = dict[bytes, Value]


@dataclass(slots=True)
class Truth:
    """The keys of one client. Used by one thread at a time."""

    state: State = field(default_factory=dict)
    acknowledged: int = 0
    _open: dict[int, tuple[float, Effect]] = field(default_factory=dict)
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def begin(self, effect: Effect) -> int:
        """A command with this effect is about to be sent."""
        number = next(self._ids)
        self._open[number] = (time.time(), effect)
        return number

    def acknowledge(self, number: int) -> None:
        """It was answered."""
        began, effect = self._open.pop(number)
        self.acknowledged += 1
        self.state = _after(self.state, began, effect)

    def refuse(self, number: int) -> None:
        """It was answered by an error: nothing changed."""
        del self._open[number]

    @contextmanager
    def doing(self, effect: Effect) -> Iterator[None]:
        """Around a command. An error reply refuses; a lost connection leaves the effect open."""
        number = self.begin(effect)
        try:
            yield
        except ConnectionError:
            raise
        except Exception:
            self.refuse(number)
            raise
        self.acknowledge(number)

    def compare(self, found: Mapping[bytes, Seen]) -> list[str]:
        """What is wrong with what was found after the crash; from now on that is the truth."""
        open_effects = list(self._open.values())
        self._open.clear()
        best: list[str] | None = None
        for chosen in itertools.product((True, False), repeat=len(open_effects)):
            state = self.state
            for (began, effect), happened in zip(open_effects, chosen, strict=True):
                state = _after(state, began, effect) if happened else state
            wrong = differences(state, found)
            if best is None or len(wrong) < len(best):
                best, chosen_state = wrong, state
            if not wrong:
                break
        assert best is not None
        self.state = {
            key: replace(value, digest=found[key].digest) for key, value in chosen_state.items() if key in found
        }
        return best


def _after(state: State, began: float, effect: Effect) -> State:
    changed = dict(state)
    for key, value in effect.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = value.settled(began)
    return changed


def differences(state: Mapping[bytes, Value], found: Mapping[bytes, Seen]) -> list[str]:
    """In words: keys that are lost, wrong, of another type, or there although they were deleted or had expired."""
    wrong = []
    for key, value in state.items():
        seen = found.get(key)
        name = key.decode()
        if seen is None:
            may_be_evicted = value.kind == "snapshot" and value.is_volatile
            if not may_be_evicted and time.time() + CLOCK_S < value.since:
                wrong.append(f"lost: {value.kind} {name}")
        elif seen.kind != value.kind:
            what = seen.digest.decode() if seen.kind == "error" else f"a {seen.kind}"
            wrong.append(f"wrong: {value.kind} {name} is {what}")
        elif value.digest is not None and seen.digest != value.digest:
            wrong.append(f"wrong: other bytes in {value.kind} {name}")
        elif not value.since - CLOCK_S <= seen.expires <= value.by + CLOCK_S:
            wrong.append(f"wrong: {name} expires at {seen.expires:.3f}, not at {value.since:.3f} to {value.by:.3f}")
        elif seen.began > seen.expires + CLOCK_S:
            wrong.append(f"wrong: {name} is there {seen.began - seen.expires:.3f} s after it expired")
    wrong += [f"wrong: {key.decode()} is there, although it was deleted" for key in found.keys() - state.keys()]
    return wrong
