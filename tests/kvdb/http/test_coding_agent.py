"""What coding agents send: long system texts, forty tools, parallel calls, fields nobody knows. And what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb.http.ask import Answer, Begin, Calls, Delta, Done, End, Event, IssuedCall
from kvdb.http.chat_api import ChatDialect
from kvdb.http.fields import Fields
from kvdb.http.messages_api import MessagesDialect
from kvdb.http.responses_api import ResponsesDialect
from kvdb_tools.daemon import Daemon, free_port

from .conftest import Served

WORDS = "You are an agent that edits code. Read before you write, and run the tests after each change. "
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "Absolute path."},
        "edits": {"type": "array", "items": {"type": "object", "properties": {"old": {"type": "string"}}}},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
    },
    "required": ["path"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}
NAMES = [f"mcp__server__tool_{number}" for number in range(40)]
PARALLEL = [("call_1", {"path": "/a.py"}), ("call_2", {"path": "/b.py", "edits": [{"old": '<x> & "y"'}]})]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon whose engine computes nothing, so that long prompts cost little."""
    port = free_port()
    options = {"http-port": str(port), "model": "m=synthetic:dsv4-nano,context=1048576"}
    with Daemon(tmp_path_factory.mktemp("http") / "data", options) as daemon:
        yield Served(daemon, port)


def test_an_openai_agent(wide: Served) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "description": WORDS, "parameters": SCHEMA, "strict": False}}
        for name in NAMES
    ]
    calls = [
        {"id": one, "type": "function", "function": {"name": NAMES[3], "arguments": json.dumps(arguments)}}
        for one, arguments in PARALLEL
    ]
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": WORDS * 300}]},
        {"role": "user", "content": "Fix it.", "name": "someone"},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "ok"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "error: not found"},
    ]

    def ask(messages: list[Any]) -> Any:
        stream = wide.openai.chat.completions.create(
            model="m",
            messages=messages,
            tools=tools,
            tool_choice="auto",
            parallel_tool_calls=True,
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            user="u",
            metadata={"a": "b"},
            store=False,
            extra_body={"verbosity": "low", "nobody_knows": {"this": 1}},
        )
        return [chunk.usage for chunk in stream if chunk.usage is not None][-1]

    first = ask(messages)
    assert first.prompt_tokens > 10_000
    later = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "And now?"}]
    second = ask([*messages, *later])
    computed = second.prompt_tokens - second.prompt_tokens_details.cached_tokens
    assert computed < 100, "what was sent before is served"


def test_an_anthropic_agent(wide: Served) -> None:
    tools = [{"name": name, "description": WORDS, "input_schema": SCHEMA} for name in NAMES]
    tools[-1]["cache_control"] = {"type": "ephemeral"}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}
    uses = [{"type": "tool_use", "id": one, "name": NAMES[3], "input": arguments} for one, arguments in PARALLEL]
    results = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "ok"}]},
        {"type": "tool_result", "tool_use_id": "call_2", "content": "not found", "is_error": True},
        {
            "type": "text",
            "text": "<system-reminder>Be careful.</system-reminder>",
            "cache_control": {"type": "ephemeral"},
        },
    ]
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Fix it."}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I look."}, *uses]},
        {"role": "user", "content": results},
    ]

    def ask(messages: list[Any], number: int) -> Any:
        noise = f"x-anthropic-billing-header: cc_version=1.2.{number};"
        with wide.anthropic.messages.stream(
            model="m",
            max_tokens=8,
            system=[{"type": "text", "text": noise}, {"type": "text", "text": WORDS * 300}],
            messages=messages,
            tools=tools,
            metadata={"user_id": "u"},
            extra_body={"nobody_knows": 1, "context_management": {"edits": []}},
            extra_headers={"anthropic-beta": "something-2026-01-01"},
        ) as stream:
            return stream.get_final_message().usage

    first = ask(messages, 1)
    assert first.input_tokens + first.cache_read_input_tokens > 10_000
    later = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "And now?"}]
    second = ask([*messages, *later], 2)
    assert second.input_tokens < 100, "what was sent before is served"
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    shown = wide.http.post(
        "/v1/messages",
        json={"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [image]}]},
    )
    assert shown.status_code == 400
    assert "only text is supported, not image" in shown.json()["error"]["message"]


def test_a_responses_agent(wide: Served) -> None:
    tools: list[Any] = [
        {"type": "function", "name": name, "description": WORDS, "parameters": SCHEMA, "strict": False}
        for name in NAMES
    ]
    items: list[Any] = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        *(
            {"type": "function_call", "call_id": one, "name": NAMES[3], "arguments": json.dumps(found)}
            for one, found in PARALLEL
        ),
        {"type": "function_call_output", "call_id": "call_1", "output": "ok"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "none"}]},
    ]

    def ask(items: list[Any]) -> Any:
        with wide.openai.responses.stream(
            model="m",
            instructions=WORDS * 300,
            input=items,
            tools=tools,
            parallel_tool_calls=True,
            reasoning={"effort": "medium", "summary": "auto"},
            include=["reasoning.encrypted_content"],
            store=False,
            max_output_tokens=8,
            extra_body={"prompt_cache_key": "k", "client_metadata": {"a": "b"}},
        ) as stream:
            return [event for event in stream][-1].response.usage

    first = ask(items)
    assert first.input_tokens > 10_000
    later = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "And now?"}]
    second = ask([*items, *later])
    assert second.input_tokens - second.input_tokens_details.cached_tokens < 100, "what was sent before is served"


# -- parallel calls on their way out -----------------------------------------------------------------------------------

CALLS = tuple(IssuedCall(one, NAMES[3], json.dumps(arguments)) for one, arguments in PARALLEL)
EVENTS: tuple[Event, ...] = (
    Begin(20, 5),
    Delta(0, "reasoning", "Hm."),
    Delta(0, "content", "I look."),
    Calls(0, CALLS),
    End(0, "tool_calls"),
    Done(20, 5, 9, 1),
)
ASK: Any = SimpleNamespace(
    n=1,
    model=SimpleNamespace(info=SimpleNamespace(name="m", fingerprint=bytes(32))),
    max_tokens=9,
    logprobs=None,
    sampling=SimpleNamespace(temperature=1, top_p=1),
    thinking=None,
    user=SimpleNamespace(name=b"default"),
)


def written(dialect: Any) -> list[dict[str, Any]]:
    """The data of all events of a stream."""
    data = dialect.begin() + b"".join(dialect.event(event) for event in EVENTS)
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def whole(dialect: Any) -> dict[str, Any]:
    answer = Answer(1)
    for event in EVENTS:
        answer.add(event)
    found: dict[str, Any] = dialect.whole(answer)
    return found


def test_parallel_calls_in_chat() -> None:
    chunks = written(ChatDialect(ASK, include_usage=True))
    (delta,) = [
        one["choices"][0]["delta"] for one in chunks if one["choices"] and "tool_calls" in one["choices"][0]["delta"]
    ]
    assert [(call["index"], call["id"]) for call in delta["tool_calls"]] == [(0, "call_1"), (1, "call_2")]
    message = whole(ChatDialect(ASK, include_usage=True))["choices"][0]["message"]
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [one for _, one in PARALLEL]
    assert (message["content"], message["reasoning_content"]) == ("I look.", "Hm.")


def test_parallel_calls_in_messages() -> None:
    events = written(MessagesDialect(ASK))
    started = [one["content_block"]["type"] for one in events if one["type"] == "content_block_start"]
    assert started == ["thinking", "text", "tool_use", "tool_use"]
    assert [one["index"] for one in events if one["type"] == "content_block_stop"] == [0, 1, 2, 3]
    content = whole(MessagesDialect(ASK))["content"]
    assert [block["type"] for block in content] == started
    assert [block["input"] for block in content[2:]] == [one for _, one in PARALLEL]


def test_parallel_calls_in_responses() -> None:
    def dialect() -> ResponsesDialect:
        memory: Any = SimpleNamespace()
        return ResponsesDialect(ASK, Fields({"store": False}), [], memory)

    events = written(dialect())
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["call_id"] for item in output[2:]] == ["call_1", "call_2"]
    assert [item["type"] for item in whole(dialect())["output"]] == [item["type"] for item in output]
