"""Streams: signs of life while nothing happens, errors before and after the first byte, clients that go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb.errors import EngineDownError
from kvdb.http import sse
from kvdb.http.ask import Begin, Done, Event


class Plain:
    keep_alive = b"(alive)"

    def begin(self) -> bytes:
        return b"(begin)"

    def event(self, event: Event) -> bytes:
        return f"({type(event).__name__})".encode()

    def failure(self, error: Exception) -> bytes:
        return f"(failed: {error})".encode()

    def error_body(self, error: Exception) -> dict[str, Any]:
        return {"error": str(error)}


ASK: Any = SimpleNamespace(session=None, n=1)
REQUEST: Any = None


async def body_of(response: Any) -> bytes:
    return b"".join([chunk async for chunk in response.body_iterator])


async def test_a_long_prefill_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STATUS_WAIT_S", 0.01)
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)

    async def events() -> AsyncGenerator[Event, None]:
        await asyncio.sleep(0.1)
        yield Begin(1, 0)
        yield Done(1, 0, 0, 0)

    response = await sse.respond(REQUEST, ASK, events(), Plain(), stream=True)
    body = await body_of(response)
    assert body.startswith(b"(begin)(alive)(alive)")
    assert body.endswith(b"(Begin)(Done)")


async def test_an_early_error_is_a_status_and_a_late_one_an_event() -> None:
    async def early() -> AsyncGenerator[Event, None]:
        raise EngineDownError("gone")
        yield

    async def late() -> AsyncGenerator[Event, None]:
        yield Begin(1, 0)
        raise EngineDownError("gone")

    response = await sse.respond(REQUEST, ASK, early(), Plain(), stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    response = await sse.respond(REQUEST, ASK, late(), Plain(), stream=True)
    assert await body_of(response) == b"(begin)(Begin)(failed: gone)"


async def test_an_unexpected_error_shows_a_number_only() -> None:
    async def broken() -> AsyncGenerator[Event, None]:
        yield Begin(1, 0)
        raise ZeroDivisionError("secret")

    body = await body_of(await sse.respond(REQUEST, ASK, broken(), Plain(), stream=True))
    assert b"internal error" in body
    assert b"secret" not in body


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_ends_the_answer(stream: bool) -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncGenerator[Event, None]:
        try:
            while True:
                yield Begin(1, 0)
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    request: Any = SimpleNamespace(receive=receive)
    response = await sse.respond(request, ASK, endless(), Plain(), stream=stream)
    if stream:
        chunks = response.body_iterator
        await anext(chunks)
        await chunks.aclose()
    else:
        assert response.status_code == 499
    assert ended.is_set()
