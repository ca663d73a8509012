"""Stateless clients send everything again; only what is new is computed. Also after SIGKILL, and other spellings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvdb_tools.daemon import Daemon, free_port

from .conftest import CALCULATOR, MODEL, Served

NOTE = {
    "type": "function",
    "function": {
        "name": "note_write",
        "description": "Write a value into the note pad.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string"}, "value": {"type": "string"}},
            "required": ["key", "value"],
        },
    },
}
SYSTEM = {"role": "system", "content": "You are a helpful assistant. " + "Answer briefly. " * 60}
SUMS = ["What is 12 plus 30?", "What is 7 times 6?", "What is 100 minus 58?"]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon of the test's own, to be killed."""
    port = free_port()
    with Daemon(tmp_path_factory.mktemp("http") / "data", {"http-port": str(port)}) as daemon:
        yield Served(daemon, port)


def ask(served: Served, messages: list[Any], **more: Any) -> Any:
    asked = {"model": MODEL, "messages": messages, "tools": [CALCULATOR, NOTE], "max_tokens": 80, "temperature": 0}
    return served.openai.chat.completions.create(**{**asked, **more})


class Conversation:
    """Calls tools and answers them. `computed` says what each request cost beyond the tokens that are new in it."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.messages: list[Any] = [SYSTEM]
        self.total = 0  # tokens of the timeline so far
        self.new_tokens: list[int] = []
        self.computed: list[int] = []

    def turn(self, added: list[Any], spelling: Any = lambda messages: messages, **more: Any) -> Any:
        self.messages += added
        reply = ask(self.served, spelling(self.messages), **more)
        usage = reply.usage
        self.new_tokens.append(usage.prompt_tokens - self.total)
        self.computed.append(usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens)
        self.total = usage.total_tokens
        self.messages.append(reply.choices[0].message.model_dump(exclude_none=True))
        return reply.choices[0].message

    def exchange(self, question: str, **more: Any) -> None:
        """A question, and the answer to the call that it leads to."""
        message = self.turn([{"role": "user", "content": question}], **more)
        assert message.tool_calls, message
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in message.tool_calls]
        self.turn(answers, **more)


def test_only_the_new_tokens_are_computed(served: Served) -> None:
    talk = Conversation(served)
    for question in SUMS:
        talk.exchange(question)
    assert talk.computed[0] > 300
    assert talk.computed[1:] == talk.new_tokens[1:]
    assert max(talk.computed[1:]) < 40


def test_the_same_after_sigkill(own: Served) -> None:
    talk = Conversation(own)
    for question in SUMS:
        talk.exchange(question)
        own.daemon.kill()
        own.daemon.start()
    assert talk.computed[1:] == talk.new_tokens[1:]


def reordered(value: Any) -> Any:
    """The same JSON with its keys in another order, tool arguments and all."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(one) for one in value]
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(reordered(json.loads(value)), indent=1)
    return value


def test_other_spellings_of_the_same_conversation(served: Served) -> None:
    talk = Conversation(served)
    tools = [reordered(CALCULATOR), reordered(NOTE)]
    for number, question in enumerate(SUMS):
        talk.exchange(f"{question} ", **({"spelling": reordered, "tools": tools} if number else {}))
    assert talk.computed[1:] == talk.new_tokens[1:]


def test_reasoning_that_the_client_drops_is_still_there(served: Served) -> None:
    first = ask(served, [SYSTEM, {"role": "user", "content": "Think."}], reasoning_effort="low", max_tokens=400)
    message = first.choices[0].message
    if first.choices[0].finish_reason != "stop":
        pytest.skip("the model did not end its thought")
    again = [
        SYSTEM,
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "Thank you!"},
    ]
    second = ask(served, again, reasoning_effort="low", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_a_changed_answer_is_no_replay(served: Served) -> None:
    talk = Conversation(served)
    talk.exchange(SUMS[0])
    changed = [*talk.messages[:-1], {"role": "assistant", "content": "It is 43."}, {"role": "user", "content": "Sure?"}]
    reply = ask(served, changed)
    # The timeline goes on from the last turn that is as it was: the call, not the answer after it.
    assert talk.total - 60 < reply.usage.prompt_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens < talk.total
    assert reply.usage.prompt_tokens_details.cached_tokens > talk.total - 60


def test_an_unknown_conversation_uses_the_sampled_blocks(served: Served) -> None:
    """Another system text: nothing can be reused, but each call is rendered as it was sampled."""
    talk = Conversation(served)
    talk.exchange(SUMS[0])
    other = [{"role": "system", "content": "Be kind."}, *talk.messages[1:], {"role": "user", "content": "Thanks."}]
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
    talk = Conversation(own)
    talk.exchange(SUMS[0])

    def hours(pattern: str) -> list[int]:
        return sorted(round(own.redis.ttl(key) / 3600) for key in own.redis.scan_iter(match=pattern))

    assert hours("http:turn:*") == [1, 7 * 24]
    assert hours("http:prompt:*") == [7 * 24]  # the system part
    ask(own, [{"role": "user", "content": "One long question. " * 60}], max_tokens=1)
    assert hours("http:prompt:*") == [1, 7 * 24, 7 * 24]  # the question, and the tools without the system text
    ask(own, talk.messages[:3])  # a retry of the first turn's answer: it may go on from there again
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
