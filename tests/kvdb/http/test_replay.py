"""Stateless clients send everything again; only what is new is computed. Also after SIGKILL, and other spellings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvdb_tools.daemon import Daemon, free_port

from . import talks
from .conftest import MODEL, Served
from .talks import DIALECTS, REQUESTS, TOOLS, Chat, Talk, reordered

SYSTEM = {"role": "system", "content": talks.SYSTEM}


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon of the test's own, to be killed."""
    port = free_port()
    with Daemon(tmp_path_factory.mktemp("http") / "data", {"http-port": str(port)}) as daemon:
        yield Served(daemon, port)


def ask(served: Served, messages: list[Any], **more: Any) -> Any:
    asked = {"model": MODEL, "messages": messages, "tools": TOOLS, "max_tokens": 80, "temperature": 0}
    return served.openai.chat.completions.create(**{**asked, **more})


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda kind: kind.__name__)
def test_only_the_new_tokens_are_computed(served: Served, dialect: type[Talk]) -> None:
    talk = dialect(served)
    for request in REQUESTS:
        talk.exchange(request)
    assert len(talk.computed) == 6
    assert talk.computed[1:] == talk.new_tokens[1:]
    assert max(talk.computed[1:]) < 40 < min(talk.new_tokens[0], talk.total)


def test_the_same_after_sigkill(own: Served) -> None:
    """In each dialect; every second time the client spells its JSON another way than the server sent it."""
    spoken = [dialect(own) for dialect in DIALECTS]
    for number, request in enumerate(REQUESTS):
        for talk in spoken:
            talk.exchange(request, reordered if number % 2 else as_it_is)
        own.daemon.kill()
        own.daemon.start()
    for talk in spoken:
        assert talk.computed[1:] == talk.new_tokens[1:]
        assert max(talk.computed[1:]) < 40


def as_it_is(value: Any) -> Any:
    return value


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda kind: kind.__name__)
def test_other_spellings_of_the_same_conversation(served: Served, dialect: type[Talk]) -> None:
    talk = dialect(served)
    for number, request in enumerate(REQUESTS[:2]):
        talk.exchange(f"{request} ", reordered if number else as_it_is)
    assert talk.computed[1:] == talk.new_tokens[1:]
    assert "note_write" in json.dumps(talk.messages)  # a call whose arguments have an order


def test_reasoning_that_the_client_drops_is_still_there(served: Served) -> None:
    asked = [SYSTEM, {"role": "user", "content": "Think."}]
    for seed in range(20):  # the first in which the model ends its thought and says something
        first = ask(served, asked, reasoning_effort="low", max_tokens=200, temperature=0.7, seed=seed)
        message = first.choices[0].message
        if first.choices[0].finish_reason == "stop" and message.content:
            break
    assert message.content and message.reasoning_content
    again = [
        SYSTEM,
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "Thank you!"},
    ]
    second = ask(served, again, reasoning_effort="low", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_a_changed_answer_is_no_replay(served: Served) -> None:
    talk = Chat(served)
    talk.exchange(REQUESTS[0])
    changed = [
        SYSTEM,
        *talk.messages[:-1],
        {"role": "assistant", "content": "It is 43."},
        {"role": "user", "content": "Sure?"},
    ]
    reply = ask(served, changed)
    # The timeline goes on from the last turn that is as it was: the call, not the answer after it.
    assert talk.total - 60 < reply.usage.prompt_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens < talk.total
    assert reply.usage.prompt_tokens_details.cached_tokens > talk.total - 60


def test_an_unknown_conversation_uses_the_sampled_blocks(served: Served) -> None:
    """Another system text: nothing can be reused, but each call is rendered as it was sampled."""
    talk = Chat(served)
    talk.exchange(REQUESTS[0])
    other = [{"role": "system", "content": "Be kind."}, *talk.messages, {"role": "user", "content": "Thanks."}]
    first = ask(served, other, max_tokens=2)
    spelled = ask(served, reordered(other), max_tokens=2)
    assert spelled.usage.prompt_tokens == first.usage.prompt_tokens


def test_a_retry_of_a_long_prompt_computes_nothing(served: Served) -> None:
    asked = {"model": MODEL, "prompt": "A tale of many words. " * 40, "max_tokens": 3}
    first = served.openai.completions.create(**asked)
    again = served.openai.completions.create(**asked)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens


def test_conversations_share_their_system_part(served: Served) -> None:
    system = {"role": "system", "content": "You know the sea. " * 60}
    first = ask(served, [system, {"role": "user", "content": "Hello!"}], max_tokens=2)
    second = ask(served, [system, {"role": "user", "content": "Goodbye."}], max_tokens=2)
    assert first.usage.prompt_tokens_details.cached_tokens < 30
    assert second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens < 10
    reasons = {served.redis.snapinfo(key).reason for key in served.redis.scan_iter(match="http:*", _type="snapshot")}
    assert {"cold", "continued"} <= reasons


def test_what_only_a_retry_can_use_is_kept_for_an_hour(own: Served) -> None:
    talk = Chat(own)
    talk.exchange(REQUESTS[0])

    def hours(pattern: str) -> list[int]:
        return sorted(round(own.redis.ttl(key) / 3600) for key in own.redis.scan_iter(match=pattern))

    assert hours("http:turn:*") == [1, 7 * 24]
    assert hours("http:prompt:*") == [7 * 24]  # the system part
    ask(own, [{"role": "user", "content": "One long question. " * 60}], max_tokens=1)
    assert hours("http:prompt:*") == [1, 7 * 24, 7 * 24]  # the question, and the tools without the system text
    ask(own, [SYSTEM, *talk.messages[:2]])  # a retry of the first turn's answer: it may go on from there again
    assert hours("http:turn:*").count(7 * 24) == 2


def test_a_named_session_and_a_snapshot(served: Served) -> None:
    headers = {"X-KVDB-Session": "my-agent", "X-KVDB-Snapshot": "my-agent:1"}
    asked = {"model": MODEL, "messages": [SYSTEM, {"role": "user", "content": "Hello!"}], "max_tokens": 20}
    reply = served.http.post("/v1/chat/completions", json=asked, headers=headers)
    body = reply.json()
    assert body["kvdb"] == {"session": "my-agent", "snapshot": "my-agent:1"}
    assert reply.headers["x-kvdb-session"] == "my-agent"
    assert reply.headers["x-kvdb-snapshot"] == "my-agent:1"
    info = served.redis.snapinfo("my-agent:1")
    assert (info.tokens, info.ttl_ms) == (body["usage"]["total_tokens"], -1)
    assert served.redis.rewind_to("my-agent", "my-agent:1").recomputed == 0
    wrong = served.http.post("/v1/chat/completions", json=asked, headers={"X-KVDB-Session": "my-agent:1"})
    assert wrong.status_code == 409
    served.redis.set("plain", "text")
    wrong = served.http.post("/v1/chat/completions", json=asked, headers={"X-KVDB-Snapshot": "plain"})
    assert wrong.status_code == 409
    assert served.redis.get("plain") == b"text"


def test_a_snapshot_for_each_turn(served: Served) -> None:
    """Each turn's state under a name of its own: any of them can be gone back to, and the streams name them too."""
    said: list[Any] = [{"role": "user", "content": "Who are you?"}]
    for number in range(3):
        headers = {"X-KVDB-Session": "turns", "X-KVDB-Snapshot": f"turns:{number}"}
        asked = {"model": MODEL, "messages": said, "max_tokens": 30, "temperature": 0, "stream": number == 1}
        reply = served.http.post("/v1/chat/completions", json=asked, headers=headers)
        if number == 1:
            events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
            assert json.loads(events[-1])["kvdb"] == {"session": "turns", "snapshot": "turns:1"}
            text = "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events[:-1])
        else:
            text = reply.json()["choices"][0]["message"]["content"]
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": "Thank you!"}]
    tokens = [served.redis.snapinfo(f"turns:{number}").tokens for number in range(3)]
    assert tokens == sorted(set(tokens))
    back = served.redis.rewind_to("turns", "turns:0")
    assert (back.tokens, back.recomputed) == (tokens[0], 0)


def test_parallel_requests_do_not_mix(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def run(number: int) -> str:
        asked = {"prompt": f"{number} is the number.", "max_tokens": 12, "temperature": 0}
        return served.openai.completions.create(model=MODEL, **asked).choices[0].text

    alone = [run(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, range(6))) == alone


def test_a_text_that_goes_on_is_found_by_its_text(served: Served) -> None:
    """The sampled tokens of an answer that is sent back as text are not what the tokenizer makes of it."""
    prompt = "The keeper of the light wrote in his book, day after day: " * 6
    for seed in range(4):
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 13, "temperature": 1.3, "seed": seed}
        first = served.openai.completions.create(**asked)
        assert first.choices[0].finish_reason == "length"
        again = {**asked, "prompt": prompt + first.choices[0].text + " and then the wind", "max_tokens": 1}
        second = served.openai.completions.create(**again)
        if "\ufffd" not in first.choices[0].text:
            assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_answers_leave_few_sessions_behind(served: Served) -> None:
    before = sum(1 for _ in served.redis.scan_iter(match="http:session:*"))
    for number in range(5):
        served.openai.completions.create(model=MODEL, prompt=f"{number}", n=2, max_tokens=2)
    assert sum(1 for _ in served.redis.scan_iter(match="http:session:*")) == before
