"""Bad input: what each bad command is answered with, and that the daemon answers PING after all of them.

python tests/show/bad_commands.py [--quick]
"""

from __future__ import annotations

import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.reply import ErrorReply, Status
from kvdb_tools.daemon import Caller, Daemon, as_int

# A model that is not served when the bad commands come.
FOREIGN = "synthetic:dsv4-nano"
KEYS = ["foreign", "live", "other", "snap", "stranger", "text"]
CLOSED = "(closed)"
LATER = "(waits)"


@dataclass(frozen=True)
class Bad:
    """A command as words, or bytes as they are; `expected` is a pattern for the answer."""

    sent: tuple[str | bytes | int, ...] | bytes
    expected: str


def bad(expected: str, *words: str | bytes | int) -> Bad:
    return Bad(words, expected)


def junk(expected: str, data: bytes) -> Bad:
    return Bad(data, expected)


def table_of_bad_commands(context: int, vocab: int) -> list[Bad]:
    too_many = ["1"] * (context + 1)
    return [
        # nothing like a command
        bad("ERR unknown command", "NOPE", "x"),
        bad("ERR unknown command", b"\x00\xff\xfe"),
        bad("ERR wrong number of arguments", "PREFILL"),
        bad("ERR wrong number of arguments", "SNAPSHOT", "s"),
        bad("ERR wrong number of arguments", "REWIND", "s", "TOKENS"),
        bad("ERR wrong number of arguments|ERR unknown subcommand", "ENGINE"),
        bad("ERR unknown subcommand", "ENGINE", "DANCE"),
        bad("ERR unknown subcommand", "STORE", "DANCE"),
        bad("NOPROTO", "HELLO", 4),
        bad("ERR", "SELECT", 99),
        bad("ERR", "SELECT", "x"),
        bad("ERR", "EXPIRE", "text", "soon"),
        bad("ERR", "SCAN", "x"),
        bad("ERR", "CONFIG", "SET", "no-such-name", "1"),
        # sessions and keys that are not there, or are something else
        bad("ERR no such session", "GENERATE", "nobody"),
        bad("ERR no such session", "EXTEND", "nobody", "TEXT", "x"),
        bad("ERR no such session", "SNAPSHOT", "nobody", "k"),
        bad("ERR no such session", "REWIND", "nobody", "STEPS", 1),
        bad("ERR no such session", "ENGINE", "CANCEL", "nobody"),
        bad("ERR no such snapshot", "RESTORE", "nothing", "s2"),
        bad("ERR no such", "FORK", "nothing", "b"),
        bad("ERR no such", "SAMPLE", "nothing"),
        bad("ERR no such", "LOGITS", "nothing"),
        bad("ERR no such", "LINEAGE", "nothing"),
        bad("ERR no such", "SNAPINFO", "nothing"),
        bad("ERR no such", "SNAPDIFF", "snap", "nothing"),
        bad("ERR no such", "PIN", "nothing"),
        bad("WRONGTYPE", "RESTORE", "text", "s2"),
        bad("WRONGTYPE", "PREFILL", "text", "TEXT", "x"),
        bad("WRONGTYPE", "GENERATE", "text"),
        bad("WRONGTYPE", "GET", "snap"),
        bad("WRONGTYPE", "SNAPINFO", "live"),
        bad("WRONGTYPE", "RESTORE", "snap", "text", "REPLACE"),
        bad("WRONGMODEL", "RESTORE", "foreign", "s2"),
        bad("WRONGMODEL", "FORK", "foreign", "s2"),
        bad("BUSYKEY", "RESTORE", "snap", "live"),
        bad("BUSYKEY", "FORK", "snap", "live"),
        bad("ERR the same destination", "FORK", "snap", "b", "b"),
        # prompts
        bad("ERR", "PREFILL", "s", "TEXT"),
        bad("ERR", "PREFILL", "s", "POEM", "x"),
        bad("ERR.*UTF-8", "PREFILL", "s", "TEXT", b"\xff\xfe"),
        bad("ERR.*empty", "PREFILL", "s", "TOKENS", 0),
        bad("ERR", "PREFILL", "s", "TOKENS", 5, 1, 2),
        bad("ERR", "PREFILL", "s", "TOKENS", -1, 1),
        bad("ERR", "PREFILL", "s", "TOKENS", 4_000_000_000, 1),
        bad("ERR.*out of range", "PREFILL", "s", "TOKENS", 2, 1, vocab),
        bad("ERR", "PREFILL", "s", "TOKENS", 1, -5),
        bad("ERR", "PREFILL", "s", "TOKENS", 1, "one"),
        bad("TOOLONG", "PREFILL", "s", "TOKENS", len(too_many), *too_many),
        bad("ERR.*JSON", "PREFILL", "s", "CHAT", "[{"),
        bad("ERR", "PREFILL", "s", "CHAT", "17"),
        bad("ERR", "PREFILL", "s", "CHAT", '[{"role": "nobody", "content": "x"}]'),
        bad("ERR", "PREFILL", "s", "CHAT", '[{"content": 7}]'),
        bad("ERR REUSE", "PREFILL", "s", "TEXT", "x", "REUSE", "MAYBE"),
        bad("NOENGINE", "PREFILL", "s", "TEXT", "x", "MODEL", "gpt-none"),
        bad("NOENGINE", "TOKENIZE", "gpt-none", "x"),
        bad("ERR", "DETOKENIZE", "dsv4-nano", vocab),
        bad("ERR", "PREFIX", "TOKENS", 1, vocab),
        # numbers
        bad("ERR MAXTOKENS", "GENERATE", "live", "MAXTOKENS", 0),
        bad("ERR", "GENERATE", "live", "MAXTOKENS", 10**30),
        bad("ERR", "GENERATE", "live", "TEMPERATURE", "hot"),
        bad("ERR", "GENERATE", "live", "TEMPERATURE", "nan"),
        bad("ERR TEMPERATURE", "GENERATE", "live", "TEMPERATURE", -1),
        bad("ERR TOPP", "GENERATE", "live", "TOPP", 2),
        bad("ERR (?!internal)", "GENERATE", "live", "TOPP", 0),
        bad("ERR MINP", "GENERATE", "live", "MINP", -1),
        bad("ERR", "GENERATE", "live", "SEED", -1),
        bad("ERR", "GENERATE", "live", "STOP", 3, "a"),
        bad("ERR.*empty", "GENERATE", "live", "STOP", 1, ""),
        bad("ERR syntax", "GENERATE", "live", "LOUDLY"),
        bad("ERR COUNT", "SAMPLE", "snap", "COUNT", 0),
        bad("ERR COUNT", "SAMPLE", "snap", "COUNT", 10**9),
        bad("ERR TOP", "LOGITS", "snap", "TOP", 0),
        bad("ERR", "SNAPSHOT", "live", "k", "EX", 0),
        bad("ERR", "SNAPSHOT", "live", "k", "EX", "soon"),
        bad("ERR", "SNAPSHOT", "live", "k", "NX", "XX"),
        bad("ERR", "SNAPSHOT", "live", "k", "META", 2, "a"),
        bad("ERR", "REWIND", "live", "TOKENS", 10**6),
        bad("ERR TOKENS", "REWIND", "live", "TOKENS", 0),
        bad("ERR", "REWIND", "live", "STEPS", 1000),
        bad("ERR.*not an ancestor", "REWIND", "live", "TO", "stranger"),
        bad("ERR", "REWIND", "live", "BACK", 1),
        bad("ERR", "STORE", "EXPORT", "snap", "FILE", "../escape"),
        bad("ERR", "STORE", "EXPORT", "snap", "FILE", "/tmp/escape"),
        bad("ERR no such", "STORE", "EXPORT", "nothing", "FILE", "x"),
        bad("WRONGTYPE", "STORE", "EXPORT", "text", "DATA"),
        bad("CORRUPT", "STORE", "IMPORT", "k", "DATA", b"KVC\x01junk"),
        bad("ERR|CORRUPT", "STORE", "IMPORT", "k", "DATA", b""),
        bad("ERR", "STORE", "IMPORT", "k", "FILE", "not-there"),
        bad("ERR", "STORE", "BACKUP", "../escape"),
        bad("ERR", "STORE", "VERIFY", "SIDEWAYS"),
        # not RESP, or not for long
        junk("ERR Protocol error", b"*3\r\n$3\r\nSET\r\n:1\r\n"),
        junk("ERR Protocol error", b"*2147483648\r\n"),
        junk("ERR Protocol error", b"*1\r\n$999999999999\r\n"),
        junk("ERR Protocol error", b"*x\r\n"),
        junk("ERR Protocol error", b'SET k "open\r\n'),
        junk("ERR Protocol error", b"x" * 100_000),
        junk("ERR unknown command", b"\x16\x03\x01\x02\x00\x01\r\n"),
        junk(re.escape(CLOSED), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        junk(re.escape(LATER), b"*2\r\n$7\r\nPREFILL\r\n$1000\r\nhalf a command, then a close"),
    ]


def answer_to(target: Target, item: Bad) -> str:
    """The first line of the answer, on a connection of its own."""
    if isinstance(item.sent, bytes):
        return answer_to_junk(target, item.sent)
    try:
        with Connection(target, timeout=60) as connection:
            reply = connection.call(*item.sent)
    except ConnectionError:
        return CLOSED
    return reply.text if isinstance(reply, ErrorReply) else f"accepted: {reply!r}"[:100]


def answer_to_junk(target: Target, data: bytes) -> str:
    with socket.create_connection((target.host, target.port), timeout=0.5) as sock:
        try:
            sock.sendall(data)
            found = sock.recv(1000)
        except TimeoutError:
            return LATER
        except OSError:
            return CLOSED
    line = found.split(b"\r\n")[0].decode(errors="replace")
    # A web request gets an error for its first line at most, never an answer to the others.
    return line.removeprefix("-") if line and not data.startswith(b"GET /") else CLOSED


def shown(item: Bad) -> str:
    if isinstance(item.sent, bytes):
        return repr(item.sent)[:60]
    words = [
        printable(word.decode(errors="backslashreplace")) if isinstance(word, bytes) else str(word)
        for word in item.sent
    ]
    return " ".join(words[:7])[:60] + (" ..." if len(words) > 7 else "")


def printable(text: str) -> str:
    """Control characters as escapes, brackets safe for rich."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:160])
    return shown.replace("[", "\\[")


@click.command()
@click.option("--quick", is_flag=True, help="The same; it is quick.")
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, model: str) -> None:
    """Print every bad command with its answer; exit 1 when one is not what it should be."""
    console = Console(highlight=False)
    table = Table(title="bad input")
    table.add_column("sent", overflow="fold")
    table.add_column("answer", overflow="fold")
    n_wrong = 0
    with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", {"model": FOREIGN}) as daemon:
        with Connection(daemon.target) as connection:
            Caller(connection)("PREFILL", "f", "TOKENS", 3, 1, 2, 3)
            Caller(connection)("SNAPSHOT", "f", "foreign")
            Caller(connection)("DEL", "f")
        daemon.options["model"] = model
        daemon.restart()
        with Connection(daemon.target) as connection:
            call = Caller(connection)
            facts = next(m for m in call.list("ENGINE", "MODELS") if isinstance(m, dict))
            items = table_of_bad_commands(as_int(facts["context"]), as_int(facts["vocab"]))
            call("SET", "text", "a string")
            for name, text in (("live", "Quel ramo del lago"), ("other", "Di qualcun altro")):
                call("PREFILL", name, "TEXT", text)
            call("SNAPSHOT", "live", "snap")
            call("SNAPSHOT", "other", "stranger")
            before = call.data("LOGITS", "live", "RAW")
        for item in items:
            answer = answer_to(daemon.target, item)
            fine = re.match(item.expected, answer) is not None
            n_wrong += not fine
            mark = "" if fine else f"   [red]expected {item.expected}[/]"
            table.add_row(shown(item), printable(answer) + mark)
        with Connection(daemon.target) as connection:
            pong = connection.call("PING") == Status("PONG")
            same = Caller(connection).data("LOGITS", "live", "RAW") == before
            left = Caller(connection).list("KEYS", "*")
    console.print(table)
    keys = sorted(key.decode() for key in left if isinstance(key, bytes))
    console.print(f"{len(items)} bad inputs, {n_wrong} answered otherwise than expected")
    console.print(
        f"PING after all of them: {'PONG' if pong else 'no answer'}; keys: {keys}; the session is unchanged: {same}"
    )
    raise SystemExit(0 if pong and same and not n_wrong and keys == KEYS else 1)


if __name__ == "__main__":
    main()
