"""OpenAI's chat completions: the request -> an Ask, an answer -> its JSON, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from typing import Any

from kvdb.errors import KvdbError
from kvdb.http.ask import Answer, Ask, Begin, Calls, Delta, Done, End, Event, IssuedCall, TokenLogprob, ToolChoice
from kvdb.http.errors import BadRequest, openai_body
from kvdb.http.fields import Fields, sampling_of
from kvdb.http.sse import sse
from kvdb_engine.chat import Thinking

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
# ds4 asks for this much context before it lets a model think as long as it can.
MAX_THINKING_CONTEXT = 393_216


def effort_of(effort: str | None, context: int) -> Thinking | None:
    """Thinking for a reasoning effort; None when the request does not say."""
    if effort is None:
        return None
    if effort in ("none", "minimal"):
        return Thinking.OFF
    if effort in ("low", "medium", "high", "xhigh"):
        return Thinking.ON
    if effort == "max":
        return Thinking.MAX if context >= MAX_THINKING_CONTEXT else Thinking.ON
    raise BadRequest("reasoning effort must be none, minimal, low, medium, high, xhigh or max", "reasoning_effort")


def thinking_of(fields: Fields, context: int) -> Thinking:
    """`thinking: {type}`, `think` or `reasoning_effort`; off when none of them is given."""
    found = effort_of(fields.get("reasoning_effort", str), context)
    given = fields.get("thinking", dict)
    if given is not None:
        kind = Fields(given, "thinking").need("type", str)
        if kind not in ("enabled", "disabled", "adaptive"):
            raise BadRequest("thinking.type must be enabled, disabled or adaptive", "thinking.type")
        found = Thinking.OFF if kind == "disabled" else found or Thinking.ON
    if found is None and fields.get("think", bool):
        found = Thinking.ON
    return found or Thinking.OFF


def choice_of(value: Any, tools: tuple[Any, ...]) -> ToolChoice:
    """`tool_choice` in any of OpenAI's spellings. Raises BadRequest for a tool that is not there."""
    if value is None or value == "auto":
        return ToolChoice("auto")
    if value in ("none", "required"):
        choice = ToolChoice(value)
    elif isinstance(value, dict) and value.get("type") in ("function", None):
        name = value.get("name") or (value.get("function") or {}).get("name")
        known = [tool.get("function", tool).get("name") for tool in tools if isinstance(tool, dict)]
        if name not in known:
            raise BadRequest(f"tool_choice names '{name}', which is not among the tools", "tool_choice")
        choice = ToolChoice("named", str(name))
    else:
        raise BadRequest("tool_choice must be none, auto, required, or name a function", "tool_choice")
    if choice.kind == "required" and not tools:
        raise BadRequest("tool_choice is required but there are no tools", "tool_choice")
    return choice


def messages_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The messages, looked at only as far as the gateway itself uses them; the template checks the rest."""
    found = fields.need("messages", list)
    if not found:
        raise BadRequest("messages is empty", "messages")
    for number, message in enumerate(found):
        one = Fields(message, f"messages[{number}]")
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in (
                "text",
                "input_text",
                "output_text",
                "refusal",
                None,
            ):
                raise BadRequest(f"messages[{number}].content: only text is supported, not {part['type']}", "messages")
        for call in one.get("tool_calls", list) or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRequest(f"messages[{number}]: a tool call needs a function with a name", "messages")
    return tuple(found)


def tools_of(fields: Fields) -> tuple[Any, ...]:
    """The tools; only functions are supported."""
    found = fields.get("tools", list) or []
    for number, tool in enumerate(found):
        kind = Fields(tool, f"tools[{number}]").get("type", str, "function")
        function = tool.get("function", tool)
        if kind != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{number}] must be a function with a name", f"tools[{number}]")
    return tuple(found)


def parse_chat(fields: Fields, base: dict[str, Any]) -> Ask:
    """A request of /v1/chat/completions. base: what the gateway knows of it: user, model, session, snapshot."""
    why = "the model's answer is not constrained"
    form = fields.get("response_format", dict)
    if form is not None and form.get("type") not in ("text", None):
        raise BadRequest(f"response_format {form.get('type')} is not supported: {why}", "response_format")
    fields.refuse("logit_bias", ({},), "logits are taken as the model gives them")
    fields.refuse("presence_penalty", (0,), "logits are taken as the model gives them")
    fields.refuse("frequency_penalty", (0,), "logits are taken as the model gives them")
    tools = tools_of(fields)
    choice = choice_of(fields.tree.get("tool_choice"), tools)
    is_forced = choice.kind in ("required", "named")
    wants_logprobs = fields.get("logprobs", bool, False)
    n_top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if n_top is not None and not wants_logprobs:
        raise BadRequest("top_logprobs needs logprobs", "top_logprobs")
    limit = fields.integer("max_completion_tokens", 1, 1 << 31)
    return Ask(
        **base,
        messages=messages_of(fields),
        tools=tools,
        choice=choice,
        # A forced call is the very beginning of the answer: there is no place for reasoning before it.
        thinking=Thinking.OFF if is_forced else thinking_of(fields, base["model"].info.config.context),
        sampling=sampling_of(fields),
        max_tokens=limit or fields.integer("max_tokens", 1, 1 << 31),
        n=fields.integer("n", 1, MAX_CHOICES, 1) or 1,
        stops=fields.strings("stop", MAX_STOPS),
        logprobs=(n_top or 0) if wants_logprobs else None,
    )


def usage_body(done: Done) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
    }


def extension(done: Done) -> dict[str, Any]:
    """Which session and snapshot an answer belongs to, if the request named them."""
    named = {"session": done.session, "snapshot": done.snapshot}
    found = {name: value for name, value in named.items() if value is not None}
    return {"kvdb": found} if found else {}


def logprob_body(found: TokenLogprob) -> dict[str, Any]:
    """One entry of logprobs.content."""

    def one(data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    top = [one(data, logprob) for data, logprob in found.top]
    return {**one(found.data, found.logprob), "top_logprobs": top}


def call_body(call: IssuedCall) -> dict[str, Any]:
    """A tool call of a message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChatDialect:
    """Writes one chat completion."""

    keep_alive = b": keep-alive\n\n"

    def __init__(self, ask: Ask, *, include_usage: bool) -> None:
        self._ask = ask
        self._include_usage = include_usage
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": ask.model.info.name,
            "system_fingerprint": ask.model.info.fingerprint.hex()[:16],
        }

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse({**self._head, "object": "chat.completion.chunk", "choices": [one]})

    def begin(self) -> bytes:
        """Nothing: the role chunks come with the first event, so that an early error is all there is."""
        return b""

    def event(self, event: Event) -> bytes:
        """One event as chunks."""
        if isinstance(event, Begin):
            return b"".join(self._chunk(n, {"role": "assistant", "content": ""}) for n in range(self._ask.n))
        if isinstance(event, Delta):
            field = "reasoning_content" if event.kind == "reasoning" else "content"
            logprobs = {"content": [logprob_body(one) for one in event.logprobs]} if event.logprobs else None
            return self._chunk(event.choice, {field: event.text}, None, logprobs)
        if isinstance(event, Calls):
            calls = [{"index": n, **call_body(call)} for n, call in enumerate(event.calls)]
            return self._chunk(event.choice, {"tool_calls": calls})
        if isinstance(event, End):
            return self._chunk(event.choice, {}, event.reason)
        last = b""
        if self._include_usage or event.session or event.snapshot:
            body = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_body(event)}
            last = sse({**body, **extension(event)})
        return last + b"data: [DONE]\n\n"

    def failure(self, error: KvdbError) -> bytes:
        """An error in the middle of a stream."""
        return sse(openai_body(error))

    def error_body(self, error: KvdbError) -> dict[str, Any]:
        """An error response."""
        return openai_body(error)

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The completion."""
        choices = []
        for number, choice in enumerate(answer.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message["tool_calls"] = [call_body(call) for call in choice.calls]
                message["content"] = choice.content or None
            logprobs = None
            if self._ask.logprobs is not None:
                logprobs = {"content": [logprob_body(one) for one in choice.logprobs], "refusal": None}
            choices.append({"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.reason})
        done = answer.usage
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_body(done),
            **extension(done),
        }
