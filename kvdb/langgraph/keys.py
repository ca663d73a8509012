"""Where a thread lives in the keyspace.

    PREFIX threads                       zset   the threads
    PREFIX index:THREAD                  zset   "NS\\0ID" of each checkpoint, all scores 0: sorted by namespace, then id
    PREFIX values:THREAD                 zset   the value and block keys of the thread
    PREFIX checkpoint:THREAD:NS:ID       hash   checkpoint, metadata, parent, state, run
    PREFIX writes:THREAD:NS:ID           hash   "TASK\\0IDX" -> one pending write
    PREFIX value:THREAD:NS:CHANNEL:VER   string a channel's value at a version (values.py)
    PREFIX block:THREAD:HASH             string part of a long list (values.py)
    PREFIX state:THREAD:NS:ID            snapshot the model's state at this checkpoint
    PREFIX next:THREAD:NS:ID             snapshot the state a step reached that ran from this checkpoint
    PREFIX run:RUN                       zset   "THREAD\\0NS\\0ID" of each checkpoint of a run

Invariant: whatever exists of a thread can be named from `index` and `values`, so deleting needs no SCAN. Ids,
namespaces and channels are percent-encoded inside key names: a colon in them cannot lead to another thread's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


def _quoted(*parts: str) -> str:
    return ":".join(quote(part, safe="~|") for part in parts)


@dataclass(frozen=True, slots=True)
class Place:
    """Names one checkpoint: thread, namespace, id."""

    thread: str
    ns: str
    id: str


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names under a prefix."""

    prefix: str

    @property
    def threads(self) -> str:
        """Zset of the threads."""
        return f"{self.prefix}threads"

    def index(self, thread: str) -> str:
        """Zset of the thread's checkpoints."""
        return f"{self.prefix}index:{_quoted(thread)}"

    def values(self, thread: str) -> str:
        """Zset of the thread's value and block keys."""
        return f"{self.prefix}values:{_quoted(thread)}"

    def checkpoint(self, place: Place) -> str:
        """Hash of a checkpoint."""
        return f"{self.prefix}checkpoint:{_quoted(place.thread, place.ns, place.id)}"

    def writes(self, place: Place) -> str:
        """Hash of a checkpoint's pending writes."""
        return f"{self.prefix}writes:{_quoted(place.thread, place.ns, place.id)}"

    def value(self, thread: str, ns: str, channel: str, version: str | int | float) -> str:
        """A channel's value at a version."""
        return f"{self.prefix}value:{_quoted(thread, ns, channel, str(version))}"

    def block(self, thread: str, digest: str) -> str:
        """A block of a long list."""
        return f"{self.prefix}block:{_quoted(thread)}:{digest}"

    def state(self, place: Place) -> str:
        """The snapshot that belongs to a checkpoint."""
        return f"{self.prefix}state:{_quoted(place.thread, place.ns, place.id)}"

    def next_state(self, place: Place) -> str:
        """The snapshot a step took that ran from a checkpoint."""
        return f"{self.prefix}next:{_quoted(place.thread, place.ns, place.id)}"

    def session(self, thread: str) -> str:
        """The session of a thread whose config names none."""
        return f"{self.prefix}session:{_quoted(thread)}"

    def run(self, run_id: str) -> str:
        """Zset of a run's checkpoints."""
        return f"{self.prefix}run:{_quoted(run_id)}"

    def all_of(self, place: Place) -> list[str]:
        """Every key that belongs to this checkpoint alone."""
        return [self.checkpoint(place), self.writes(place), self.state(place), self.next_state(place)]


def member(ns: str, checkpoint_id: str) -> bytes:
    """A checkpoint's member in the index."""
    return f"{ns}\0{checkpoint_id}".encode()


def place_of(thread: str, index_member: bytes) -> Place:
    """The checkpoint behind a member of the index."""
    ns, _, checkpoint_id = index_member.decode().partition("\0")
    return Place(thread, ns, checkpoint_id)
