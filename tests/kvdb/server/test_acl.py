"""Passwords and ACL rules: an attempt matrix, and what each rule means."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvdb.acl import RuleError, User, all_names, refused
from kvdb.acl_file import read_users
from kvdb.commands.table import TABLE
from kvdb.errors import KvdbError

from .conftest import Daemon, StartDaemon, Wire

OK = ("+", b"OK")
ROWS = {row.name: row for row in TABLE}


def user(*rules: str) -> User:
    made = User(b"u")
    for rule in rules:
        made.apply(rule.encode())
    return made


READER = ("on", "nopass", "~app:*", "+@read", "+@connection")
WRITER = ("on", "nopass", "~app:*", "%R~shared:*", "+@all", "-@dangerous")
ADMIN = ("on", "nopass", "~*", "&*", "+@all")
NOBODY = ("on", "nopass")
NARROW = ("on", "nopass", "~*", "+get", "+config|get", "+client", "-client|kill")
BLIND = ("on", "nopass", "%W~*", "+set", "+get", "+getset", "+del")
MATRIX = [
    (READER, "GET app:1", None),
    (READER, "GET other", "key"),
    (READER, "SET app:1 x", "command"),
    (READER, "MGET app:1 other", "key"),
    (READER, "PING", None),
    (READER, "SNAPINFO app:1", None),
    (READER, "SNAPSHOT app:s app:1", "command"),
    (WRITER, "SET app:1 x", None),
    (WRITER, "SET shared:1 x", "key"),
    (WRITER, "GET shared:1", None),
    (WRITER, "COPY shared:1 app:1", None),
    (WRITER, "COPY app:1 shared:1", "key"),
    (WRITER, "RENAME shared:1 app:1", "key"),
    (WRITER, "SNAPSHOT shared:s app:k", None),
    (WRITER, "FORK shared:k app:s shared:s", "key"),
    (WRITER, "ZRANGESTORE app:z shared:z 0 1", None),
    (WRITER, "ZRANGESTORE shared:z app:z 0 1", "key"),
    (WRITER, "TTL shared:1", None),
    (BLIND, "SET a 1 GET", "key"),
    (BLIND, "SET a 1 EX 9", None),
    (WRITER, "FLUSHALL", "command"),
    (WRITER, "KEYS *", "command"),
    (WRITER, "CONFIG GET x", "command"),
    (WRITER, "SNAPSHOT app:s app:1", None),
    (WRITER, "FORK app:1 app:2 other", "key"),
    (WRITER, "PUBLISH c x", "channel"),
    (ADMIN, "FLUSHALL", None),
    (ADMIN, "PUBLISH c x", None),
    (NOBODY, "GET a", "command"),
    (NOBODY, "PING", "command"),
    (NARROW, "GET a", None),
    (NARROW, "CONFIG GET x", None),
    (NARROW, "CONFIG SET x y", "command"),
    (NARROW, "CLIENT LIST", None),
    (NARROW, "CLIENT KILL x", "command"),
    (BLIND, "SET a 1", None),
    (BLIND, "DEL a", None),
    (BLIND, "GET a", "key"),
    (BLIND, "GETSET a 1", "key"),
    (("on", "nopass", "&news:*", "+subscribe", "+psubscribe"), "SUBSCRIBE news:1", None),
    (("on", "nopass", "&news:*", "+subscribe", "+psubscribe"), "SUBSCRIBE news:1 x", "channel"),
    (("on", "nopass", "&news:*", "+subscribe", "+psubscribe"), "PSUBSCRIBE news:*", None),
    (("on", "nopass", "&news:*", "+subscribe", "+psubscribe"), "PSUBSCRIBE news:1", "channel"),
]


@pytest.mark.parametrize(("rules", "line", "verdict"), MATRIX, ids=[f"{'+'.join(m[0][2:])}:{m[1]}" for m in MATRIX])
def test_matrix(rules: tuple[str, ...], line: str, verdict: str | None) -> None:
    words = line.split()
    row = ROWS.get(" ".join(words[:2])) or ROWS[words[0]]
    found = refused(user(*rules), row, [word.encode() for word in words])
    assert (found[0] if found else None) == verdict


BAD_RULES = {
    "+nosuch": "Unknown command or category name in ACL",
    "+@nosuch": "Unknown command or category name in ACL",
    "#abc": "The password hash must be exactly 64 characters",
    "<unknown": "The password you are trying to remove",
    "%X~a": "Syntax error",
    "%~a": "Syntax error",
    "what": "Syntax error",
}


@pytest.mark.parametrize("rule", BAD_RULES)
def test_bad_rules(rule: str) -> None:
    with pytest.raises(RuleError, match=BAD_RULES[rule].replace("(", r"\(")):
        user(rule)


def test_a_pattern_behind_a_star_is_refused() -> None:
    with pytest.raises(RuleError, match="after the \\* pattern"):
        user("~*", "~a")
    with pytest.raises(RuleError, match="after the \\* pattern"):
        user("&*", "&a")


def test_rules_come_back_as_the_same_user() -> None:
    for rules in (READER, WRITER, ADMIN, NOBODY, NARROW, BLIND, ("on", ">secret", "+get")):
        made = user(*rules)
        again = read_users(made.line(), "test")[b"u"]
        assert (again.allowed, again.keys, again.channels, again.passwords) == (
            made.allowed, made.keys, made.channels, made.passwords,
        )  # fmt: skip


def test_categories_cover_everything() -> None:
    assert user("+@all").allowed == all_names()
    assert user("+@fast", "+@slow").allowed == all_names()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nonsense", "f:1: should start with user keyword"),
        (b"user a on\nuser a off", "f:2: user 'a' is defined twice"),
        (b"\n# note\nuser a +nosuch", "f:3: \\+nosuch: Unknown command"),
    ],
)
def test_bad_files(text: bytes, message: str) -> None:
    with pytest.raises(KvdbError, match=message):
        read_users(text, "f")


def test_requirepass(start: StartDaemon) -> None:
    daemon = start(requirepass="secret")
    wire = daemon.wire()
    assert wire("GET", "a") == ("-", b"NOAUTH Authentication required.")
    assert wire("HELLO", 3)[1].startswith(b"NOAUTH HELLO must be called with the client already")  # type: ignore[attr-defined]
    assert wire("AUTH", "wrong")[1].startswith(b"WRONGPASS invalid username-password pair")  # type: ignore[attr-defined]
    assert wire("HELLO", 3, "AUTH", "default", "secret")[0] == "%"
    assert wire("SET", "a", "1") == OK
    assert wire("RESET") == ("+", b"RESET")
    assert wire("GET", "a")[0] == "-", "RESET ends the authentication"
    assert wire("AUTH", "secret") == OK
    assert wire("CONFIG", "SET", "requirepass", "") == OK
    assert daemon.wire()("GET", "a") == ("$", b"1")
    stranger = start(requirepass="x").wire()
    stranger.raw(b"*11\r\n")
    assert stranger.rest() == b"-ERR Protocol error: unauthenticated multibulk length\r\n"


def test_auth_without_password(wire: Wire) -> None:
    assert wire("AUTH", "x")[1].startswith(b"ERR AUTH <password> called without any password")  # type: ignore[attr-defined]


def test_live_rules(daemon: Daemon, wire: Wire) -> None:
    assert wire("ACL", "SETUSER", "bob", "on", ">pw", "~b:*", "+get", "+set", "+multi", "+exec", "+acl|whoami") == OK
    bob = daemon.wire()
    assert bob("AUTH", "bob", "pw") == OK
    assert bob("SET", "b:1", "x") == OK
    assert bob("SET", "c:1", "x") == ("-", b"NOPERM No permissions to access a key")
    assert bob("DEL", "b:1") == ("-", b"NOPERM User bob has no permissions to run the 'del' command")
    assert bob("ACL", "WHOAMI") == ("$", b"bob")
    assert bob("ACL", "LIST")[1] == b"NOPERM User bob has no permissions to run the 'acl|list' command"
    bob("MULTI")
    assert bob("DEL", "b:1")[0] == "-"
    assert bob("EXEC")[1].startswith(b"EXECABORT")  # type: ignore[attr-defined]
    wire("ACL", "SETUSER", "bob", "-set")
    assert bob("SET", "b:1", "x")[0] == "-", "a change counts at once"
    assert wire("ACL", "DRYRUN", "bob", "GET", "b:1") == OK
    assert wire("ACL", "DRYRUN", "bob", "GET", "c:1")[1] == b"User bob has no permissions to access the 'c:1' key"
    entries = wire("ACL", "LOG")[1]
    assert len(entries) >= 3  # type: ignore[arg-type]
    assert wire("ACL", "DELUSER", "bob") == (":", b"1")
    assert bob.rest() == b""
    assert wire("ACL", "DELUSER", "default")[0] == "-"
    assert wire("ACL", "SETUSER", "x y")[0] == "-"
    assert wire("ACL", "SETUSER", "eve", "+nosuch")[1].startswith(b"ERR Error in ACL SETUSER modifier '+nosuch'")  # type: ignore[attr-defined]
    assert wire("ACL", "GETUSER", "eve") == ("$", None) or wire("ACL", "GETUSER", "eve") == ("*", None)
    assert len(wire("ACL", "GENPASS")[1]) == 64 and len(wire("ACL", "GENPASS", "5")[1]) == 2  # type: ignore[arg-type]


def test_acl_file(start: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "users.acl"
    file.write_text("user default on nopass ~* &* +@all\nuser amy on >pw ~* +get\n")
    daemon = start(aclfile=file)
    wire = daemon.wire()
    assert daemon.wire()("AUTH", "amy", "pw") == OK
    wire("ACL", "SETUSER", "zoe", "on", "nopass", "+ping")
    assert wire("ACL", "SAVE") == OK
    assert "user zoe on nopass" in file.read_text() and "pw" not in file.read_text()
    file.write_text("garbage\n")
    assert wire("ACL", "LOAD")[0] == "-"
    assert b"zoe" in {name[1] for name in wire("ACL", "USERS")[1]}, "a bad file changes nothing"  # type: ignore[index, attr-defined]
