"""One session in use: its timeline, and whether the engine holds its state.

A session's timeline is its base snapshot and the tokens since (the journal). Its live state may be resident in the
engine worker; it is rebuilt from base and journal when it is not.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field

from kvdb.engine_client import EngineClient
from kvdb_engine.catalog import ModelInfo
from kvdb_protocol.ids import extend_prefix, root_prefix


class Model:
    """A model the daemon serves: what it is, and the worker that runs it. spec: what `open_model` took."""

    def __init__(self, info: ModelInfo, spec: str) -> None:
        self.info = info
        self.client = EngineClient(spec, info.name)
        self.write_lock = asyncio.Lock()  # one writer to the worker's segment at a time


@dataclass(slots=True, eq=False)
class Session:
    """A timeline in use.

    generation: the worker generation in which its state is resident, -1
    for none. shares_ids: `ids` belongs to a fork too and is copied before it grows.
    Invariant: while `lock` is free, a resident state is at exactly the tokens `ids`.
    """

    uid: bytes
    model: Model
    base: bytes | None
    base_tokens: int
    ids: array[int]
    generation: int = -1
    used: float = 0.0
    shares_ids: bool = False
    prefixes: list[bytes] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def n_tokens(self) -> int:
        """Tokens of the timeline."""
        return len(self.ids)

    @property
    def is_clean(self) -> bool:
        """Whether the timeline is exactly its base snapshot."""
        return self.base is not None and self.base_tokens == len(self.ids)

    @property
    def is_resident(self) -> bool:
        """Whether the worker that runs now holds the state."""
        return self.model.client.running and self.generation == self.model.client.generation

    def prefix_hashes(self, n_pages: int) -> list[bytes]:
        """Prefix hashes after each of the first `n_pages` pages; computed once."""
        page_bytes = 4 * self.model.info.layout.page_tokens
        data = memoryview(self.ids).cast("B")
        while len(self.prefixes) < n_pages:
            at = len(self.prefixes) * page_bytes
            parent = self.prefixes[-1] if self.prefixes else root_prefix(self.model.info.family)
            self.prefixes.append(extend_prefix(parent, data[at : at + page_bytes]))
        return self.prefixes[:n_pages]

    def become(self, base: bytes | None, base_tokens: int, ids: array[int]) -> None:
        """Stand on another timeline; the live state, if any, is no longer this one."""
        self.base, self.base_tokens, self.ids = base, base_tokens, ids
        self.shares_ids = False
        self.generation = -1
        self.prefixes = []


def ids_array(data: bytes | memoryview) -> array[int]:
    """Token ids from u32 little-endian bytes (kvdb runs on little-endian machines only)."""
    ids = array("I")
    ids.frombytes(bytes(data))
    return ids
