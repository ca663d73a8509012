"""The command table: complete, consistent, and the same facts as Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvdb.commands import all_commands
from kvdb.commands.describe import keys_of, syntax_arguments
from kvdb.commands.reference import example_config, page
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE

from .conftest import Daemon, Wire

ROOT = Path(__file__).parents[3]


def test_every_row_has_a_handler() -> None:
    commands = all_commands()
    missing = []
    for row in TABLE:
        container, _, sub = row.name.partition(" ")
        bound = commands.get(container.encode())
        found = bound.subcommands.get(sub.encode()) if bound and sub else bound
        if found is None or (found.fn is None and not row.is_container):
            missing.append(row.name)
    assert set(missing) <= {"STORE COMPACT", "STORE BACKUP", "STORE EXPORT", "STORE IMPORT"}


def test_rows_are_described() -> None:
    for row in TABLE:
        assert row.summary and not row.summary.endswith("."), row.name
        assert row.since and row.complexity, row.name
        if not row.is_container:
            assert bool(row.syntax) or abs(row.arity) <= 1 + row.name.count(" ") + 1, row.name


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "kvdb.conf").read_text() == example_config()
    assert (ROOT / "docs" / "commands.md").read_text() == page(), (
        "run: python -m kvdb.commands.reference docs/commands.md"
    )


def test_facts_are_those_of_redis(daemon: Daemon, redis_daemon: Daemon) -> None:
    """Arity, flags, key positions and ACL categories of every command that both have."""
    ours, theirs = (facts(one.wire()) for one in (daemon, redis_daemon))
    different = {
        name: (ours[name], theirs[name])
        for name in (ours.keys() & theirs.keys()) - {b"restore"}
        if ours[name] != theirs[name]
    }
    # RESTORE is another command here.
    assert not different, different
    assert len(ours.keys() & theirs.keys()) > 150


def facts(wire: Wire) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}

    def walk(row: list[tuple[object, object]]) -> None:
        name, arity, flags, *keys = (item[1] for item in row[:6])
        known = {flag[1] for flag in flags} - {b"movablekeys"}  # type: ignore[attr-defined]
        categories = {item[1] for item in row[6][1]}  # type: ignore[attr-defined]
        found[name] = (arity, known, *keys, categories)  # type: ignore[index]
        for sub in row[9][1]:  # type: ignore[attr-defined]
            walk(sub[1])

    for row in wire("COMMAND")[1]:  # type: ignore[attr-defined]
        walk(row[1])
    return found


@pytest.mark.parametrize(
    ("name", "words", "keys"),
    [
        ("GET", [b"GET", b"a"], [b"a"]),
        ("MSET", [b"MSET", b"a", b"1", b"b", b"2"], [b"a", b"b"]),
        ("DEL", [b"DEL", b"a", b"b"], [b"a", b"b"]),
        ("PING", [b"PING"], []),
        ("RENAME", [b"RENAME", b"a", b"b"], [b"a", b"b"]),
    ],
)
def test_keys_of(name: str, words: list[bytes], keys: list[bytes]) -> None:
    row = next(row for row in TABLE if row.name == name)
    assert keys_of(row, words) == keys


def test_command_subcommands(wire: Wire) -> None:
    assert wire("COMMAND", "COUNT")[1] == str(len(wire("COMMAND")[1])).encode()  # type: ignore[arg-type]
    assert wire("COMMAND", "INFO", "get", "nosuch")[1][1] == ("$", None)  # type: ignore[index]
    assert wire("COMMAND", "GETKEYS", "MSET", "a", "1", "b", "2") == ("*", [("$", b"a"), ("$", b"b")])
    assert wire("COMMAND", "GETKEYS", "PING", "a", "b")[0] == "-"
    assert (b"config|get" in [item[1] for item in wire("COMMAND", "LIST")[1]]) is True  # type: ignore[attr-defined]
    assert wire("COMMAND", "LIST", "FILTERBY", "PATTERN", "hget*") == ("*", [("$", b"hget"), ("$", b"hgetall")])
    names = {item[1] for item in wire("COMMAND", "LIST", "FILTERBY", "ACLCAT", "state")[1]}  # type: ignore[attr-defined]
    assert b"snapshot" in names and b"get" not in names
    docs = wire("COMMAND", "DOCS", "snapshot")[1]
    assert docs[0] == ("$", b"snapshot")  # type: ignore[index]
    assert wire("CONFIG", "HELP")[1][0][0] == "+"  # type: ignore[index]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_clients_can_put_the_syntax_together_again(row: Command) -> None:
    shown = []
    for argument in syntax_arguments(row.syntax):
        assert isinstance(argument, dict)
        text = str(argument["display_text"])
        shown.append(f"[{text}]" if "flags" in argument else text)
    assert " ".join(shown) == row.syntax


def test_syntax_arguments() -> None:
    names = [argument["name"] for argument in syntax_arguments("key value [NX|XX] [EX seconds|PX ms]")]  # type: ignore[index, call-overload]
    assert names == ["key", "value", "NX|XX", "EX seconds|PX ms"]
