"""What a command expects, read from the server's own COMMAND DOCS: hints, HELP and completion need no second table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import Map, Reply, Set, Status

# In Redis' notation keywords are the words in capitals.
_KEYWORD = re.compile(r"(?<![\w-])[A-Z][A-Z0-9-]+(?![\w-])")


@dataclass(frozen=True, slots=True)
class CommandDoc:
    """One command or subcommand. `name` is upper case, `syntax` what follows it, `tokens` its keywords."""

    name: str
    syntax: str
    summary: str
    group: str
    since: str
    tokens: tuple[str, ...]


def load_docs(connection: Connection) -> dict[str, CommandDoc]:
    """All commands of the server by upper-case name; subcommands as "CONFIG GET". Empty if it has no COMMAND DOCS."""
    docs: dict[str, CommandDoc] = {}
    for name, fields in _pairs(connection.call("COMMAND", "DOCS")):
        _add(docs, _text(name).upper(), fields)
    return docs


def _add(docs: dict[str, CommandDoc], name: str, fields: Reply) -> None:
    name = name.replace("|", " ")
    found = {_text(key): value for key, value in _pairs(fields)}
    syntax = " ".join(_render(_argument(item)) for item in _list(found.get("arguments")))
    docs[name] = CommandDoc(
        name=name,
        syntax=syntax,
        summary=_text(found.get("summary")),
        group=_text(found.get("group")),
        since=_text(found.get("since")),
        tokens=tuple(dict.fromkeys(_KEYWORD.findall(syntax))),
    )
    for sub_name, sub_fields in _pairs(found.get("subcommands")):
        _add(docs, _text(sub_name).upper(), sub_fields)


def _argument(item: Reply) -> dict[str, Reply]:
    return {_text(key): value for key, value in _pairs(item)}


def _render(argument: dict[str, Reply]) -> str:
    """One argument in Redis' own notation."""
    token = _text(argument.get("token"))
    kind = _text(argument.get("type"))
    name = _text(argument.get("display_text")) or _text(argument.get("name"))
    flags = {_text(flag) for flag in _list(argument.get("flags"))}
    inner = [_argument(item) for item in _list(argument.get("arguments"))]
    if kind == "pure-token":
        body, token = token, ""
    elif kind == "oneof":
        body = " | ".join(_render(item) for item in inner)
        # Without brackets around it an alternative would swallow its neighbours.
        body = body if "optional" in flags and not token else f"<{body}>"
    elif kind == "block":
        body = " ".join(_render(item) for item in inner)
    else:
        body = name
    spelled = f"{token} {body}" if token else body
    if "multiple" in flags:
        again = spelled if "multiple_token" in flags else body
        spelled = f"{spelled} [{again} ...]"
    return f"[{spelled}]" if "optional" in flags else spelled


def find_doc(docs: dict[str, CommandDoc], words: list[str]) -> tuple[CommandDoc, int] | None:
    """The command that a line starts with, and how many words name it: 2 for CONFIG GET."""
    for n_words in (2, 1):
        doc = docs.get(" ".join(words[:n_words]).upper()) if len(words) >= n_words else None
        if doc:
            return doc, n_words
    return None


def remaining_syntax(doc: CommandDoc, n_given: int) -> str:
    """The part of the syntax after the `n_given` arguments that were typed already.

    Positional arguments are dropped one by one; optional ones stay until something follows them, since which of them
    a word filled is the server's business.
    """
    parts = _top_level(doc.syntax)
    while n_given and parts and not parts[0].startswith("["):
        parts.pop(0)
        n_given -= 1
    return " ".join(parts)


def _top_level(syntax: str) -> list[str]:
    """Cut a syntax at its outermost spaces."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(syntax):
        depth += char in "[<"
        depth -= char in "]>"
        if char == " " and depth == 0:
            parts.append(syntax[start:at])
            start = at + 1
    return [part for part in [*parts, syntax[start:]] if part]


def _pairs(reply: Reply) -> Iterable[tuple[Reply, Reply]]:
    """A map's pairs; RESP2 sends the same as a flat array."""
    if isinstance(reply, Map):
        return reply.pairs
    if isinstance(reply, list):
        return zip(reply[::2], reply[1::2], strict=False)
    return ()


def _list(reply: Reply) -> Iterable[Reply]:
    if isinstance(reply, Set):
        return reply.items
    return reply if isinstance(reply, list) else ()


def _text(reply: Reply) -> str:
    if isinstance(reply, Status):
        return reply.text
    return reply.decode(errors="replace") if isinstance(reply, bytes) else ""
