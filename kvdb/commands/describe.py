"""COMMAND and its subcommands, and HELP of every container: all from the command table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.registry import Bound, handler
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE
from kvdb.errors import KvdbError
from kvdb.glob import matches
from kvdb_protocol.replies import Reply, Simple

if TYPE_CHECKING:
    from kvdb.net.client import Client


def wire_name(command: Command) -> str:
    """`config|get` for CONFIG GET."""
    return command.name.lower().replace(" ", "|")


def _top(client: Client) -> dict[str, Bound]:
    return {name.decode(): bound for name, bound in client.server.commands.items() if name.isupper()}


def _info(bound: Bound) -> Reply:
    command = bound.command
    flags = {Simple(flag): None for flag in command.flags.split()}
    categories = [Simple(f"@{name}") for name in sorted(command.acl_categories)]
    return [
        wire_name(command),
        command.arity,
        list(flags),
        *command.keys,
        categories,
        [],
        _key_specs(command),
        [_info(sub) for sub in bound.subcommands.values()],
    ]


def _key_specs(command: Command) -> list[Reply]:
    first, last, step = command.keys
    if not first:
        return []
    access = "RW" if "write" in command.flag_set else "RO"
    return [
        {
            "flags": [Simple(access), Simple("access" if access == "RO" else "update")],
            "begin_search": {"type": "index", "spec": {"index": first}},
            "find_keys": {
                "type": "range",
                "spec": {"lastkey": last - first if last > 0 else last, "keystep": step, "limit": 0},
            },
        }
    ]


@handler("COMMAND")
def command(client: Client, args: list[bytes]) -> Reply:
    """Every command."""
    return [_info(bound) for bound in _top(client).values()]


@handler("COMMAND COUNT")
def command_count(client: Client, args: list[bytes]) -> Reply:
    """How many, without subcommands."""
    return len(_top(client))


@handler("COMMAND INFO")
def command_info(client: Client, args: list[bytes]) -> Reply:
    """The named ones, or all; null for one that does not exist."""
    top = _top(client)
    if not args:
        return [_info(bound) for bound in top.values()]
    found = [_named(top, name) for name in args]
    return [_info(bound) if bound is not None else None for bound in found]


def _named(top: dict[str, Bound], name: bytes) -> Bound | None:
    container, _, sub = name.upper().decode("utf-8", "replace").partition("|")
    bound = top.get(container)
    return bound.subcommands.get(sub.encode()) if bound is not None and sub else bound


@handler("COMMAND DOCS")
def command_docs(client: Client, args: list[bytes]) -> Reply:
    """Summary, syntax, group and complexity."""
    top = _top(client)
    chosen = [_named(top, name) for name in args] if args else list(top.values())
    return {wire_name(bound.command): _docs(bound) for bound in chosen if bound is not None}


def _docs(bound: Bound) -> Reply:
    row = bound.command
    docs: dict[str, Reply] = {
        "summary": row.summary,
        "since": row.since,
        "group": row.group,
        "complexity": row.complexity,
    }
    arguments = syntax_arguments(row.syntax)
    if arguments:
        docs["arguments"] = arguments
    if bound.subcommands:
        docs["subcommands"] = {wire_name(sub.command): _docs(sub) for sub in bound.subcommands.values()}
    return docs


def syntax_arguments(syntax: str) -> list[Reply]:
    """The top-level arguments of a syntax line, in the form COMMAND DOCS has: clients show them as hints."""
    arguments: list[Reply] = []
    for token in _top_level(syntax):
        # `[id ...]|IDS` begins with a bracket, but is not one optional argument.
        optional = token.startswith("[") and token.endswith("]")
        text = token[1:-1] if optional else token
        kind = "string" if optional or not text.isupper() else "pure-token"
        argument: dict[str, Reply] = {"name": text, "type": kind, "display_text": text}
        if kind == "pure-token":
            argument["token"] = text
        if optional:
            argument["flags"] = [Simple("optional")]
        arguments.append(argument)
    return arguments


def _top_level(syntax: str) -> list[str]:
    tokens, depth, start = [], 0, 0
    for at, char in enumerate(syntax + " "):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        elif char == " " and not depth:
            if at > start:
                tokens.append(syntax[start:at])
            start = at + 1
    return tokens


@handler("COMMAND LIST")
def command_list(client: Client, args: list[bytes]) -> Reply:
    """All names, or those of an ACL category or matching a pattern."""
    names = []
    every = [b for bound in _top(client).values() for b in (bound, *bound.subcommands.values())]
    if not args:
        return [wire_name(bound.command) for bound in every]
    if len(args) != 3 or args[0].upper() != b"FILTERBY":
        raise KvdbError("syntax error")
    kind, value = args[1].upper(), args[2]
    for bound in every:
        name = wire_name(bound.command)
        if kind == b"ACLCAT":
            wanted = value.decode("utf-8", "replace").lower() in bound.command.acl_categories
        elif kind == b"PATTERN":
            wanted = matches(value.lower(), name.encode())
        elif kind == b"MODULE":
            wanted = False
        else:
            raise KvdbError("syntax error")
        if wanted:
            names.append(name)
    return list(names)


@handler("COMMAND GETKEYS")
def command_getkeys(client: Client, args: list[bytes]) -> Reply:
    """The keys in a command."""
    from kvdb.commands.dispatch import find

    try:
        bound = find(client.server.commands, args)
    except KvdbError:
        raise KvdbError("Invalid command specified") from None
    if not bound.min_args <= len(args) <= bound.max_args:
        raise KvdbError("Invalid number of arguments specified for command")
    keys = keys_of(bound.command, args)
    if not keys:
        raise KvdbError("The command has no key arguments")
    return list(keys)


def keys_of(row: Command, request: list[bytes]) -> list[bytes]:
    """The keys in a request, names included in the positions."""
    first, last, step = row.keys
    if not first:
        return []
    stop = last + 1 if last > 0 else len(request) + last + 1
    return request[first:stop:step]


def _help(container: str) -> list[Reply]:
    lines: list[Reply] = [Simple(f"{container} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:")]
    for row in TABLE:
        if row.name.startswith(container + " "):
            lines.append(Simple(f"{row.name.removeprefix(container + ' ')} {row.syntax}".rstrip()))
            lines.append(Simple(f"    {row.summary}."))
    return lines


def _register_help(container: str) -> None:
    @handler(f"{container} HELP")
    def help_(client: Client, args: list[bytes]) -> Reply:
        """The subcommands and what they do."""
        return _help(container)


for _container in sorted(row.name.removesuffix(" HELP") for row in TABLE if row.name.endswith(" HELP")):
    _register_help(_container)
