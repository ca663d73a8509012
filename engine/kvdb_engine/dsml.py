"""DSML: how the model writes tool calls. Rendering, and a parser that is fed the model's text as it comes.

    block  := "\\n\\n" "<M" "tool_calls>\\n" invoke+ "</M" "tool_calls>"        M is the marker ｜DSML｜
    invoke := "<M" 'invoke name="' attr '">\\n' param* "</M" "invoke>\\n"
    param  := "<M" 'parameter name="' attr '" string="true|false">' value "</M" "parameter>\\n"

string="true": raw text in which only the closing parameter tag is escaped (its "<" as &lt;). string="false": minified
JSON in which a closing tag has its "<" written as \\u003c. The parser also takes the marker without its first bar and
plain `<tool_calls>` tags, and decodes the five XML entities in string values. Malformed blocks come back as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvdb_engine.tokenizer import DSML, THINK_END

_PARAMETER_END = f"</{DSML}parameter>"
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&"))
# The marker as the parser accepts it: whole, without its first bar, or not at all.
_M = "(?:｜?DSML｜)?"
_OPEN = re.compile(rf"(?:\n\n)?<{_M}tool_calls>")
_CLOSE = re.compile(rf"</{_M}tool_calls>")
_INVOKE = re.compile(rf'<{_M}invoke name="([^"]*)"\s*>')
_INVOKE_CLOSE = re.compile(rf"</{_M}invoke>")
_PARAMETER = re.compile(rf'<{_M}parameter name="([^"]*)"(?: string="(true|false)")?\s*>')
_PARAMETER_CLOSE = re.compile(rf"</{_M}parameter>")
_SPACE = re.compile(r"\s*")
# How each tag ends: text that has no such ending yet may still become the tag that is expected.
_TAG_ENDS = ('">', "invoke>", "tool_calls>")
# The longest text that may still turn out to be an opening tag.
_OPEN_LENGTH = len(f"\n\n<{DSML}tool_calls>")


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def render_calls(calls: Sequence[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """Render tool calls. calls: (name, arguments as JSON text). Yields (text, is_control) pieces.

    Arguments that are no JSON object become one string parameter named "arguments".
    """
    yield f"\n\n<{DSML}tool_calls>\n", True
    for name, arguments in calls:
        yield f'<{DSML}invoke name="', True
        yield _attribute(name), False
        yield '">\n', True
        for parameter, is_string, value in _parameters(arguments):
            yield f'<{DSML}parameter name="', True
            yield _attribute(parameter), False
            yield f'" string="{"true" if is_string else "false"}">', True
            yield value, False
            yield f"{_PARAMETER_END}\n", True
        yield f"</{DSML}invoke>\n", True
    yield f"</{DSML}tool_calls>", True


def _parameters(arguments: str) -> Iterator[tuple[str, bool, str]]:
    """(name, is string, text) of each argument, in the order of the JSON object."""
    try:
        tree = json.loads(arguments)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        yield "arguments", True, arguments.replace(_PARAMETER_END, "&lt;" + _PARAMETER_END[1:])
        return
    for name, value in tree.items():
        if isinstance(value, str):
            yield name, True, value.replace(_PARAMETER_END, "&lt;" + _PARAMETER_END[1:])
        else:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            yield name, False, text.replace(_PARAMETER_END, "\\u003c" + _PARAMETER_END[1:])


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. arguments: JSON text of an object, keys in the order the model wrote them."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a finished assistant turn holds. block: the exact text of the tool block, for replay; empty without calls.

    is_cut: a tool block was begun and not ended.
    """

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    block: str = ""
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an assistant's reply that is certain. kind: reasoning, content or calls."""

    kind: str
    text: str
    calls: tuple[ToolCall, ...] = ()


class _MalformedError(ValueError):
    """The text is no tool block."""


def parse_block(block: str) -> tuple[ToolCall, ...] | None:
    """The calls of a whole tool block, opening and closing tag included; None if it is malformed or unfinished."""
    try:
        scanned = _scan(block)
    except _MalformedError:
        return None
    return scanned[1] if scanned and not block[scanned[0] :].strip() else None


def _scan(text: str) -> tuple[int, tuple[ToolCall, ...]] | None:
    """(end, calls) of the tool block that `text` begins with; None while it is unfinished.

    Goes tag by tag, so that values may hold any text but the closing parameter tag. Raises _MalformedError.
    """
    opened = _OPEN.match(text)
    if opened is None:
        raise _MalformedError
    at = opened.end()
    calls: list[ToolCall] = []
    while True:
        found = _tag(text, at, _INVOKE, _CLOSE)
        if found is None:
            return None
        at = found.end()
        if found.re is _CLOSE:
            if not calls:
                raise _MalformedError
            return at, tuple(calls)
        name = _unescape(found.group(1))
        members: dict[str, str] = {}
        while True:
            found = _tag(text, at, _PARAMETER, _INVOKE_CLOSE)
            if found is None:
                return None
            at = found.end()
            if found.re is _INVOKE_CLOSE:
                break
            closed = _PARAMETER_CLOSE.search(text, at)
            if closed is None:
                return None
            members[_unescape(found.group(1))] = _value(text[at : closed.start()], found.group(2) != "false")
            at = closed.end()
        pairs = (f"{json.dumps(key, ensure_ascii=False)}:{value}" for key, value in members.items())
        calls.append(ToolCall(name, "{" + ",".join(pairs) + "}"))


def _tag(text: str, at: int, *wanted: re.Pattern[str]) -> re.Match[str] | None:
    """The next tag, white space skipped; None if it is unfinished. Raises _MalformedError if it is another one."""
    space = _SPACE.match(text, at)
    at = space.end() if space else at
    for pattern in wanted:
        found = pattern.match(text, at)
        if found is not None:
            return found
    rest = text[at:]
    if (rest and not rest.startswith("<")) or any(end in rest for end in _TAG_ENDS):
        raise _MalformedError
    return None


def _value(text: str, is_string: bool) -> str:
    """A parameter's value as JSON text. Raises _MalformedError."""
    if is_string:
        return json.dumps(_unescape(text), ensure_ascii=False)
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    except ValueError as error:
        raise _MalformedError from error


def _unescape(text: str) -> str:
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text


class ReplyParser:
    """Splits a reply into reasoning, content and tool calls while it is being generated.

    Feed it decoded text; it returns the pieces that are certain and holds back what may still become a tag. Tool blocks
    before </think> are reasoning. `is_done` turns true at the closing tag of a tool block: generation stops there.
    """

    def __init__(self, *, thinking: bool = False) -> None:
        self._thinking = thinking
        self._held = ""
        self._in_block = False
        self._parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: tuple[ToolCall, ...] = ()
        self._block = ""
        self._is_cut = False
        self.is_done = False

    def feed(self, text: str) -> list[Piece]:
        """Take in more text; returns what became certain."""
        if self.is_done:
            return []
        self._held += text
        pieces: list[Piece] = []
        if self._thinking:
            self._split_reasoning(pieces)
        if not self._thinking:
            self._split_content(pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """The reply has ended: what was held back is what it looks like."""
        pieces: list[Piece] = []
        if self._held:
            self._is_cut = self._in_block
            self._emit(pieces, "reasoning" if self._thinking else "content", self._held)
            self._held = ""
        return pieces

    def reply(self) -> Reply:
        """All that was parsed so far."""
        reasoning, content = "".join(self._parts["reasoning"]), "".join(self._parts["content"])
        return Reply(reasoning, content, self._calls, self._block, self._is_cut)

    def _emit(self, pieces: list[Piece], kind: str, text: str) -> None:
        if text:
            self._parts[kind].append(text)
            pieces.append(Piece(kind, text))

    def _split_reasoning(self, pieces: list[Piece]) -> None:
        at = self._held.find(THINK_END)
        if at >= 0:
            self._emit(pieces, "reasoning", self._held[:at])
            self._held = self._held[at + len(THINK_END) :]
            self._thinking = False
            return
        keep = _overlap(self._held, THINK_END)
        self._emit(pieces, "reasoning", self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def _split_content(self, pieces: list[Piece]) -> None:
        if not self._in_block:
            opened = _OPEN.search(self._held)
            if opened is None:
                sure = _sure_length(self._held)
                self._emit(pieces, "content", self._held[:sure])
                self._held = self._held[sure:]
                return
            self._emit(pieces, "content", self._held[: opened.start()])
            self._held = self._held[opened.start() :]
            self._in_block = True
        calls: tuple[ToolCall, ...] = ()
        try:
            scanned = _scan(self._held)
            if scanned is None:
                return
            end, calls = scanned
        except _MalformedError:
            # Text after all; but the model meant to end its turn at the closing tag, so wait for that.
            closed = _CLOSE.search(self._held)
            if closed is None:
                return
            end = closed.end()
        block = self._held[:end]
        self.is_done, self._in_block, self._held = True, False, ""
        if not calls:
            self._emit(pieces, "content", block)
            return
        self._calls, self._block = calls, block
        pieces.append(Piece("calls", block, calls))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _sure_length(text: str) -> int:
    """How much of `text` cannot be part of an opening tag any more."""
    first = max(0, len(text) - _OPEN_LENGTH + 1)
    for start in range(first, len(text)):
        tail = text[start:]
        if any(mark.startswith(tail) for mark in _OPEN_MARKS):
            return start
    return len(text)


_OPEN_MARKS = tuple(f"{blank}<{marker}tool_calls>" for blank in ("\n\n", "") for marker in (DSML, DSML[1:], ""))
