"""What Tab offers: command names, their keywords, and keys of the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from click.shell_completion import CompletionItem

from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.docs import CommandDoc, find_doc, load_docs
from kvdb_tools.cli.words import quote

# Enough to choose from; a keyspace of a million keys must not be walked for a key press.
MAX_KEYS = 50
MAX_SCANS = 10


def complete_words(docs: Mapping[str, CommandDoc], given: list[str], incomplete: str) -> list[str]:
    """Command names for the first word; after it, subcommands and keywords of the command."""
    start = incomplete.upper()
    if not given:
        return sorted(name for name in docs if " " not in name and name.startswith(start))
    prefix = given[0].upper() + " "
    found: list[str] = []
    if len(given) == 1:
        found += sorted(name.removeprefix(prefix) for name in docs if name.startswith(prefix + start))
    match = find_doc(dict(docs), given)
    if match:
        used = {word.upper() for word in given}
        found += [token for token in match[0].tokens if token.startswith(start) and token not in used]
    return found


def complete_keys(connection: Connection, incomplete: str) -> list[str]:
    """Keys that begin with what was typed, quoted as the prompt needs them; at most MAX_KEYS."""
    pattern = "".join("\\" + char if char in "*?[]\\" else char for char in incomplete) + "*"
    found: list[str] = []
    cursor: bytes = b"0"
    for _ in range(MAX_SCANS):
        reply = connection.call("SCAN", cursor, "MATCH", pattern, "COUNT", 500)
        if not (isinstance(reply, list) and len(reply) == 2):
            break
        at, keys = reply
        found += [quote(key) for key in keys if isinstance(key, bytes)] if isinstance(keys, list) else []
        cursor = at if isinstance(at, bytes) else b"0"
        if cursor == b"0" or len(found) >= MAX_KEYS:
            break
    return sorted(set(found))[:MAX_KEYS]


def complete_for_shell(params: Mapping[str, Any], incomplete: str) -> list[CompletionItem]:
    """For bash, zsh and fish. Silent when there is no server: a key press is no place for an error."""
    target = Target(
        params.get("host") or "127.0.0.1",
        params.get("port") or 6374,
        params.get("unixsocket"),
        params.get("user"),
        params.get("password"),
        params.get("database") or 0,
    )
    given: Iterable[str] = params.get("command") or ()
    try:
        with Connection(target, timeout=0.5) as connection:
            words = list(given)
            found = complete_words(load_docs(connection), words, incomplete)
            if words:
                found += complete_keys(connection, incomplete)
    except OSError:
        return []
    return [CompletionItem(word) for word in found]
