"""Configuration: files, options, CONFIG GET, SET and REWRITE."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvdb import config
from kvdb.commands.reference import example_config
from kvdb.config import ConfigError, from_command_line, from_pairs, option_pairs, read_pairs
from kvdb.rewrite import rewritten
from kvdb.server import usage

from .conftest import StartDaemon, Wire

OK = ("+", b"OK")


def test_file_then_options(tmp_path: Path) -> None:
    file = tmp_path / "kvdb.conf"
    file.write_text('# note\n\nport 7000\ndir "/tmp/a b"\nmaxstore 2gb\nmodel a\nmodel b=/x\nbind 127.0.0.1 -::1\n')
    made = from_command_line([str(file), "--port", "7001", "--model", "c", "--appendfsync=always"])
    assert made.number("port") == 7001 and made.text("dir") == "/tmp/a b" and made.number("maxstore") == 2 << 30
    assert made.words("model") == ("a", "b=/x", "c") and made.text("appendfsync") == "always"
    assert made.words("bind") == ("127.0.0.1", "-::1") and made.file == file


BAD = [
    (["--nosuch", "1"], "there is no configuration name 'nosuch'"),
    (["--port", "x"], "port: argument couldn't be parsed into an integer"),
    (["--port", "70000"], "port: argument must be between 0 and 65535 inclusive"),
    (["--port"], "--port needs a value"),
    (["--port", "1", "2"], "port: 'port' takes one value"),
    (["--maxstore", "3zb"], "maxstore: argument must be a memory value"),
    (["--appendfsync", "sometimes"], "appendfsync: argument\\(s\\) must be one of the following: always, everysec, no"),
    (["--protected-mode", "maybe"], "protected-mode: argument must be 'yes' or 'no'"),
    (["--notify-keyspace-events", "KQ"], "Invalid event class character"),
    (["--client-output-buffer-limit", "normal 1 2"], "Wrong number of arguments"),
    (["--client-output-buffer-limit", "what 1 2 3"], "Invalid client class"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_options(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_command_line(words)


def test_the_example_file_says_the_defaults() -> None:
    text = example_config()
    lines = [
        line.removeprefix("# ")
        for line in text.splitlines()
        if line.partition(" ")[2].partition(" ")[0] in config.PARAMETERS
    ]
    assert len(lines) == len(config.PARAMETERS)
    made = from_pairs(read_pairs("\n".join(lines), "example"))
    assert all(made.is_default(name) for name in config.PARAMETERS)


def test_bad_lines_name_the_line() -> None:
    with pytest.raises(ConfigError, match="f, line 2: a name and a value are needed: port"):
        read_pairs("dir x\nport\n", "f")
    with pytest.raises(ConfigError, match="f, line 1"):
        read_pairs('dir "open\n', "f")
    with pytest.raises(ConfigError, match="is not an option"):
        option_pairs(["stray"])


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("1", 1), ("1k", 1000), ("1kb", 1024), ("1mb", 1 << 20), ("1GB", 1 << 30), ("2tb", 2 << 40)]
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert from_pairs([("maxstore", [text])]).number("maxstore") == n_bytes


def test_every_default_is_valid() -> None:
    for parameter in config.PARAMETERS.values():
        if parameter.kind != "limits":
            shown = parameter.show(parameter.default)
            assert parameter.parse([shown]) == parameter.default, parameter.name


def test_help_names_everything() -> None:
    text = usage()
    assert all(f"--{name} " in text for name in config.PARAMETERS) and "Examples" in text
    shown = subprocess.run([sys.executable, "-m", "kvdb", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout == text


def test_bad_start_is_one_line() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvdb", "--nosuch", "1"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr == "kvdb-server: there is no configuration name 'nosuch'\n"


def test_get_and_set(wire: Wire) -> None:
    assert wire("CONFIG", "GET", "appendfsync", "hz") == (
        "*", [("$", b"appendfsync"), ("$", b"everysec"), ("$", b"hz"), ("$", b"10")],
    )  # fmt: skip
    assert wire("CONFIG", "GET", "nosuch") == ("*", [])
    assert wire("CONFIG", "SET", "hz", "20", "timeout", "0") == OK
    assert wire("CONFIG", "GET", "h[a-z]")[1][1] == ("$", b"20")  # type: ignore[index]
    assert wire("CONFIG", "SET", "hz", "30", "timeout", "x")[0] == "-"
    assert wire("CONFIG", "GET", "hz")[1][1] == ("$", b"20"), "all or none"  # type: ignore[index]
    assert wire("CONFIG", "SET", "port", "1")[1].endswith(b"can't set immutable config")  # type: ignore[attr-defined]
    assert wire("CONFIG", "SET", "nosuch", "1")[1].startswith(b"ERR Unknown option")  # type: ignore[attr-defined]
    assert wire("CONFIG", "SET", "hz", "1", "hz", "2")[0] == "-"
    assert wire("CONFIG", "SET", "client-output-buffer-limit", "pubsub 64mb 0 0") == OK
    assert b"pubsub 67108864 0 0" in wire("CONFIG", "GET", "client-output-buffer-limit")[1][1][1]  # type: ignore[index, operator]
    assert wire("CONFIG", "REWRITE")[1] == b"ERR The server is running without a config file"


def test_rewrite_keeps_comments() -> None:
    old = "# mine\nport 7000\n\nhz 10\nmodel a\nmodel b\n"
    lines = {"port": "port 7000", "hz": "hz 20", "maxclients": "maxclients 5", "model": "model c"}
    new = rewritten(old, lines)
    assert new == "# mine\nport 7000\n\nhz 20\nmodel c\n# Written by CONFIG REWRITE\nmaxclients 5\n"
    assert rewritten(new, lines) == new


def test_rewrite(start: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "kvdb.conf"
    file.write_text("# keep me\nhz 10\n")
    wire = start(file=file).wire()
    wire("CONFIG", "SET", "hz", "25", "requirepass", 'a "b" \\c')
    wire("AUTH", 'a "b" \\c')
    assert wire("CONFIG", "REWRITE") == OK
    again = from_command_line([str(file)])
    assert again.number("hz") == 25 and again.text("requirepass") == 'a "b" \\c' and "# keep me" in file.read_text()


def test_idle_clients_are_closed(start: StartDaemon) -> None:
    daemon = start(timeout=1)
    assert daemon.wire().rest() == b""
