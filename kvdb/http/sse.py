"""Answers on their way to the client: whole, or as server-sent events; with keep-alive; ended when the client goes.

An answer is produced by a task of its own, so that waiting for its next event can time out without disturbing it. The
status line is held back until decoding begins or `STATUS_WAIT_S` have passed: an error in that time gets a real status,
and a long prefill gets its headers early and a sign of life every `KEEP_ALIVE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kvdb.engine_client import finish
from kvdb.errors import KvdbError
from kvdb.http.ask import Answer, Ask, Event
from kvdb.http.errors import seen, status_of

KEEP_ALIVE_S = 5.0
STATUS_WAIT_S = 1.0
GONE = 499  # what is counted for a client that went away before its answer
_END = object()


class Dialect(Protocol):
    """How one API writes an answer. One object for each answer."""

    keep_alive: bytes

    def begin(self) -> bytes:
        """What a stream starts with."""
        ...

    def event(self, event: Event) -> bytes:
        """What one event becomes; may be empty."""
        ...

    def failure(self, error: KvdbError) -> bytes:
        """What an error becomes in the middle of a stream."""
        ...

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def error_body(self, error: KvdbError) -> dict[str, Any]:
        """The body of an error response."""
        ...


def sse(data: Any, name: str | None = None) -> bytes:
    """One server-sent event with JSON data."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class _Running:
    """An answer being made. Leaving the context cancels what is left of it."""

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(events))

    async def _pump(self, events: AsyncGenerator[Event, None]) -> None:
        try:
            async with contextlib.aclosing(events) as source:
                async for event in source:
                    self._queue.put_nowait(event)
            self._queue.put_nowait(_END)
        except Exception as error:
            self._queue.put_nowait(error)

    async def next(self, timeout_s: float | None) -> Any:
        """The next event, or `_END`. Raises what ended the answer, or TimeoutError."""
        async with asyncio.timeout(timeout_s):
            found = await self._queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    async def close(self) -> None:
        """Cancel, and wait until the sessions are in order again."""
        self._task.cancel()
        # Whoever leaves is often being cancelled itself, again at each await; the answer must be cancelled only once,
        # so that it comes to the end of its tidying.
        with anyio.CancelScope(shield=True), contextlib.suppress(asyncio.CancelledError):
            await finish(self._task)


def error_response(dialect_error: Callable[[KvdbError], dict[str, Any]], error: BaseException) -> Response:
    """An error as a response of its own."""
    known = seen(error)
    headers = {"retry-after": "1"} if known.retryable else None
    return JSONResponse(dialect_error(known), status_code=status_of(known), headers=headers)


async def respond(
    request: Request, ask: Ask, events: AsyncGenerator[Event, None], dialect: Dialect, *, stream: bool
) -> Response:
    """Answer a request, whole or as a stream."""
    headers = {"x-kvdb-session": ask.session} if ask.session is not None else {}
    running = _Running(events)
    if not stream:
        answer = Answer(ask.n)
        gone = asyncio.create_task(_gone(request))
        collecting = asyncio.create_task(_collect(running, answer))
        try:
            await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=GONE)  # nobody reads this
            collecting.result()
        except Exception as error:
            return error_response(dialect.error_body, error)
        finally:
            for task in (gone, collecting):
                task.cancel()
            await asyncio.gather(gone, collecting, return_exceptions=True)
            await running.close()
        if answer.usage.snapshot is not None:
            headers["x-kvdb-snapshot"] = answer.usage.snapshot
        return JSONResponse(dialect.whole(answer), headers=headers)
    first: Any = None
    try:
        first = await running.next(STATUS_WAIT_S)
    except TimeoutError:
        pass  # a long prefill: the stream begins with signs of life
    except Exception as error:
        await running.close()
        return error_response(dialect.error_body, error)
    except BaseException:
        await running.close()
        raise
    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
    body = _body(running, first, dialect)
    return StreamingResponse(body, headers=headers, media_type="text/event-stream")


async def _gone(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(running: _Running, answer: Answer) -> None:
    while (event := await running.next(None)) is not _END:
        answer.add(event)


async def _body(running: _Running, first: Any, dialect: Dialect) -> AsyncGenerator[bytes, None]:
    """The stream's bytes. Starlette cancels this when the client goes away, which cancels the answer."""
    try:
        yield dialect.begin()
        event = first
        while True:
            if event is None:
                try:
                    event = await running.next(KEEP_ALIVE_S)
                except TimeoutError:
                    yield dialect.keep_alive
                    continue
            if event is _END:
                return
            data = dialect.event(event)
            if data:
                yield data
            event = None
    except Exception as error:
        yield dialect.failure(seen(error))
    finally:
        await running.close()
