"""How replies look: for people (as redis-cli shows them), raw (for pipes) and JSON (for programs).

Pure functions from a reply to text; nothing here writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from kvdb_tools.cli.reply import ErrorReply, Map, Push, Reply, Set, Status, Verbatim
from kvdb_tools.cli.words import repr_bytes


def for_people(reply: Reply, indent: str = "") -> str:
    """The reply as redis-cli shows it on a terminal, without a trailing newline."""
    match reply:
        case Status(text):
            return text
        case ErrorReply(text):
            return f"(error) {text}"
        case Verbatim(_, text):
            return text.decode(errors="replace")
        case bytes():
            return repr_bytes(reply)
        case None:
            return "(nil)"
        case bool():
            return "(true)" if reply else "(false)"
        case int():
            return f"(integer) {reply}"
        case float():
            return f"(double) {_number(reply)}"
        case list():
            return _numbered(reply, ")", indent) or "(empty array)"
        case Set(items):
            return _numbered(items, "~", indent) or "(empty set)"
        case Push(items):
            return _numbered(items, ")", indent) or "(empty push)"
        case Map(pairs):
            return _pairs(pairs, indent) or "(empty hash)"


def _numbered(items: Sequence[Reply], mark: str, indent: str) -> str:
    width = len(str(len(items)))
    lines = []
    for number, item in enumerate(items, 1):
        head = f"{number:>{width}}{mark} "
        # The first item continues its parent's line; the others start below it.
        start = head if number == 1 else indent + head
        lines.append(start + for_people(item, indent + " " * len(head)))
    return "\n".join(lines)


def _pairs(pairs: Sequence[tuple[Reply, Reply]], indent: str) -> str:
    width = len(str(len(pairs)))
    lines = []
    for number, (key, value) in enumerate(pairs, 1):
        head = f"{number:>{width}}# {for_people(key)} => "
        if isinstance(value, list | Set | Map) and len(_items(value)) > 0:
            inner = indent + " " * (width + 2)
            lines.append((head.rstrip() if number == 1 else indent + head.rstrip()) + "\n" + inner)
            lines[-1] += for_people(value, inner)
        else:
            lines.append((head if number == 1 else indent + head) + for_people(value, indent))
    return "\n".join(lines)


def _items(value: list[Reply] | Set | Map) -> Sequence[object]:
    match value:
        case Set(items):
            return items
        case Map(pairs):
            return pairs
        case list():
            return value


def raw(reply: Reply) -> bytes:
    """The reply's bytes, one value a line, as `redis-cli --raw` prints them, without a trailing newline."""
    match reply:
        case Status(text):
            return text.encode()
        case ErrorReply(text):
            return text.encode()
        case Verbatim(_, data):
            return data
        case bytes():
            return reply
        case None:
            return b""
        case bool():
            return b"(true)" if reply else b"(false)"
        case int():
            return b"%d" % reply
        case float():
            return _number(reply).encode()
        case list():
            return b"\n".join(raw(item) for item in reply)
        case Set(items) | Push(items):
            return b"\n".join(raw(item) for item in items)
        case Map(pairs):
            return b"\n".join(raw(key) + b"\n" + raw(value) for key, value in pairs)


def as_json(reply: Reply) -> str:
    """The reply as one line of JSON. An error is {"error": text}; bytes that are not UTF-8 show as \\xHH."""
    return json.dumps(_plain(reply), ensure_ascii=False)


def _plain(reply: Reply) -> object:
    match reply:
        case Status(text):
            return text
        case ErrorReply(text):
            return {"error": text}
        case Verbatim(_, data):
            return data.decode(errors="backslashreplace")
        case bytes():
            return reply.decode(errors="backslashreplace")
        case float():
            # JSON has no infinity: a string is what every reader can take.
            return reply if math.isfinite(reply) else _number(reply)
        case list():
            return [_plain(item) for item in reply]
        case Set(items) | Push(items):
            return [_plain(item) for item in items]
        case Map(pairs):
            return {_key(key): _plain(value) for key, value in pairs}
        case _:
            return reply


def _key(key: Reply) -> str:
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _number(value: float) -> str:
    return repr(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else repr(value)
