"""`kvdb.Client`: redis-py's client with the kvdb commands as typed methods, sessions and streams.

A command that is not repeatable, or that streams, is exchanged on a connection of its own without redis-py's retry.
Closing that connection is how unfinished work is cancelled: the server stops at the next chunk and the session stays
valid at its last complete token.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import redis
from hiredis import PushNotification
from redis.client import NEVER_DECODE
from redis.exceptions import RedisError, ResponseError

from kvdb.client import calls
from kvdb.client.binding import show_signature
from kvdb.client.calls import Call, Name, Prompt
from kvdb.client.errors import Parser
from kvdb.client.frames import progress_frame, token_frame
from kvdb.client.options import connection_options, url_options
from kvdb.client.replies import Filled, Generated, Progress, Restored, Token, text

P = ParamSpec("P")
T = TypeVar("T")
Frame = TypeVar("Frame")


def _method(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    @wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run_call(build(*args, **kwargs))

    show_signature(method, build, 0)
    return method


def _session_method(build: Callable[Concatenate[Name, P], Call[T]]) -> Callable[Concatenate[Session, P], T]:
    @wraps(build)
    def method(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.client.run_call(build(self.name, *args, **kwargs))

    show_signature(method, build, 1)
    return method


class Stream(Generic[Frame, T]):
    """An iterator over what a running command sends; `result` is its reply, once the iteration is over.

    Leaving it early (`close`, or the end of a `with` block) cancels the command.
    """

    def __init__(self, client: Client, call: Call[T], frame: Callable[[list[Any]], Frame]) -> None:
        self._frames = client.exchange(call)
        self._call = call
        self._frame = frame
        self._result: T | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        try:
            return self._frame(next(self._frames))
        except StopIteration as end:
            if end.value is not None:
                self._result = self._call.read(end.value)
            raise StopIteration from None

    def close(self) -> None:
        """Cancel what is still running."""
        self._frames.close()

    def __enter__(self) -> Stream[Frame, T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def result(self) -> T:
        """The command's reply; reads the rest of the stream first. Raises RedisError when it was cancelled."""
        for _ in self:
            pass
        if self._result is None:
            raise RedisError("the stream was closed before its end: there is no reply")
        return self._result


class Client(redis.Redis):
    """A connection pool to a kvdb server. Every method of `redis.Redis` works; the kvdb commands are typed methods.

    Takes the arguments of `redis.Redis`; the defaults that differ: port 6374, RESP3, no socket timeout (a long prefill
    is not a hang). Thread-safe as redis-py's client is.
    """

    def __init__(self, host: str = "localhost", port: int = 6374, **options: Any) -> None:
        super().__init__(host=host, port=port, **connection_options(options))
        self.connection_pool.connection_kwargs.setdefault("parser_class", Parser)

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Client:
        """A client from `kvdb://[[user]:password@]host[:port][/db]`, or a redis://, rediss:// or unix:// address."""
        url, options = url_options(url, options)
        pool = redis.ConnectionPool.from_url(url, **connection_options(options))
        return cast(Client, cls.from_pool(pool))

    def run_call(self, call: Call[T]) -> T:
        """Send a command and read its reply."""
        if call.repeatable:
            return call.read(self.execute_command(*call.words, **{NEVER_DECODE: True}))
        frames = self.exchange(call)
        while True:
            try:
                next(frames)
            except StopIteration as end:
                return call.read(end.value)

    def exchange(self, call: Call[Any]) -> Generator[list[Any], None, Any]:
        """Send a command once; yield the push frames that come before its reply, return the reply unread."""
        connection = self.connection or self.connection_pool.get_connection()
        finished = False
        try:
            connection.send_command(*call.words)
            while True:
                reply = connection.read_response(disable_decoding=True, push_request=True)
                if not isinstance(reply, PushNotification):
                    break
                yield reply
            finished = True
        except ResponseError:
            finished = True
            raise
        finally:
            if not finished:
                connection.disconnect()
            if connection is not self.connection:
                self.connection_pool.release(connection)
        return reply

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

    def restore(self, key: Name, session: Name, *, replace: bool = False) -> Restored:  # type: ignore[override]
        """Give a session the state of a snapshot. (redis-py's RESTORE is for DUMP payloads.)"""
        return self.run_call(calls.restore(key, session, replace=replace))

    def stream(self, session: Name, max_tokens: int | None = None, **options: Any) -> Stream[Token, Generated]:
        """`generate` as an iterator over tokens; takes the same options."""
        return Stream(self, calls.streamed(calls.generate(session, max_tokens, **options)), token_frame)

    def prefill_stream(self, session: Name, prompt: Prompt, **options: Any) -> Stream[Progress, Filled]:
        """`prefill` as an iterator over its progress; takes the same options."""
        return Stream(self, calls.prefill(session, prompt, **options), progress_frame)

    def session(self, name: Name | None = None, *, drop: bool | None = None) -> Session:
        """A session by name. Without a name it gets a fresh one and ends with its `with` block."""
        drop = name is None if drop is None else drop
        return Session(self, name if name is not None else f"session:{secrets.token_hex(8)}", drop=drop)


class Session:
    """One session of a client. As a context manager it deletes itself at the end if `drop` is set.

    Making this object sends nothing: the first prefill, restore or fork makes the session.
    """

    def __init__(self, client: Client, name: Name, *, drop: bool = False) -> None:
        self.client = client
        self.name = name
        self.drop = drop

    def __repr__(self) -> str:
        return f"Session({self.name!r})"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self.drop:
            self.delete()

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

    def restore(self, key: Name) -> Restored:
        """Take the state of a snapshot, whatever the session was before."""
        return self.client.run_call(calls.restore(key, self.name, replace=True))

    def fork(self, *names: Name) -> list[Session]:
        """Name this session's state again; O(1) each."""
        self.client.run_call(calls.fork(self.name, *names))
        return [Session(self.client, name) for name in names]

    def branches(self, n: int) -> list[Session]:
        """`n` forks with names of their own, each dropped at the end of its `with` block."""
        made = self.fork(*(f"{text(self.name)}:{secrets.token_hex(6)}" for _ in range(n)))
        return [Session(self.client, branch.name, drop=True) for branch in made]

    def stream(self, max_tokens: int | None = None, **options: Any) -> Stream[Token, Generated]:
        """`generate` as an iterator over tokens."""
        return self.client.stream(self.name, max_tokens, **options)

    def delete(self) -> None:
        """Drop the session; its snapshots stay."""
        self.client.delete(self.name)
