"""OpenAI's responses: input items -> messages, an answer -> output items, whole or as events; stored responses.

A stored response holds the messages it added, not the whole conversation: `previous_response_id` follows the chain.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from kvdb.errors import KvdbError
from kvdb.http.ask import Answer, Ask, Begin, Calls, Delta, Done, End, Event, IssuedCall, Message
from kvdb.http.chat_api import choice_of, effort_of, extension
from kvdb.http.errors import BadRequest, openai_body
from kvdb.http.fields import Fields, sampling_of
from kvdb.http.memory import Memory
from kvdb.http.sse import sse
from kvdb_engine.chat import Thinking

_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts", where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _PARTS:
            raise BadRequest(f"{where}: only text is supported", where)
    return "".join(str(part.get("text", part.get("refusal", ""))) for part in content)


def messages_of(value: Any) -> list[Message]:
    """Input items in OpenAI's chat form: calls join the assistant's message before them."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRequest("input must be a string or a list of items", "input")
    result: list[Message] = []

    def assistant() -> Message:
        if not result or result[-1]["role"] != "assistant":
            result.append({"role": "assistant", "content": ""})
        return result[-1]

    for number, item in enumerate(value):
        where = f"input[{number}]"
        fields = Fields(item, where)
        kind = fields.get("type", str, "message")
        if kind == "message":
            role, text = fields.need("role", str), _text(item.get("content"), f"{where}.content")
            if role == "assistant" and result and result[-1]["role"] == "assistant" and not result[-1]["content"]:
                result[-1]["content"] = text  # its reasoning came as an item of its own
            else:
                result.append({"role": role, "content": text})
        elif kind == "reasoning":
            text = _text(item.get("content") or item.get("summary") or [], where)
            result.append({"role": "assistant", "content": "", "reasoning_content": text})
        elif kind == "function_call":
            function = {"name": fields.need("name", str), "arguments": fields.get("arguments", str, "{}")}
            call = {"id": fields.need("call_id", str), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            text = _text(item.get("output"), f"{where}.output")
            result.append({"role": "tool", "tool_call_id": fields.need("call_id", str), "content": text})
        else:
            raise BadRequest(f"{where}: items of type {kind} are not supported", where)
    return result


def _tools(fields: Fields) -> tuple[Any, ...]:
    tools = []
    for number, tool in enumerate(fields.get("tools", list) or []):
        one = Fields(tool, f"tools[{number}]")
        if one.need("type", str) != "function":
            raise BadRequest(f"tools[{number}]: only functions are supported, not {tool['type']}", f"tools[{number}]")
        function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
        Fields(function, f"tools[{number}]").need("name", str)
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _history(memory: Memory, user: bytes, response_id: str | None) -> list[Message]:
    """The messages of a stored response and those before it."""
    parts: list[list[Message]] = []
    while response_id is not None:
        found = memory.response(response_id, user)
        if found is None:
            raise BadRequest(
                f"response '{response_id}' is not stored here",
                "previous_response_id",
                status=404,
                code="previous_response_not_found",
            )
        parts.append(found["messages"])
        response_id = found["previous"]
    return [message for part in reversed(parts) for message in part]


def parse_responses(fields: Fields, base: dict[str, Any], memory: Memory) -> tuple[Ask, list[Message]]:
    """A request of /v1/responses, and the messages it adds to the conversation."""
    fields.refuse("conversation", (), "use previous_response_id")
    fields.refuse("background", (False,), "an answer is made while the client waits")
    fields.refuse("prompt", (), "templates are not stored here")
    # Coding agents ask for the reasoning in encrypted form; it is in the answer as text, so they miss nothing.
    fields.refuse("include", ([], ["reasoning.encrypted_content"]), "nothing else can be included")
    form = (fields.get("text", dict) or {}).get("format") or {}
    if form.get("type", "text") != "text":
        raise BadRequest(f"text.format {form['type']} is not supported", "text.format")
    new = messages_of(fields.tree.get("input"))
    before = _history(memory, base["user"].name, fields.get("previous_response_id", str))
    instructions = fields.get("instructions", str)
    system: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    tools = _tools(fields)
    choice = choice_of(fields.tree.get("tool_choice"), tools)
    effort = (fields.get("reasoning", dict) or {}).get("effort")
    thinking = effort_of(effort, base["model"].info.config.context) or Thinking.OFF
    ask = Ask(
        **base,
        messages=(*system, *before, *new),
        tools=tools,
        choice=choice,
        thinking=Thinking.OFF if choice.kind in ("required", "named") else thinking,
        sampling=sampling_of(fields),
        max_tokens=fields.integer("max_output_tokens", 1, 1 << 31),
    )
    return ask, new


class ResponsesDialect:
    """Writes one response, and stores it when it is complete."""

    keep_alive = b": keep-alive\n\n"

    def __init__(self, ask: Ask, fields: Fields, new: list[Message], memory: Memory) -> None:
        self._ask = ask
        self._new = new
        self._memory = memory
        self._previous = fields.get("previous_response_id", str)
        self._is_stored = fields.get("store", bool, True)
        self._answer = Answer(1)
        self._output: list[dict[str, Any]] = []
        self._open = ""
        self._sequence = -1
        self._body: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": ask.model.info.name,
            "instructions": fields.get("instructions", str),
            "previous_response_id": self._previous,
            "max_output_tokens": ask.max_tokens,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "tools": fields.get("tools", list, []),
            "tool_choice": fields.tree.get("tool_choice") or "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": None if ask.thinking is Thinking.OFF else "high", "summary": None},
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "store": self._is_stored,
            "metadata": fields.get("metadata", dict, {}),
            "error": None,
            "incomplete_details": None,
            "usage": None,
        }

    def _event(self, name: str, /, **data: Any) -> bytes:
        self._sequence += 1
        return sse({"type": f"response.{name}", "sequence_number": self._sequence, **data}, f"response.{name}")

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        return {**self._body, "status": status, "output": self._output, **more}

    def begin(self) -> bytes:
        """The response exists."""
        body = self._response("in_progress")
        return self._event("created", response=body) + self._event("in_progress", response=body)

    # items

    def _switch(self, kind: str) -> bytes:
        """Close the open item and open one of another kind."""
        if self._open == kind:
            return b""
        data = self._close()
        self._open = kind
        if not kind:
            return data
        name = "rs" if kind == "reasoning" else "msg"
        item: dict[str, Any] = {"id": f"{name}_{secrets.token_hex(12)}", "status": "in_progress", "content": []}
        item |= (
            {"type": "reasoning", "summary": []} if kind == "reasoning" else {"type": "message", "role": "assistant"}
        )
        self._output.append(item)
        data += self._event("output_item.added", output_index=len(self._output) - 1, item=item)
        item["content"] = [self._part("")]
        return data + self._event("content_part.added", **self._at(), part=item["content"][0])

    def _part(self, text: str) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _close(self) -> bytes:
        if not self._open:
            return b""
        item = self._output[-1]
        name, text = ("reasoning_text" if self._open == "reasoning" else "output_text"), item["content"][0]["text"]
        extra: dict[str, Any] = {} if self._open == "reasoning" else {"logprobs": []}
        item["status"] = "completed"
        return (
            self._event(f"{name}.done", **self._at(), text=text, **extra)
            + self._event("content_part.done", **self._at(), part=item["content"][0])
            + self._event("output_item.done", output_index=len(self._output) - 1, item=item)
        )

    def _call(self, call: IssuedCall) -> bytes:
        item: dict[str, Any] = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._output.append(item)
        at = {"item_id": item["id"], "output_index": len(self._output) - 1}
        data = self._event("output_item.added", output_index=at["output_index"], item=item)
        data += self._event("function_call_arguments.delta", **at, delta=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        data += self._event("function_call_arguments.done", **at, name=call.name, arguments=call.arguments)
        return data + self._event("output_item.done", output_index=at["output_index"], item=item)

    def event(self, event: Event) -> bytes:
        """One event as OpenAI's events."""
        self._answer.add(event)
        if isinstance(event, Begin):
            return b""
        if isinstance(event, Delta):
            if not event.text:
                return b""
            data = self._switch(event.kind)
            self._output[-1]["content"][0]["text"] += event.text
            name = "reasoning_text" if event.kind == "reasoning" else "output_text"
            extra: dict[str, Any] = {} if event.kind == "reasoning" else {"logprobs": []}
            return data + self._event(f"{name}.delta", **self._at(), delta=event.text, **extra)
        if isinstance(event, Calls):
            return self._switch("") + b"".join(self._call(call) for call in event.calls)
        if isinstance(event, End):
            return self._switch("")
        body = self._finished(event)
        return self._event("completed" if body["status"] == "completed" else "incomplete", response=body)

    def _finished(self, done: Done) -> dict[str, Any]:
        choice = self._answer.choices[0]
        usage = {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens},
            "output_tokens": done.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
            "total_tokens": done.prompt_tokens + done.completion_tokens,
        }
        is_cut = choice.reason == "length"
        details = {"reason": "max_output_tokens"} if is_cut else None
        status = "incomplete" if is_cut else "completed"
        body = self._response(status, usage=usage, incomplete_details=details, **extension(done))
        if self._is_stored:
            said: Message = {"role": "assistant", "content": choice.content}
            if choice.reasoning:
                said["reasoning_content"] = choice.reasoning
            if choice.calls:
                said["tool_calls"] = [
                    {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                    for call in choice.calls
                ]
            stored = {"messages": [*self._new, said], "previous": self._previous, "body": body}
            self._memory.keep_response(self._body["id"], self._ask.user.name, stored)
        return body

    def failure(self, error: KvdbError) -> bytes:
        """An error in the middle of a stream."""
        found = openai_body(error)["error"]
        body = self._response("failed", error={"code": found["code"] or "server_error", "message": found["message"]})
        return self._event("failed", response=body)

    def error_body(self, error: KvdbError) -> dict[str, Any]:
        """An error response."""
        return openai_body(error)

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response: the same items a stream would have made."""
        choice = answer.choices[0]
        events: list[Event] = [Delta(0, "reasoning", choice.reasoning), Delta(0, "content", choice.content)]
        events += [Calls(0, choice.calls), End(0, choice.reason, choice.stop)]
        for event in events:
            self.event(event)
        return self._finished(answer.usage)
