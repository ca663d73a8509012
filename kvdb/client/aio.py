"""`kvdb.AsyncClient`: the asyncio twin of sync.py; the commands themselves are calls.py for both."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import redis.asyncio
from hiredis import PushNotification
from redis.client import NEVER_DECODE
from redis.exceptions import RedisError, ResponseError

from kvdb.client import calls
from kvdb.client.binding import show_signature
from kvdb.client.calls import Call, Name, Prompt
from kvdb.client.errors import AsyncParser
from kvdb.client.frames import progress_frame, token_frame
from kvdb.client.options import connection_options, url_options
from kvdb.client.replies import Filled, Generated, Progress, Restored, Token, text

P = ParamSpec("P")
T = TypeVar("T")
Frame = TypeVar("Frame")


def _method(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run_call(build(*args, **kwargs))

    show_signature(method, build, 0)
    return method


def _session_method(
    build: Callable[Concatenate[Name, P], Call[T]],
) -> Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, T]]:
    @wraps(build)
    async def method(self: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.client.run_call(build(self.name, *args, **kwargs))

    show_signature(method, build, 1)
    return method


class AsyncStream(Generic[Frame, T]):
    """An asynchronous iterator over what a running command sends; `await result()` is its reply.

    Leaving it early (`aclose`, or the end of an `async with` block) cancels the command.
    """

    def __init__(self, client: AsyncClient, call: Call[T], frame: Callable[[list[Any]], Frame]) -> None:
        self._frames = client.exchange(call)
        self._call = call
        self._frame = frame
        self._reply: Any = None

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self

    async def __anext__(self) -> Frame:
        async for found in self._frames:
            if isinstance(found, PushNotification):
                return self._frame(found)
            self._reply = found
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what is still running."""
        await self._frames.aclose()

    async def __aenter__(self) -> AsyncStream[Frame, T]:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def result(self) -> T:
        """The command's reply; reads the rest of the stream first. Raises RedisError when it was cancelled."""
        async for _ in self:
            pass
        if self._reply is None:
            raise RedisError("the stream was closed before its end: there is no reply")
        return self._call.read(self._reply)


class AsyncClient(redis.asyncio.Redis):
    """A connection pool to a kvdb server for asyncio. Every method of `redis.asyncio.Redis` works.

    Takes the arguments of `redis.asyncio.Redis`; the defaults that differ: port 6374, RESP3, no socket timeout.
    """

    def __init__(self, host: str = "localhost", port: int = 6374, **options: Any) -> None:
        super().__init__(host=host, port=port, **connection_options(options))
        self.connection_pool.connection_kwargs.setdefault("parser_class", AsyncParser)

    @classmethod
    def from_url(cls, url: str, **options: Any) -> AsyncClient:  # type: ignore[override]
        """A client from `kvdb://[[user]:password@]host[:port][/db]`, or a redis://, rediss:// or unix:// address."""
        url, options = url_options(url, options)
        pool = redis.asyncio.ConnectionPool.from_url(url, **connection_options(options))
        return cast(AsyncClient, cls.from_pool(pool))

    async def run_call(self, call: Call[T]) -> T:
        """Send a command and read its reply."""
        if call.repeatable:
            return call.read(await self.execute_command(*call.words, **{NEVER_DECODE: True}))
        reply: Any = None
        async for found in self.exchange(call):
            reply = found
        return call.read(reply)

    async def exchange(self, call: Call[Any]) -> AsyncGenerator[Any, None]:
        """Send a command once; yield the push frames that come before its reply, and last the reply, unread."""
        connection = self.connection or await self.connection_pool.get_connection()
        finished = False
        try:
            await connection.send_command(*call.words)
            while True:
                reply = await connection.read_response(disable_decoding=True, push_request=True)
                if not isinstance(reply, PushNotification):
                    break
                yield reply
            finished = True
        except ResponseError:
            finished = True
            raise
        finally:
            if not finished:
                await connection.disconnect(nowait=True)
            if connection is not self.connection:
                await self.connection_pool.release(connection)
        yield reply

    prefill = _method(calls.prefill)
    extend = _method(calls.extend)
    generate = _method(calls.generate)
    sample = _method(calls.sample)
    logits = _method(calls.logits)
    logits_raw = _method(calls.logits_raw)
    snapshot = _method(calls.snapshot)
    snapshot_later = _method(calls.snapshot_later)
    wait_snapshot = _method(calls.wait_snapshot)
    fork = _method(calls.fork)
    rewind_to = _method(calls.rewind_to)
    rewind_tokens = _method(calls.rewind_tokens)
    rewind_steps = _method(calls.rewind_steps)
    prefix = _method(calls.prefix)
    lineage = _method(calls.lineage)
    snapinfo = _method(calls.snapinfo)
    snapdiff = _method(calls.snapdiff)
    pin = _method(calls.pin)
    unpin = _method(calls.unpin)
    tokenize = _method(calls.tokenize)
    detokenize = _method(calls.detokenize)
    engine_load = _method(calls.engine_load)
    engine_unload = _method(calls.engine_unload)
    engine_status = _method(calls.engine_status)
    engine_models = _method(calls.engine_models)
    engine_cancel = _method(calls.engine_cancel)
    store_stats = _method(calls.store_stats)
    store_verify = _method(calls.store_verify)
    store_gc = _method(calls.store_gc)
    store_compact = _method(calls.store_compact)
    store_backup = _method(calls.store_backup)
    store_export = _method(calls.store_export)
    store_export_data = _method(calls.store_export_data)
    store_import = _method(calls.store_import)
    store_import_data = _method(calls.store_import_data)

    async def restore(self, key: Name, session: Name, *, replace: bool = False) -> Restored:  # type: ignore[override]
        """Give a session the state of a snapshot. (redis-py's RESTORE is for DUMP payloads.)"""
        return await self.run_call(calls.restore(key, session, replace=replace))

    def stream(self, session: Name, max_tokens: int | None = None, **options: Any) -> AsyncStream[Token, Generated]:
        """`generate` as an iterator over tokens; takes the same options."""
        return AsyncStream(self, calls.streamed(calls.generate(session, max_tokens, **options)), token_frame)

    def prefill_stream(self, session: Name, prompt: Prompt, **options: Any) -> AsyncStream[Progress, Filled]:
        """`prefill` as an iterator over its progress; takes the same options."""
        return AsyncStream(self, calls.prefill(session, prompt, **options), progress_frame)

    def session(self, name: Name | None = None, *, drop: bool | None = None) -> AsyncSession:
        """A session by name. Without a name it gets a fresh one and ends with its `async with` block."""
        drop = name is None if drop is None else drop
        return AsyncSession(self, name if name is not None else f"session:{secrets.token_hex(8)}", drop=drop)


class AsyncSession:
    """One session of a client. As a context manager it deletes itself at the end if `drop` is set.

    Making this object sends nothing: the first prefill, restore or fork makes the session.
    """

    def __init__(self, client: AsyncClient, name: Name, *, drop: bool = False) -> None:
        self.client = client
        self.name = name
        self.drop = drop

    def __repr__(self) -> str:
        return f"AsyncSession({self.name!r})"

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.drop:
            await self.delete()

    prefill = _session_method(calls.prefill)
    extend = _session_method(calls.extend)
    generate = _session_method(calls.generate)
    sample = _session_method(calls.sample)
    logits = _session_method(calls.logits)
    logits_raw = _session_method(calls.logits_raw)
    snapshot = _session_method(calls.snapshot)
    snapshot_later = _session_method(calls.snapshot_later)
    rewind_to = _session_method(calls.rewind_to)
    rewind_tokens = _session_method(calls.rewind_tokens)
    rewind_steps = _session_method(calls.rewind_steps)
    lineage = _session_method(calls.lineage)
    cancel = _session_method(calls.engine_cancel)

    async def restore(self, key: Name) -> Restored:
        """Take the state of a snapshot, whatever the session was before."""
        return await self.client.run_call(calls.restore(key, self.name, replace=True))

    async def fork(self, *names: Name) -> list[AsyncSession]:
        """Name this session's state again; O(1) each."""
        await self.client.run_call(calls.fork(self.name, *names))
        return [AsyncSession(self.client, name) for name in names]

    async def branches(self, n: int) -> list[AsyncSession]:
        """`n` forks with names of their own, each dropped at the end of its `async with` block."""
        made = await self.fork(*(f"{text(self.name)}:{secrets.token_hex(6)}" for _ in range(n)))
        return [AsyncSession(self.client, branch.name, drop=True) for branch in made]

    def stream(self, max_tokens: int | None = None, **options: Any) -> AsyncStream[Token, Generated]:
        """`generate` as an iterator over tokens."""
        return self.client.stream(self.name, max_tokens, **options)

    async def delete(self) -> None:
        """Drop the session; its snapshots stay."""
        await self.client.delete(self.name)
