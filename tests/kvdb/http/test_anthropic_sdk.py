"""The official anthropic SDK against the gateway."""

from __future__ import annotations

import anthropic
import pytest

from .conftest import CALCULATOR, MODEL, Served

HELLO = [{"role": "user", "content": "Hello!"}]
SUM = [{"role": "user", "content": "What is 12 plus 30?"}]
TOOL = {
    "name": "calculator",
    "description": CALCULATOR["function"]["description"],
    "input_schema": CALCULATOR["function"]["parameters"],
}
GREEDY = {"temperature": 0}


def test_a_message(served: Served) -> None:
    reply = served.anthropic.messages.create(
        model=MODEL, max_tokens=30, messages=HELLO, system="Answer briefly.", extra_body=GREEDY
    )
    assert reply.content[0].type == "text"
    assert reply.stop_reason == "end_turn"
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens > 8
    cut = served.anthropic.messages.create(model=MODEL, max_tokens=2, messages=HELLO, extra_body=GREEDY)
    assert cut.stop_reason == "max_tokens"
    stopped = served.anthropic.messages.create(
        model=MODEL, max_tokens=30, messages=HELLO, stop_sequences=["can"], extra_body=GREEDY
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "can")
    assert stopped.content[0].text == "Hello! How "


def test_a_stream(served: Served) -> None:
    with served.anthropic.messages.stream(model=MODEL, max_tokens=30, messages=HELLO, extra_body=GREEDY) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 3
    assert "".join(texts) == final.content[0].text == "Hello! How can I help you?"
    assert final.usage.output_tokens == 11


def test_tools_there_and_back(served: Served) -> None:
    asked = {"model": MODEL, "max_tokens": 100, "tools": [TOOL], "extra_body": GREEDY}
    first = served.anthropic.messages.create(messages=SUM, **asked)
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    assert call.id.startswith("toolu_")
    assert call.input == {"expression": "12+30"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "42"}]}
    answered = [*SUM, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    with served.anthropic.messages.stream(messages=answered, **asked) as stream:
        final = stream.get_final_message()
    assert "42" in final.content[0].text
    done = first.usage
    assert final.usage.cache_read_input_tokens == (
        done.input_tokens + done.cache_read_input_tokens + done.output_tokens
    )
    with served.anthropic.messages.stream(messages=SUM, **asked) as stream:
        (block,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert block.input == {"expression": "12+30"}


def test_tool_choice(served: Served) -> None:
    asked = {"model": MODEL, "max_tokens": 60, "messages": HELLO, "tools": [TOOL], "extra_body": GREEDY}
    forced = served.anthropic.messages.create(**asked, tool_choice={"type": "tool", "name": "calculator"})
    assert forced.stop_reason == "tool_use"
    none = served.anthropic.messages.create(**{**asked, "messages": SUM}, tool_choice={"type": "none"})
    assert {block.type for block in none.content} == {"text"}


def test_thinking(served: Served) -> None:
    asked = {"model": MODEL, "max_tokens": 2000, "messages": HELLO, "extra_body": {"temperature": 0}}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    reply = served.anthropic.messages.create(**{**asked, "max_tokens": 12}, thinking=thinking)
    assert reply.content[0].type == "thinking"
    assert reply.content[0].thinking
    assert reply.content[0].signature
    with served.anthropic.messages.stream(**{**asked, "max_tokens": 12}, thinking=thinking) as stream:
        assert stream.get_final_message().content[0].thinking == reply.content[0].thinking


async def test_the_asynchronous_client(served: Served) -> None:
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        asked = {"model": MODEL, "max_tokens": 100, "extra_body": GREEDY}
        hello = await client.messages.create(messages=HELLO, **asked)
        async with client.messages.stream(messages=HELLO, **asked) as stream:
            text = "".join([part async for part in stream.text_stream])
        assert text == hello.content[0].text == "Hello! How can I help you?"
        called = await client.messages.create(messages=SUM, tools=[TOOL], **asked)
        assert called.stop_reason == "tool_use"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(messages=HELLO, **{**asked, "model": "claude"})


def test_what_this_api_has_not(served: Served) -> None:
    """No logprobs, no n: such fields are unknown here and change nothing, as any unknown field."""
    asked = {"model": MODEL, "max_tokens": 30, "messages": HELLO}
    reply = served.anthropic.messages.create(**asked, extra_body={**GREEDY, "n": 3, "logprobs": True})
    assert [block.text for block in reply.content] == ["Hello! How can I help you?"]


def test_counting(served: Served) -> None:
    counted = served.anthropic.messages.count_tokens(model=MODEL, messages=SUM, tools=[TOOL])
    reply = served.anthropic.messages.create(model=MODEL, max_tokens=1, messages=SUM, tools=[TOOL])
    assert counted.input_tokens == reply.usage.input_tokens + reply.usage.cache_read_input_tokens


def test_a_begun_answer_is_gone_on_with(served: Served) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Hello! How can"}]
    reply = served.anthropic.messages.create(model=MODEL, max_tokens=30, messages=begun, extra_body=GREEDY)
    assert reply.content[0].text == " I help you?"


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"model": "claude"}, "not_found_error", "not served here"),
        ({"messages": []}, "invalid_request_error", "messages is empty"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_request_error", "user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "invalid_request_error", "only text"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "invalid_request_error", "not among the tools"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "invalid_request_error", "context"),
    ],
)
def test_errors(served: Served, change: dict[str, object], kind: str, says: str) -> None:
    asked = {"model": MODEL, "max_tokens": 2, "messages": HELLO, **change}
    with pytest.raises(anthropic.APIStatusError, match=says) as found:
        served.anthropic.messages.create(**asked)
    assert found.value.body["type"] == "error"
    assert found.value.body["error"]["type"] == kind
    missing = served.http.post("/v1/messages", json={"model": MODEL, "messages": HELLO}).json()
    assert "max_tokens is required" in missing["error"]["message"]
