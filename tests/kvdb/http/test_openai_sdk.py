"""The official openai SDK against the gateway."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest

from .conftest import CALCULATOR, MODEL, Served

HELLO = [{"role": "user", "content": "Hello!"}]
SUM = [{"role": "user", "content": "What is 12 plus 30?"}]


def test_models(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    assert served.openai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="not served here"):
        served.openai.models.retrieve("gpt")


def test_chat(served: Served) -> None:
    reply = served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=30, temperature=0)
    assert reply.choices[0].message.content == "Hello! How can I help you?"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    cut = served.openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3, temperature=0)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_a_stream_says_what_the_whole_says(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 3
    assert "".join(texts) == "Hello! How can I help you?"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 11


def test_stop_strings_are_cut_and_held_back(served: Served) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 30, "temperature": 0, "stop": ["can I", "never"]}
    whole = served.openai.chat.completions.create(**asked)
    assert whole.choices[0].message.content == "Hello! How "
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(served.openai.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello! How "


def test_a_seed_decides(served: Served) -> None:
    def run(seed: int) -> str:
        asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.5, "seed": seed}
        return served.openai.completions.create(model=MODEL, **asked).choices[0].text

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(4)}) > 1


def test_tools_there_and_back(served: Served) -> None:
    asked = {"model": MODEL, "tools": [CALCULATOR], "max_tokens": 100, "temperature": 0}
    first = served.openai.chat.completions.create(messages=SUM, **asked)
    (call,) = first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("calculator", {"expression": "12+30"})
    answered = [*SUM, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    second = served.openai.chat.completions.create(messages=answered, **asked)
    assert "42" in second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    streamed = list(served.openai.chat.completions.create(messages=SUM, stream=True, **asked))
    deltas = [one for chunk in streamed if chunk.choices for one in chunk.choices[0].delta.tool_calls or ()]
    assert [(one.index, one.function.name, one.function.arguments) for one in deltas] == [
        (0, "calculator", call.function.arguments)
    ]


def test_tool_choice(served: Served) -> None:
    asked = {"model": MODEL, "tools": [CALCULATOR], "messages": HELLO, "max_tokens": 60, "temperature": 0}
    named = {"type": "function", "function": {"name": "calculator"}}
    forced = served.openai.chat.completions.create(**asked, tool_choice=named)
    assert forced.choices[0].message.tool_calls[0].function.name == "calculator"
    required = served.openai.chat.completions.create(**asked, tool_choice="required")
    assert required.choices[0].message.tool_calls or required.choices[0].finish_reason == "length"
    none = served.openai.chat.completions.create(**{**asked, "messages": SUM}, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    assert none.usage.prompt_tokens < forced.usage.prompt_tokens / 4  # the tools are not in the prompt


def test_thinking(served: Served) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0, "reasoning_effort": "high"}
    reply = served.openai.chat.completions.create(**asked)
    message = reply.choices[0].message
    assert message.reasoning_content
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(served.openai.chat.completions.create(**asked, stream=True))
    thought = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks if chunk.choices]
    assert "".join(thought) == message.reasoning_content


def test_logprobs(served: Served) -> None:
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "temperature": 0}
    reply = served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    found = reply.choices[0].logprobs.content
    assert "".join(one.token for one in found) == reply.choices[0].message.content
    assert reply.choices[0].message.content == served.openai.chat.completions.create(**asked).choices[0].message.content
    for one in found:
        assert one.logprob == max(top.logprob for top in one.top_logprobs)  # greedy took the best
        assert [top.token for top in one.top_logprobs].index(one.token) == 0
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1 + 1e-6
    text = served.openai.completions.create(model=MODEL, prompt="Once", max_tokens=3, logprobs=2, temperature=0)
    assert "".join(text.choices[0].logprobs.tokens) == text.choices[0].text


def test_three_choices_from_one_prefill(served: Served) -> None:
    prompt = "The old clock in the hall struck. " * 30 + "Then the door opened, and"
    reply = served.openai.completions.create(model=MODEL, prompt=prompt, n=3, max_tokens=8, temperature=1, seed=5)
    assert len({choice.text for choice in reply.choices}) == 3
    alone = served.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=1, seed=6)
    assert alone.choices[0].text == reply.choices[1].text  # choice i has the seed's i-th successor
    assert alone.usage.prompt_tokens_details.cached_tokens == alone.usage.prompt_tokens
    streamed = served.openai.completions.create(
        model=MODEL, prompt=prompt, n=3, max_tokens=8, temperature=1, seed=5, stream=True
    )
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


def test_completions_are_raw(served: Served) -> None:
    ids = served.redis.tokenize(MODEL, "Once upon a time")
    bos = served.openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0)
    assert bos.usage.prompt_tokens == len(ids) + 1
    served.redis.prefill("raw", "Once upon a time")
    assert served.redis.generate("raw", 6, temperature=0).text == bos.choices[0].text
    given = served.openai.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0)
    assert given.usage.prompt_tokens == len(ids)


def test_responses(served: Served) -> None:
    first = served.openai.responses.create(model=MODEL, input="Who are you?", max_output_tokens=40, temperature=0)
    assert first.output_text.startswith("I am dsv4-nano")
    assert first.status == "completed"
    second = served.openai.responses.create(
        model=MODEL, input="Thank you!", previous_response_id=first.id, max_output_tokens=20, temperature=0
    )
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert served.openai.responses.retrieve(first.id).output_text == first.output_text
    served.openai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        served.openai.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError, match="not stored here"):
        served.openai.responses.create(model=MODEL, input="x", previous_response_id=first.id)


def test_responses_stream_and_tools(served: Served) -> None:
    tool = {"type": "function", "strict": False, **CALCULATOR["function"]}
    asked = {"model": MODEL, "tools": [tool], "max_output_tokens": 100, "temperature": 0}
    first = served.openai.responses.create(input=SUM, **asked)
    (call,) = [item for item in first.output if item.type == "function_call"]
    answered = [*SUM, call, {"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
    with served.openai.responses.stream(input=answered, **asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "42" in final.output_text
    assert final.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    names = [event.type for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert names.count("response.output_text.delta") > 1
    with served.openai.responses.stream(input=SUM, **asked) as stream:
        kinds = {event.type for event in stream}
    assert "response.function_call_arguments.done" in kinds
    cut = served.openai.responses.create(model=MODEL, input="Tell me", max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt-5"}, 404, "not served here"),
        ({"messages": []}, 400, "messages is empty"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "only text"),
        ({"temperature": 3}, 400, "temperature must be between"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 1000}, 400, "n must be between"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"tool_choice": "required"}, 400, "no tools"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"reasoning_effort": "extreme"}, 400, "effort"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, 400, "context"),
    ],
)
def test_errors(served: Served, change: dict[str, object], status: int, says: str) -> None:
    for stream in (False, True):
        asked = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "stream": stream, **change}
        with pytest.raises(openai.APIStatusError, match=says) as found:
            served.openai.chat.completions.create(**asked)
        assert found.value.status_code == status
        assert found.value.body["type"] == "invalid_request_error"
    assert served.redis.ping()


def test_a_context_overflow_has_its_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        served.openai.completions.create(model=MODEL, prompt="word " * 40_000)
    assert found.value.code == "context_length_exceeded"


async def test_the_asynchronous_client(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        asked = {"model": MODEL, "messages": HELLO, "max_tokens": 30, "temperature": 0}
        whole = await client.chat.completions.create(**asked)
        text = ""
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
        async with client.responses.stream(model=MODEL, input="Who are you?", max_output_tokens=40) as stream:
            final = await stream.get_final_response()
        assert final.output_text
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**asked, "model": "gpt"})
        several = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(3)))
        assert {reply.choices[0].message.content for reply in several} == {text}


def test_three_streamed_chat_choices_with_logprobs(served: Served) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    asked = {"model": MODEL, "messages": story, "n": 3, "max_tokens": 8, "temperature": 2, "extra_body": {"min_p": 0}}
    asked["seed"] = 2
    whole = served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    texts, sampled = ["", "", ""], [b"", b"", b""]
    for chunk in served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=1, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for one in choice.logprobs.content if choice.logprobs else ():
                sampled[choice.index] += bytes(one.bytes)
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    for choice, text, data in zip(whole.choices, texts, sampled, strict=True):
        assert b"".join(bytes(one.bytes) for one in choice.logprobs.content) == data
        assert data.decode(errors="replace").startswith(text)  # the end token is sampled too, and shows no text
