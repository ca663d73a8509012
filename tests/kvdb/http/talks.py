"""One tool-using conversation in three dialects: stateless clients that send everything again at every turn."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

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
TOOLS = [CALCULATOR, NOTE]
SYSTEM = "You are a helpful assistant. " + "Answer briefly. " * 60
# Two of them lead to a call with two arguments, so that their order can change.
REQUESTS = ["What is 12 plus 30?", "Save 42 under total.", "Save red boat under title."]

Spelling = Callable[[Any], Any]


def reordered(value: Any) -> Any:
    """The same JSON with its keys in another order, tool arguments that are text and all."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(one) for one in value]
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(reordered(json.loads(value)), indent=1)
    return value


class Talk(ABC):
    """A conversation. `computed` says what each request cost, `new_tokens` how many tokens were new in it."""

    system = SYSTEM  # another one in each dialect, so that no dialect is served from the states of another

    def __init__(self, served: Served) -> None:
        self.served = served
        self.messages: list[Any] = []
        self.total = 0  # tokens of the timeline so far
        self.new_tokens: list[int] = []
        self.computed: list[int] = []
        self.text = ""

    def exchange(self, request: str, spelling: Spelling = lambda value: value) -> None:
        """A request, the call that it leads to, the tool's result, and the answer."""
        self.messages.append({"role": "user", "content": request})
        ids = self._turn(spelling)
        assert ids, self.text
        self.messages += self.results(ids)
        assert not self._turn(spelling)
        assert self.text

    def _turn(self, spelling: Spelling) -> list[str]:
        ids, prompt, cached, completion = self.ask(spelling)
        self.new_tokens.append(prompt - self.total)
        self.computed.append(prompt - cached)
        self.total = prompt + completion
        return ids

    @abstractmethod
    def ask(self, spelling: Spelling) -> tuple[list[str], int, int, int]:
        """Send all, take in the answer; (ids of its calls, prompt tokens, cached tokens, completion tokens)."""

    @abstractmethod
    def results(self, ids: list[str]) -> list[Any]:
        """What the tools say."""


class Chat(Talk):
    """OpenAI's chat completions."""

    def ask(self, spelling: Spelling) -> tuple[list[str], int, int, int]:
        reply = self.served.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "system", "content": self.system}, *spelling(self.messages)],
            tools=spelling(TOOLS),
            max_tokens=80,
            temperature=0,
        )
        message, usage = reply.choices[0].message, reply.usage
        self.messages.append(message.model_dump(exclude_none=True))
        self.text = message.content or ""
        ids = [call.id for call in message.tool_calls or ()]
        return ids, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens

    def results(self, ids: list[str]) -> list[Any]:
        return [{"role": "tool", "tool_call_id": one, "content": "42"} for one in ids]


class Responses(Talk):
    """OpenAI's responses, without `previous_response_id`."""

    system = SYSTEM + "Answer briefly. "

    def ask(self, spelling: Spelling) -> tuple[list[str], int, int, int]:
        reply = self.served.openai.responses.create(
            model=MODEL,
            instructions=self.system,
            input=spelling(self.messages),
            tools=[{"type": "function", "strict": False, **spelling(tool)["function"]} for tool in TOOLS],
            max_output_tokens=80,
            temperature=0,
            store=False,
        )
        self.messages += [item.model_dump(exclude_none=True) for item in reply.output]
        self.text = reply.output_text
        ids = [item.call_id for item in reply.output if item.type == "function_call"]
        usage = reply.usage
        return ids, usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens

    def results(self, ids: list[str]) -> list[Any]:
        return [{"type": "function_call_output", "call_id": one, "output": "42"} for one in ids]


class Messages(Talk):
    """Anthropic's messages."""

    system = SYSTEM + "Answer briefly. " * 2

    def ask(self, spelling: Spelling) -> tuple[list[str], int, int, int]:
        tools = [
            {
                "name": tool["function"]["name"],
                "description": tool["function"]["description"],
                "input_schema": spelling(tool["function"]["parameters"]),
            }
            for tool in TOOLS
        ]
        reply = self.served.anthropic.messages.create(
            model=MODEL,
            system=[{"type": "text", "text": self.system, "cache_control": {"type": "ephemeral"}}],
            messages=spelling(self.messages),
            tools=tools,
            max_tokens=80,
            extra_body={"temperature": 0},
        )
        self.messages.append(
            {"role": "assistant", "content": [one.model_dump(exclude_none=True) for one in reply.content]}
        )
        self.text = "".join(one.text for one in reply.content if one.type == "text")
        ids = [one.id for one in reply.content if one.type == "tool_use"]
        usage = reply.usage
        cached = usage.cache_read_input_tokens
        return ids, usage.input_tokens + cached, cached, usage.output_tokens

    def results(self, ids: list[str]) -> list[Any]:
        return [
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": one, "content": "42"} for one in ids]}
        ]


DIALECTS: tuple[type[Talk], ...] = (Chat, Responses, Messages)
