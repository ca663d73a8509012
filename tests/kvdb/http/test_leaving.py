"""Clients that leave, work that is stopped, and a daemon that goes down in the middle of an answer; both SDKs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import anthropic
import httpx
import openai
import pytest

from kvdb_tools.daemon import Daemon, free_port

from .conftest import MODEL, Served

HELLO = [{"role": "user", "content": "Tell me a long story."}]
LONG = {"model": MODEL, "max_tokens": 3000, "messages": HELLO}
STORY = {"model": MODEL, "prompt": "Once upon", "max_tokens": 3000, "temperature": 1, "seed": 3}


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon of the test's own, to be ended."""
    port = free_port()
    with Daemon(tmp_path_factory.mktemp("http") / "data", {"http-port": str(port)}) as daemon:
        yield Served(daemon, port)


def requests_of(served: Served) -> list[Any]:
    return list(served.redis.engine_status().requests)


async def until_idle(served: Served) -> None:
    """Wait until the engine has nothing to do and the answers have put their sessions away."""
    deadline = time.monotonic() + 10
    while requests_of(served) or sessions_of(served):
        assert time.monotonic() < deadline, "the work goes on, or sessions are left behind"
        await asyncio.sleep(0.02)


def sessions_of(served: Served) -> list[bytes]:
    """Sessions of answers that nobody can go on with: those that may be gone on with expire."""
    return [key for key in served.redis.scan_iter(match="http:session:*", count=1000) if served.redis.ttl(key) < 0]


async def until_busy(served: Served, op: str) -> None:
    deadline = time.monotonic() + 10
    while not any(op in str(one) for one in requests_of(served)):
        assert time.monotonic() < deadline, "the work does not begin"
        await asyncio.sleep(0.01)


# -- the client leaves -------------------------------------------------------------------------------------------------


async def test_a_stream_of_openai_that_is_closed(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        stream = await client.completions.create(**STORY, stream=True)
        async for _ in stream:
            break
        assert requests_of(served)
        await stream.close()
        await until_idle(served)


async def test_a_stream_of_anthropic_that_is_left(served: Served) -> None:
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="x", max_retries=0) as client:
        # No end token and no other side's turn at this temperature for a while: the answer is still being made.
        asked = {**LONG, "extra_body": {"temperature": 1, "seed": 6, "min_p": 0}}
        async with client.messages.stream(**asked) as stream:
            async for _ in stream:
                break
        await until_idle(served)


def ask_openai(client: openai.AsyncOpenAI, stream: bool, prompt: str) -> Awaitable[Any]:
    return client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, stream=stream)


def ask_anthropic(client: anthropic.AsyncAnthropic, stream: bool, prompt: str) -> Awaitable[Any]:
    messages = [{"role": "user", "content": prompt}]
    return client.messages.create(model=MODEL, messages=messages, max_tokens=1, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["openai", "anthropic"])
async def test_leaving_during_the_prefill_ends_it(served: Served, kind: str, stream: bool) -> None:
    """Nothing has been sent yet; the work must end all the same, and not only at the prompt's end."""
    client: Any
    ask: Callable[..., Awaitable[Any]]
    if kind == "openai":
        client, ask = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0), ask_openai
    else:
        client, ask = anthropic.AsyncAnthropic(base_url=served.url, api_key="x", max_retries=0), ask_anthropic
    async with client:
        asking = asyncio.ensure_future(ask(client, stream, f"{kind} {stream} " + "The sea was calm. " * 3500))
        await until_busy(served, "extend")
        began = time.monotonic()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until_idle(served)
        assert time.monotonic() - began < 4  # the whole prompt takes many times as long


# -- the work is stopped, the daemon goes down -------------------------------------------------------------------------


def read_openai(served: Served) -> None:
    for _ in served.openai.completions.create(**STORY, stream=True):
        pass


def read_anthropic(served: Served) -> None:
    # With most seeds the model says one sentence, and is done before it can be stopped; with this one it goes on.
    asked = {**LONG, "extra_body": {"temperature": 1, "seed": 6, "min_p": 0}}
    with served.anthropic.messages.stream(**asked) as stream:
        for _ in stream:
            pass


def stop_it(served: Served) -> None:
    (name,) = served.redis.scan_iter(match="http:session:*")
    served.redis.execute_command("ENGINE", "CANCEL", name)


def end_it(served: Served) -> None:
    os.kill(served.daemon.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("stop", "words"), [(stop_it, "cancelled"), (end_it, "shutting down")], ids=["ENGINE CANCEL", "SIGTERM"]
)
@pytest.mark.parametrize(
    ("read", "error"),
    [(read_openai, openai.APIError), (read_anthropic, anthropic.APIError)],
    ids=["openai", "anthropic"],
)
async def test_an_answer_that_is_stopped_ends_with_an_error(
    own: Served, read: Callable[[Served], None], error: type[Exception], stop: Callable[[Served], None], words: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, own)
        await until_busy(own, "generate")
        stop(own)
        with pytest.raises(error, match=f"(?i){words}"):
            reading.result(timeout=20)


async def test_a_whole_answer_that_a_shutdown_stops_may_be_asked_again(own: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(own.openai.completions.create, **STORY)
        await until_busy(own, "generate")
        began = time.monotonic()
        own.daemon.stop()
        assert time.monotonic() - began < 10
        with pytest.raises(openai.InternalServerError, match="shutting down") as found:
            reading.result(timeout=20)
    assert found.value.status_code == 503


async def test_after_a_crash_in_the_middle_of_an_answer_the_prompt_is_still_there(own: Served) -> None:
    asked = {**STORY, "prompt": "The keeper of the light wrote in his book. " * 30}
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(own.openai.completions.create(**asked, stream=True)))
        await until_busy(own, "generate")
        own.daemon.kill()
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            reading.result(timeout=20)
    own.daemon.start()
    again = own.openai.completions.create(**{**asked, "max_tokens": 3})
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens > 300


# -- at the same time --------------------------------------------------------------------------------------------------


def test_two_requests_of_one_conversation_at_the_same_time(served: Served) -> None:
    """They do not wait for each other's session, do not mix, and both are served from the turn before."""
    said = [{"role": "user", "content": "Who are you?"}]
    first = served.openai.chat.completions.create(model=MODEL, messages=said, max_tokens=60, temperature=0)
    said.append({"role": "assistant", "content": first.choices[0].message.content})

    def go_on(text: str) -> Any:
        messages = [*said, {"role": "user", "content": text}]
        return served.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)

    texts = ["Hello!", "Thank you!", "Hello!", "Who made you?"]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(go_on, texts))
    for text, reply in zip(texts, replies, strict=True):
        assert reply.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens
        assert reply.choices[0].message.content == go_on(text).choices[0].message.content


async def test_a_long_text_does_not_hold_up_the_others(served: Served) -> None:
    """Two megabytes take a while to tokenise; PING is answered meanwhile."""
    body = {"model": MODEL, "prompt": "The sea was calm and the boats lay still. " * 50_000, "max_tokens": 1}
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        began = time.monotonic()
        asking = asyncio.ensure_future(client.post("/v1/completions", content=json.dumps(body)))
        longest, n = 0.0, 0
        while not asking.done():
            sent = time.monotonic()
            await asyncio.to_thread(served.redis.ping)
            longest, n = max(longest, time.monotonic() - sent), n + 1
            await asyncio.sleep(0.005)
        took = time.monotonic() - began
    assert asking.result().status_code == 400  # far over the context
    assert n > 10
    assert longest < took / 4


async def test_tidying_survives_repeated_cancels(served: Served) -> None:
    """The web framework cancels a stream again at each await until it has ended."""
    before = set(served.redis.scan_iter(match="http:session:*", count=1000))
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        for n in (1, 3):
            stream = await client.completions.create(**STORY, n=n, stream=True)
            async with aclosing(stream.response.aiter_lines()) as lines:
                async for _ in lines:
                    break
            await stream.close()
        await until_idle(served)
    assert set(served.redis.scan_iter(match="http:session:*", count=1000)) == before
