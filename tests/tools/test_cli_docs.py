from __future__ import annotations

import pytest

from kvdb_tools.cli.complete import complete_keys, complete_words
from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.docs import CommandDoc, find_doc, load_docs, remaining_syntax
from kvdb_tools.cli.prompt import help_text, hint


def bulk(text: str) -> str:
    return f"${len(text)}\r\n{text}\r\n"


def fields(head: str, **values: str) -> str:
    return f"{head}{len(values)}\r\n" + "".join(bulk(key) + value for key, value in values.items())


def argument(name: str, kind: str, *flags: str, token: str = "", inner: str = "") -> str:
    more = {"token": bulk(token)} if token else {}
    if flags:
        more["flags"] = f"~{len(flags)}\r\n" + "".join(bulk(flag) for flag in flags)
    if inner:
        more["arguments"] = inner
    return fields("%", name=bulk(name), type=bulk(kind), **more)


FORK = fields(
    "%",
    summary=bulk("Name a state again."),
    since=bulk("0.1.0"),
    group=bulk("state"),
    arguments="*2\r\n" + argument("source", "key") + argument("dest", "key", "multiple"),
)
SNAPSHOT = fields(
    "%",
    summary=bulk("Keep a state."),
    arguments="*4\r\n"
    + argument("session", "key")
    + argument("key", "key")
    + argument(
        "expiry",
        "oneof",
        "optional",
        inner="*2\r\n" + argument("s", "integer", token="EX") + argument("ms", "integer", token="PX"),
    )
    + argument("pin", "pure-token", "optional", token="PIN"),
)
STORE = fields(
    "%",
    summary=bulk("A container."),
    subcommands=f"%1\r\n{bulk('store|stats')}" + fields("%", summary=bulk("Bytes.")),
)
DOCS = ("%3\r\n" + bulk("fork") + FORK + bulk("snapshot") + SNAPSHOT + bulk("store") + STORE).encode()


@pytest.fixture
def docs(fake_server) -> dict[str, CommandDoc]:
    fake_server.answers[b"COMMAND"] = DOCS
    with Connection(Target(port=fake_server.port)) as connection:
        return load_docs(connection)


def test_syntax_is_rendered_in_redis_notation(docs) -> None:
    assert docs["FORK"].syntax == "source dest [dest ...]"
    assert docs["SNAPSHOT"].syntax == "session key [EX s | PX ms] [PIN]"
    assert docs["SNAPSHOT"].tokens == ("EX", "PX", "PIN")
    assert docs["STORE STATS"].summary == "Bytes."


def test_resp2_documents_are_read_too(fake_server) -> None:
    flat = "*2\r\n" + bulk("ping") + "*2\r\n" + bulk("summary") + bulk("Pong.")
    fake_server.answers[b"COMMAND"] = flat.encode()
    with Connection(Target(port=fake_server.port, protocol=2)) as connection:
        assert load_docs(connection)["PING"].summary == "Pong."


def test_a_server_without_docs_gives_none(fake_server) -> None:
    with Connection(Target(port=fake_server.port)) as connection:
        assert load_docs(connection) == {}


def test_hints_shrink_while_typing(docs) -> None:
    assert hint(docs, "fork") == "FORK source dest [dest ...]   (Name a state again.)"
    assert hint(docs, "snapshot s k").startswith("SNAPSHOT [EX s | PX ms] [PIN]")
    assert hint(docs, "store stats") == "STORE STATS   (Bytes.)"
    assert hint(docs, "nope") == ""
    assert remaining_syntax(docs["FORK"], 5) == "[dest ...]"


def test_help_answers_from_the_documents(docs) -> None:
    assert "FORK source dest" in help_text(docs, ["fork"])
    assert "FORK SNAPSHOT STORE" in help_text(docs, [])
    assert "no command" in help_text(docs, ["x"])
    assert find_doc(docs, []) is None


def test_completion_offers_commands_subcommands_and_keywords(docs) -> None:
    assert complete_words(docs, [], "s") == ["SNAPSHOT", "STORE"]
    assert complete_words(docs, ["store"], "") == ["STATS"]
    assert complete_words(docs, ["snapshot", "s", "k", "EX"], "P") == ["PX", "PIN"]


def test_completion_of_keys_escapes_patterns_and_stops(fake_server) -> None:
    pages = {b"0": b"*2\r\n$1\r\n7\r\n*1\r\n$3\r\na*b\r\n", b"7": b"*2\r\n$1\r\n0\r\n*1\r\n$4\r\na* c\r\n"}
    fake_server.answers[b"SCAN"] = lambda words: pages[words[1]]
    with Connection(Target(port=fake_server.port)) as connection:
        assert complete_keys(connection, "a*") == ['"a* c"', "a*b"]
    assert fake_server.commands[-1][3] == rb"a\**"
