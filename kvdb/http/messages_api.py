"""Anthropic's messages: the request -> an Ask in OpenAI form, an answer -> content blocks, whole or as events."""

from __future__ import annotations

import json
import secrets
from typing import Any

from kvdb.errors import KvdbError
from kvdb.http.ask import Answer, Ask, Begin, Calls, Delta, End, Event, IssuedCall, Message, ToolChoice
from kvdb.http.chat_api import MAX_STOPS, effort_of, extension
from kvdb.http.errors import BadRequest, anthropic_body
from kvdb.http.fields import Fields, sampling_of
from kvdb.http.sse import sse
from kvdb_engine.chat import Thinking

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# Parts of the system prompt that a client adds for Anthropic's own bookkeeping; they change from request to request.
_NOISE = "x-anthropic-"


def _texts(content: Any, where: str) -> list[str]:
    """The texts of a string or of text blocks."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of blocks", where)
    found = []
    for number, block in enumerate(content):
        fields = Fields(block, f"{where}[{number}]")
        if fields.get("type", str, "text") != "text":
            raise BadRequest(f"{where}[{number}]: only text is supported, not {block.get('type')}", where)
        found.append(fields.need("text", str))
    return found


def _user(content: list[Any], where: str) -> list[Message]:
    """A user message's blocks: tool results become tool messages, texts between them user messages."""
    found: list[Message] = []
    for number, block in enumerate(content):
        fields = Fields(block, f"{where}[{number}]")
        if fields.need("type", str) == "tool_result":
            text = "".join(_texts(block.get("content"), f"{where}[{number}].content"))
            found.append({"role": "tool", "tool_call_id": fields.need("tool_use_id", str), "content": text})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += "".join(_texts([block], where))
        else:
            found.append({"role": "user", "content": "".join(_texts([block], where))})
    return found


def _assistant(content: list[Any], where: str) -> Message:
    message: Message = {"role": "assistant", "content": ""}
    for number, block in enumerate(content):
        fields = Fields(block, f"{where}[{number}]")
        kind = fields.need("type", str)
        if kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + fields.get("thinking", str, "")
        elif kind == "tool_use":
            arguments = json.dumps(fields.get("input", dict, {}), ensure_ascii=False)
            function = {"name": fields.need("name", str), "arguments": arguments}
            message.setdefault("tool_calls", []).append({"id": fields.get("id", str, ""), "function": function})
        elif kind != "redacted_thinking":
            message["content"] += "".join(_texts([block], where))
    return message


def messages_of(fields: Fields) -> tuple[Message, ...]:
    """System text and messages in OpenAI form."""
    system = [text for text in _texts(fields.tree.get("system"), "system") if not text.startswith(_NOISE)]
    result: list[Message] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    given = fields.need("messages", list)
    if not given:
        raise BadRequest("messages is empty", "messages")
    for number, message in enumerate(given):
        where = f"messages[{number}].content"
        role = Fields(message, f"messages[{number}]").need("role", str)
        content = message.get("content")
        if role not in ("user", "assistant"):
            raise BadRequest(f"messages[{number}].role must be user or assistant", "messages")
        if isinstance(content, str):
            result.append({"role": role, "content": content})
        elif not isinstance(content, list):
            raise BadRequest(f"{where} must be a string or a list of blocks", where)
        elif role == "user":
            result += _user(content, where)
        else:
            result.append(_assistant(content, where))
    return tuple(result)


def _tools(fields: Fields) -> tuple[Any, ...]:
    tools = []
    for number, tool in enumerate(fields.get("tools", list) or []):
        one = Fields(tool, f"tools[{number}]")
        if one.get("type", str, "custom") != "custom":
            raise BadRequest(f"tools[{number}]: only tools that the client runs are supported", f"tools[{number}]")
        function = {"name": one.need("name", str)}
        if one.get("description", str) is not None:
            function["description"] = tool["description"]
        function["parameters"] = one.get("input_schema", dict, {})
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _choice(fields: Fields, tools: tuple[Any, ...]) -> ToolChoice:
    given = fields.get("tool_choice", dict)
    if given is None:
        return ToolChoice("auto")
    kind = Fields(given, "tool_choice").need("type", str)
    if kind == "tool":
        name = given.get("name")
        if name not in [tool["function"]["name"] for tool in tools]:
            raise BadRequest(f"tool_choice names '{name}', which is not among the tools", "tool_choice")
        return ToolChoice("named", name)
    if kind not in _CHOICES:
        raise BadRequest("tool_choice.type must be auto, any, tool or none", "tool_choice")
    if kind == "any" and not tools:
        raise BadRequest("tool_choice is any but there are no tools", "tool_choice")
    return ToolChoice(_CHOICES[kind])


def _thinking(fields: Fields, context: int) -> Thinking:
    config = fields.get("output_config", dict) or {}
    effort = effort_of(config.get("effort"), context)
    given = fields.get("thinking", dict)
    if given is None:
        return Thinking.OFF
    kind = Fields(given, "thinking").need("type", str)
    if kind not in ("enabled", "disabled", "adaptive"):
        raise BadRequest("thinking.type must be enabled, disabled or adaptive", "thinking")
    return Thinking.OFF if kind == "disabled" else effort or Thinking.ON


def parse_messages(fields: Fields, base: dict[str, Any], *, is_count: bool = False) -> Ask:
    """A request of /v1/messages, or of its count_tokens, which needs no max_tokens."""
    tools = _tools(fields)
    choice = _choice(fields, tools)
    thinking = _thinking(fields, base["model"].info.config.context)
    if choice.kind in ("required", "named") and thinking is not Thinking.OFF:
        raise BadRequest("tool_choice any and tool cannot be used with thinking", "tool_choice")
    limit = fields.integer("max_tokens", 1, 1 << 31)
    if limit is None and not is_count:
        raise BadRequest("max_tokens is required", "max_tokens")
    return Ask(
        **base,
        messages=messages_of(fields),
        tools=tools,
        choice=choice,
        thinking=thinking,
        sampling=sampling_of(fields, highest_temperature=1.0),
        max_tokens=limit,
        stops=fields.strings("stop_sequences", MAX_STOPS),
        call_prefix="toolu_",
    )


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _stop_reason(reason: str, stop: str | None) -> str:
    if stop is not None:
        return "stop_sequence"
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]


def _tool_use(call: IssuedCall, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


class MessagesDialect:
    """Writes one message."""

    keep_alive = sse({"type": "ping"}, "ping")

    def __init__(self, ask: Ask) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": ask.model.info.name,
        }
        # Clients send reasoning back with its signature; ours is only a name, since the timeline has the real thing.
        self._signature = secrets.token_hex(16)
        self._index = -1
        self._open = ""
        self._end: End | None = None

    def begin(self) -> bytes:
        """Nothing: message_start needs the prompt's token counts."""
        return b""

    def _switch(self, kind: str, block: dict[str, Any] | None = None) -> bytes:
        """Close the open content block and open one of another kind."""
        data = b""
        if self._open == kind and block is None:
            return data
        if self._open:
            if self._open == "reasoning":
                data += self._delta({"type": "signature_delta", "signature": self._signature})
            data += sse({"type": "content_block_stop", "index": self._index}, "content_block_stop")
        self._open = kind
        if kind:
            self._index += 1
            empty = {"type": "thinking", "thinking": "", "signature": ""} if kind == "reasoning" else None
            body = block or empty or {"type": "text", "text": ""}
            start = {"type": "content_block_start", "index": self._index, "content_block": body}
            data += sse(start, "content_block_start")
        return data

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return sse({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    def event(self, event: Event) -> bytes:
        """One event as Anthropic's events."""
        if isinstance(event, Begin):
            usage = _usage(event.prompt_tokens, event.cached_tokens, 0)
            message: dict[str, Any] = {
                **self._head,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            }
            return sse({"type": "message_start", "message": message}, "message_start")
        if isinstance(event, Delta):
            if not event.text:
                return b""
            if event.kind == "reasoning":
                return self._switch("reasoning") + self._delta({"type": "thinking_delta", "thinking": event.text})
            return self._switch("content") + self._delta({"type": "text_delta", "text": event.text})
        if isinstance(event, Calls):
            data = b""
            for call in event.calls:
                data += self._switch("tool", _tool_use(call, {}))
                data += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
            return data
        if isinstance(event, End):
            self._end = event
            return self._switch("")
        assert self._end is not None
        delta = {"stop_reason": _stop_reason(self._end.reason, self._end.stop), "stop_sequence": self._end.stop}
        usage = _usage(event.prompt_tokens, event.cached_tokens, event.completion_tokens)
        body = {"type": "message_delta", "delta": delta, "usage": usage, **extension(event)}
        return sse(body, "message_delta") + sse({"type": "message_stop"}, "message_stop")

    def failure(self, error: KvdbError) -> bytes:
        """An error in the middle of a stream."""
        return sse(anthropic_body(error), "error")

    def error_body(self, error: KvdbError) -> dict[str, Any]:
        """An error response."""
        return anthropic_body(error)

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The message."""
        choice, done = answer.choices[0], answer.usage
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": self._signature})
        if choice.content:
            content.append({"type": "text", "text": choice.content})
        content += [_tool_use(call, json.loads(call.arguments)) for call in choice.calls]
        return {
            **self._head,
            "content": content,
            "stop_reason": _stop_reason(choice.reason, choice.stop),
            "stop_sequence": choice.stop,
            "usage": _usage(done.prompt_tokens, done.cached_tokens, done.completion_tokens),
            **extension(done),
        }
