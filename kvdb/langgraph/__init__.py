"""`KVDBSaver`: LangGraph checkpoints in kvdb, each with the model's state at that point.

Going back in the graph is going back in the model: a checkpoint owns a snapshot, deleting or pruning the one frees the
other. There are two ways to connect a graph's steps to a session:

- `with saver.session(config) as session:` inside a node. The session stands at the state of the checkpoint that the
  step runs from, whatever happened since; at the end of the block its state is stored and becomes that of the next
  checkpoint.
- `config["configurable"]["kvdb_session"]` names a session that the nodes use on their own; each checkpoint takes a
  snapshot of it as it then stands. Run such a graph with `durability="sync"`, so that no step overtakes it.

The synchronous methods need a `kvdb.Client`; the asynchronous ones work with either client (a synchronous one is used
from a thread).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from redis.exceptions import ResponseError, WatchError

from kvdb.client import AsyncClient, AsyncSession, Client, Session
from kvdb.langgraph import steps
from kvdb.langgraph.keys import Keys, Place
from kvdb.langgraph.steps import Commit, Origin, Steps, Watch, Words

T = TypeVar("T")

STATE_TIMEOUT_S = 10.0
_POLL_S = 0.01
_RAW: dict[str, Any] = {"NEVER_DECODE": True}


class KVDBSaver(BaseCheckpointSaver[str]):
    """A checkpointer over a kvdb server.

    client: a `kvdb.Client` or `kvdb.AsyncClient`. prefix: what all key names begin with. serde: LangGraph's serializer;
    an encrypting one works, but its output differs every time, so growing lists are then stored whole at every step.
    """

    def __init__(
        self, client: Client | AsyncClient, *, prefix: str = "langgraph:", serde: SerializerProtocol | None = None
    ) -> None:
        super().__init__(serde=serde)
        self.client = client
        self.keys = Keys(prefix)
        self._open: set[str] = set()

    # -- sending ------------------------------------------------------------------------------------------------------

    @property
    def _sync(self) -> Client:
        if not isinstance(self.client, Client):
            raise TypeError("this KVDBSaver has a kvdb.AsyncClient: use the graph's asynchronous methods (ainvoke ...)")
        return self.client

    def _run(self, operation: Callable[[], Steps[T]]) -> T:
        """Carry an operation out with the synchronous client."""
        while True:
            work, reply = operation(), None
            with self._sync.pipeline() as pipe:
                watching = False
                try:
                    while True:
                        step = work.send(reply)
                        if isinstance(step, Watch):
                            pipe.watch(*step.keys)
                            watching, reply = True, None
                        elif isinstance(step, Commit):
                            if watching:
                                pipe.multi()
                            for words in step.commands:
                                pipe.execute_command(*words)
                            reply, watching = pipe.execute(), False
                        elif watching:
                            reply = [pipe.execute_command(*words, **_RAW) for words in step]
                        else:
                            with self._sync.pipeline(transaction=False) as batch:
                                for words in step:
                                    batch.execute_command(*words, **_RAW)
                                reply = batch.execute()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                except WatchError:
                    continue

    async def _arun(self, operation: Callable[[], Steps[T]]) -> T:
        """Carry an operation out with the asyncio client, or in a thread with the synchronous one."""
        if isinstance(self.client, Client):
            return await asyncio.to_thread(self._run, operation)
        while True:
            work, reply = operation(), None
            async with self.client.pipeline() as pipe:
                watching = False
                try:
                    while True:
                        step = work.send(reply)
                        if isinstance(step, Watch):
                            await pipe.watch(*step.keys)
                            watching, reply = True, None
                        elif isinstance(step, Commit):
                            if watching:
                                pipe.multi()
                            for words in step.commands:
                                pipe.execute_command(*words)
                            reply, watching = await pipe.execute(), False
                        elif watching:
                            reply = [await pipe.execute_command(*words, **_RAW) for words in step]
                        else:
                            async with self.client.pipeline(transaction=False) as batch:
                                for words in step:
                                    batch.execute_command(*words, **_RAW)
                                reply = await batch.execute()
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                except WatchError:
                    continue

    # -- checkpoints: synchronous -------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint a config names, or the newest of its thread and namespace."""
        return self._run(partial(steps.get_tuple, self.keys, self.serde, config))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """The matching checkpoints, newest first."""
        for place in self._run(partial(steps.places, self.keys, config, before)):
            if limit is not None and limit <= 0:
                return
            found = self._run(partial(steps.load_matching, self.keys, self.serde, place, filter))
            if found is not None:
                limit = limit - 1 if limit is not None else None
                yield found

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint with its new channel values and the model's state."""
        place = steps.place_from(config, checkpoint["id"])
        origin, look = self._run(partial(steps.origin_of, self.keys, config, metadata, place))
        name = config["configurable"].get("kvdb_session")
        if look and name is not None:
            try:
                self._sync.snapshot(name, self.keys.state(place))
                origin = Origin(self.keys.state(place), False, "put")
            except ResponseError as error:
                if not _is_without_state(error):
                    raise
        done = self._run(partial(steps.put, self.keys, self.serde, config, checkpoint, metadata, new_versions, origin))
        return done  # type: ignore[return-value]

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store a task's writes beside the checkpoint it ran from."""
        self._run(partial(steps.put_writes, self.keys, self.serde, config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread: checkpoints, writes, values, states and its session."""
        self._run(partial(steps.delete_thread, self.keys, str(thread_id)))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of these runs, with their writes and states."""
        found = self._run(partial(steps.run_threads, self.keys, list_of(run_ids)))
        for thread, doomed in found.items():
            self._run(partial(steps.remove, self.keys, self.serde, thread, doomed))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread under another id; states are shared, not written again."""
        self._run(partial(steps.copy_thread, self.keys, str(source_thread_id), str(target_thread_id)))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Drop what a thread no longer needs. keep_latest: all but the newest of each namespace; delete: everything."""
        _check_strategy(strategy)
        for thread in map(str, thread_ids):
            if strategy == "delete":
                self.delete_thread(thread)
            else:
                doomed = self._run(partial(steps.prunable, self.keys, self.serde, thread))
                self._run(partial(steps.remove, self.keys, self.serde, thread, doomed))

    # -- checkpoints: asynchronous ------------------------------------------------------------------------------------

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As `get_tuple`."""
        return await self._arun(partial(steps.get_tuple, self.keys, self.serde, config))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """As `list`."""
        for place in await self._arun(partial(steps.places, self.keys, config, before)):
            if limit is not None and limit <= 0:
                return
            found = await self._arun(partial(steps.load_matching, self.keys, self.serde, place, filter))
            if found is not None:
                limit = limit - 1 if limit is not None else None
                yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """As `put`."""
        if isinstance(self.client, Client):
            return await asyncio.to_thread(self.put, config, checkpoint, metadata, new_versions)
        place = steps.place_from(config, checkpoint["id"])
        origin, look = await self._arun(partial(steps.origin_of, self.keys, config, metadata, place))
        name = config["configurable"].get("kvdb_session")
        if look and name is not None:
            try:
                await self.client.snapshot(name, self.keys.state(place))
                origin = Origin(self.keys.state(place), False, "put")
            except ResponseError as error:
                if not _is_without_state(error):
                    raise
        done = await self._arun(
            partial(steps.put, self.keys, self.serde, config, checkpoint, metadata, new_versions, origin)
        )
        return done  # type: ignore[return-value]

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """As `put_writes`."""
        await self._arun(partial(steps.put_writes, self.keys, self.serde, config, writes, task_id, task_path))

    async def adelete_thread(self, thread_id: str) -> None:
        """As `delete_thread`."""
        await self._arun(partial(steps.delete_thread, self.keys, str(thread_id)))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """As `delete_for_runs`."""
        found = await self._arun(partial(steps.run_threads, self.keys, list_of(run_ids)))
        for thread, doomed in found.items():
            await self._arun(partial(steps.remove, self.keys, self.serde, thread, doomed))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """As `copy_thread`."""
        await self._arun(partial(steps.copy_thread, self.keys, str(source_thread_id), str(target_thread_id)))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """As `prune`."""
        _check_strategy(strategy)
        for thread in map(str, thread_ids):
            if strategy == "delete":
                await self.adelete_thread(thread)
            else:
                doomed = await self._arun(partial(steps.prunable, self.keys, self.serde, thread))
                await self._arun(partial(steps.remove, self.keys, self.serde, thread, doomed))

    def get_next_version(self, current: str | None, channel: None) -> str:
        """Counted, with zeros so that text sorts as numbers do, and random at the end: after time travel two branches
        reach the same count with different values, which must not be stored under one key.
        """
        count = int(str(current).partition(".")[0]) if current is not None else 0
        return f"{count + 1:016}.{secrets.token_hex(8)}"

    # -- states -------------------------------------------------------------------------------------------------------

    def state_key(self, config: RunnableConfig) -> str | None:
        """The key of the snapshot that belongs to a checkpoint (a config from the graph's history), or None."""
        place = steps.place_from(config, config["configurable"]["checkpoint_id"])
        return self.keys.state(place) if self._run(partial(steps.state_of, self.keys, place))[1] else None

    async def astate_key(self, config: RunnableConfig) -> str | None:
        """As `state_key`."""
        place = steps.place_from(config, config["configurable"]["checkpoint_id"])
        return self.keys.state(place) if (await self._arun(partial(steps.state_of, self.keys, place)))[1] else None

    @contextmanager
    def session(self, config: RunnableConfig) -> Iterator[Session]:
        """Inside a node: the thread's session at the state this step runs from; stored at the end of the block.

        An exception in the block stores nothing: a retry of the node finds the same state again. Raises RuntimeError
        when another step of this saver has the thread's session open, and when checkpoints are not stored while the
        graph runs (`durability="exit"`).
        """
        name, levels = self._enter(config)
        try:
            deadline = time.monotonic() + STATE_TIMEOUT_S
            while not (found := self._run(partial(steps.nearest_state, self.keys, levels)))[0]:
                _check_deadline(deadline)
                time.sleep(_POLL_S)
            if found[1] is not None:
                self._sync.restore(found[1], name, replace=True)
            else:
                self._sync.delete(name)
            session = Session(self._sync, name)
            yield session
            self._keep(name, levels)
        finally:
            self._open.discard(name)

    def _keep(self, name: str, levels: Sequence[Place]) -> None:
        first, *others = (self.keys.next_state(place) for place in reversed(levels))
        try:
            self._sync.snapshot(name, first)
        except ResponseError as error:
            if _is_without_state(error):
                return  # the block did nothing with its session
            raise
        copies: tuple[Words, ...] = tuple(("COPY", first, other, "REPLACE") for other in others)
        if copies:
            self._run(lambda: _commit(copies))

    @asynccontextmanager
    async def asession(self, config: RunnableConfig) -> AsyncIterator[AsyncSession]:
        """As `session`, for a saver with a `kvdb.AsyncClient`."""
        client = self.client
        if not isinstance(client, AsyncClient):
            raise TypeError("asession needs a KVDBSaver with a kvdb.AsyncClient")
        name, levels = self._enter(config)
        try:
            deadline = time.monotonic() + STATE_TIMEOUT_S
            while not (found := await self._arun(partial(steps.nearest_state, self.keys, levels)))[0]:
                _check_deadline(deadline)
                await asyncio.sleep(_POLL_S)
            if found[1] is not None:
                await client.restore(found[1], name, replace=True)
            else:
                await client.delete(name)
            yield AsyncSession(client, name)
            first, *others = (self.keys.next_state(place) for place in reversed(levels))
            try:
                await client.snapshot(name, first)
            except ResponseError as error:
                if not _is_without_state(error):
                    raise
            else:
                copies: tuple[Words, ...] = tuple(("COPY", first, other, "REPLACE") for other in others)
                if copies:
                    await self._arun(lambda: _commit(copies))
        finally:
            self._open.discard(name)

    def _enter(self, config: RunnableConfig) -> tuple[str, Sequence[Place]]:
        """The session's name, and the checkpoints this step runs from: the graph's own last, those around it before."""
        found = config["configurable"]
        above = found.get("checkpoint_map")
        if not above:
            raise RuntimeError("KVDBSaver.session needs the config that LangGraph passes to a node of a running graph")
        thread = str(found["thread_id"])
        name = found.get("kvdb_session") or self.keys.session(thread)
        if name in self._open:
            raise RuntimeError(
                f"session '{name}' is open in another step: one step at a time has the thread's session; parallel steps"
                " can work on forks of it"
            )
        self._open.add(name)
        return name, [Place(thread, ns, above[ns]) for ns in sorted(above, key=len)]


def list_of(run_ids: Sequence[str]) -> Sequence[str]:
    """Run ids as text."""
    return [str(one) for one in run_ids]


def _commit(commands: tuple[Words, ...]) -> Steps[None]:
    yield Commit(commands)


def _is_without_state(error: ResponseError) -> bool:
    return str(error).startswith(("no such session", "the session is empty"))


def _check_strategy(strategy: str) -> None:
    if strategy not in ("keep_latest", "delete"):
        raise ValueError(f"unknown strategy '{strategy}': keep_latest or delete")


def _check_deadline(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(
            "the checkpoint this step runs from is not stored: KVDBSaver.session needs a graph that runs with"
            ' durability="sync" or "async"'
        )
