"""The DSV4 chat template: OpenAI-form messages -> segments of text and control tokens -> token ids.

A rendered prompt is a list of `Segment`s. Control segments hold template text whose control strings are control
tokens. Content segments hold what users, tools and models wrote: control strings in them stay ordinary text. Joined
together they give, byte for byte, the prompt that ds4 renders; but ds4 tokenises the joined text, so a user can forge
a turn there, and not here.

Thinking: `off` ends the prompt with </think>, `on` with <think>, `max` also puts the reasoning-effort text in front.
Tool calls are DSML blocks (dsml.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvdb_engine.dsml import render_calls
from kvdb_engine.tokenizer import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER, Tokenizer


class ChatError(ValueError):
    """The messages are not in the form the template needs; the message names the place."""


class Thinking(Enum):
    """How much the model is asked to reason."""

    OFF = "off"
    ON = "on"
    MAX = "max"


# The wording is DeepSeek's own (MIT), as ds4 renders it: equal bytes let both share prompts and .kv files.
EFFORT_MAX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
TOOLS_BEFORE = (
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user question. You can invoke tools by writing a "
    f'"<{DSML}tool_calls>" block like the following:\n\n'
    f"<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="$TOOL_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}tool_calls>\n\n"
    'String parameters should be specified as raw text and set `string="true"`. Preserve characters such as `>`, `&`, '
    "and `&&` exactly; never replace normal string characters with XML or HTML entity escapes. Only if a string value "
    f"itself contains the exact closing parameter tag `</{DSML}parameter>`, write that tag as "
    f"`&lt;/{DSML}parameter>` inside the value. For all other types (numbers, booleans, arrays, objects), pass the "
    'value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside "
    f"{THINK}...{THINK_END} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {THINK_END} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
TOOLS_AFTER = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls. "
    "Use the exact parameter names from the schemas."
)
COMPLETION_SYSTEM = "You are a helpful assistant"
_RESULT_END = "</tool_result>"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt. is_control: control strings in it are control tokens."""

    text: str
    is_control: bool


class SampledBlock(str):
    """A tool block exactly as the model sampled it. As `tool_calls` of a message it is taken as it is.

    A type of its own, since it holds control strings: no JSON that a client sends can become one.
    """

    __slots__ = ()


class _Prompt:
    """Collects segments."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def control(self, text: str) -> None:
        self._add(text, True)

    def content(self, text: str) -> None:
        self._add(text, False)

    def _add(self, text: str, is_control: bool) -> None:
        if text:
            self.segments.append(Segment(text, is_control))


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] = (),
    thinking: Thinking = Thinking.OFF,
) -> list[Segment]:
    """Render a conversation up to where the assistant continues.

    messages: OpenAI form: role (system, developer, user, assistant, tool, function), content (string or list of text
    parts), and for assistants reasoning_content and tool_calls. tools: OpenAI tools; a string is taken as the raw JSON
    of a schema, anything else is written as JSON. Raises ChatError naming the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError("messages must be a list")
    prompt = _Prompt()
    prompt.control(BOS)
    if thinking is Thinking.MAX:
        prompt.content(EFFORT_MAX)
    system = [_content(m, n) for n, m in enumerate(messages) if _role(m, n) in ("system", "developer")]
    system_text = "\n\n".join(text for text in system if text)
    if tools:
        prompt.control(TOOLS_BEFORE)
        prompt.content("\n".join(_schema(tool, n) for n, tool in enumerate(tools)))
        prompt.control(TOOLS_AFTER + ("\n\n" if system_text else ""))
    prompt.content(system_text)

    has_tools = bool(tools) or any(
        _role(m, n) in ("tool", "function") or m.get("tool_calls") for n, m in enumerate(messages)
    )
    asking = [n for n, m in enumerate(messages) if _role(m, n) in ("user", "tool", "function")]
    last_asking = asking[-1] if asking else -1
    pending = False
    after_tool = False
    for number, message in enumerate(messages):
        role = _role(message, number)
        if role in ("system", "developer"):
            continue
        if role == "user":
            prompt.control(USER)
            prompt.content(_content(message, number))
            pending, after_tool = True, False
        elif role in ("tool", "function"):
            prompt.control(("" if after_tool else USER) + "<tool_result>")
            prompt.content(_content(message, number).replace(_RESULT_END, "&lt;" + _RESULT_END[1:]))
            prompt.control(_RESULT_END)
            pending = after_tool = True
        else:
            reasons = thinking is not Thinking.OFF and (has_tools or number > last_asking)
            if pending:
                prompt.control(ASSISTANT)
                if reasons:
                    prompt.control(THINK)
                    prompt.content(_text(message.get("reasoning_content"), number))
                prompt.control(THINK_END)
            prompt.content(_content(message, number))
            calls = message.get("tool_calls") or ()
            if isinstance(calls, SampledBlock):
                prompt.control(calls)
            elif calls:
                for text, is_control in render_calls(_calls(calls, number)):
                    (prompt.control if is_control else prompt.content)(text)
            prompt.control(EOS)
            pending = after_tool = False
    if pending:
        prompt.control(ASSISTANT + (THINK_END if thinking is Thinking.OFF else THINK))
    return prompt.segments


def render_completion(
    text: str, *, thinking: Thinking = Thinking.OFF, system: str = COMPLETION_SYSTEM
) -> list[Segment]:
    """Render a bare prompt as ds4's /v1/completions does: a stock system sentence and one user turn."""
    return render_chat([{"role": "system", "content": system}, {"role": "user", "content": text}], thinking=thinking)


def prompt_text(segments: Sequence[Segment]) -> str:
    """The prompt as text, byte for byte what ds4 renders."""
    return "".join(segment.text for segment in segments)


def segment_ids(tokenizer: Tokenizer, segments: Sequence[Segment]) -> list[int]:
    """Token ids of a prompt.

    Control strings of control segments become their tokens; everything between two of them, whoever wrote it, is
    tokenised in one piece as ordinary text. So ordinary prompts get the ids they have in ds4, and no content can
    become a control token.
    """
    ids: list[int] = []
    plain = ""
    for segment in segments:
        for text, token in tokenizer.split_control(segment.text) if segment.is_control else [(segment.text, None)]:
            if token is None:
                plain += text
                continue
            ids += tokenizer.encode(plain)
            ids.append(token)
            plain = ""
    return ids + tokenizer.encode(plain)


def chat_ids(tokenizer: Tokenizer, request: Any) -> list[int]:
    """Token ids of a chat given as JSON values: a list of messages, or an object with messages, tools and thinking.

    thinking: "off", "on", "max", true or false. Raises ChatError.
    """
    if isinstance(request, Mapping):
        messages, tools = request.get("messages"), request.get("tools") or ()
        if messages is None:
            raise ChatError("the chat has no messages")
        thinking = parse_thinking(request.get("thinking", request.get("think", False)))
    else:
        messages, tools, thinking = request, (), Thinking.OFF
    return segment_ids(tokenizer, render_chat(messages, tools=tools, thinking=thinking))


def parse_thinking(value: Any) -> Thinking:
    """off, on, max, or a boolean. Raises ChatError."""
    if isinstance(value, bool) or value is None:
        return Thinking.ON if value else Thinking.OFF
    try:
        return Thinking(value)
    except ValueError as error:
        raise ChatError(f"thinking must be off, on or max, got {value!r}") from error


def _role(message: Any, number: int) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("system", "developer", "user", "assistant", "tool", "function"):
        raise ChatError(f"message {number}: role {role!r} is not one of system, developer, user, assistant, tool")
    return str(role)


def _content(message: Mapping[str, Any], number: int) -> str:
    return _text(message.get("content"), number)


def _text(value: Any, number: int) -> str:
    """Content as one string: null is empty, a list of parts is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        parts = []
        for part in value:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                raise ChatError(f"message {number}: only text parts are supported")
        return "".join(parts)
    raise ChatError(f"message {number}: content must be a string or a list of text parts")


def _schema(tool: Any, number: int) -> str:
    """One line of JSON for a tool: its `function` member, as ds4 prints what the client sent."""
    if isinstance(tool, str):
        return tool
    if not isinstance(tool, Mapping):
        raise ChatError(f"tool {number}: must be an object")
    return json.dumps(tool.get("function", tool), ensure_ascii=False)


def _calls(calls: Any, number: int) -> list[tuple[str, str]]:
    """(name, arguments as JSON text) of each tool call."""
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ChatError(f"message {number}: tool_calls must be a list")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"message {number}: a tool call needs a function with a name")
        arguments = function.get("arguments", "{}")
        found.append(
            (function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        )
    return found
