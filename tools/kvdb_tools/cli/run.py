"""Run commands on one connection and write their replies.

Keeps the connection between commands and opens it again when it was lost between two of them; a command that was
sent is never sent twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.render import as_json, for_people, raw
from kvdb_tools.cli.reply import ConnectionClosed, ErrorReply, Push, Reply
from kvdb_tools.cli.stream import Watcher, without_streamed
from kvdb_tools.cli.words import QuoteError, split_line

Style = Literal["people", "raw", "json"]

# These answer more than once: the reply is only the beginning.
_ENDLESS = {b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"}


@dataclass(frozen=True, slots=True)
class Output:
    """How replies are written. `streams`: someone watches, so GENERATE streams and long work shows a bar."""

    style: str
    streams: bool


def follow(target: Target, words: Sequence[bytes]) -> Target:
    """Where a connection stands after a command that went well."""
    texts = [word.decode(errors="replace") for word in words]
    match [texts[0].upper(), *texts[1:]]:
        case ["SELECT", number]:
            return replace(target, database=int(number))
        case ["AUTH", password]:
            return replace(target, user=None, password=password)
        case ["AUTH", user, password]:
            return replace(target, user=user, password=password)
        case ["RESET"]:
            return replace(target, database=0, user=None, password=None, protocol=2)
        case ["HELLO", ("2" | "3") as version, *_]:
            return replace(target, protocol=int(version))
        case _:
            return target


class Runner:
    """Sends commands, shows what comes back, returns an exit status for each."""

    def __init__(
        self, target: Target, output: Output, timeout: float | None = None, out: BinaryIO | None = None
    ) -> None:
        """Nothing is connected before the first command. `out` is standard output unless given."""
        self.target = target  # follows SELECT and AUTH, so that a new connection stands where the lost one stood
        self.output = output
        self._timeout = timeout
        self._out = out or sys.stdout.buffer
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        """The connection, opened if there is none."""
        if self._connection is None:
            self._connection = Connection(self.target, self._timeout)
        return self._connection

    def close(self) -> None:
        """Close the connection, if any."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def run(self, words: Sequence[bytes]) -> int:
        """Send one command and write its reply. Returns 0, or 1 for an error reply. Raises OSError without a server."""
        name = words[0].upper()
        words = list(words)
        if self._adds_stream(name, words):
            words.append(b"STREAM")
        watcher = Watcher(self._out, self.write, self.output.streams and sys.stderr.isatty())
        on_push = self.write if self.output.style == "json" else watcher
        try:
            reply = self.connection.send(words, on_push)
        except ConnectionClosed:
            self.close()
            if name == b"SHUTDOWN":
                return 0  # a server that ends does not answer
            raise
        except BaseException:
            self.close()
            raise
        finally:
            watcher.finish()
        if not isinstance(reply, ErrorReply):
            self.target = follow(self.target, words)
        streamed = watcher.n_tokens > 0
        if streamed and self.output.style == "raw" and not isinstance(reply, ErrorReply):
            return 0
        self.write(without_streamed(reply) if streamed else reply)
        if name in _ENDLESS and not isinstance(reply, ErrorReply):
            self._follow()
        if name == b"QUIT":
            self.close()
        return 1 if isinstance(reply, ErrorReply) else 0

    def run_lines(self, lines: Iterable[bytes]) -> int:
        """Run one command a line; empty lines and lines that begin with # are skipped. Returns the worst status."""
        status = 0
        for number, line in enumerate(lines, 1):
            try:
                words = split_line(line.decode("utf-8", "surrogateescape"))
            except QuoteError as error:
                print(f"line {number}: {error}", file=sys.stderr)
                status = 2
                continue
            if words and not words[0].startswith(b"#"):
                status = max(status, self.run(words))
        return status

    def write(self, reply: Reply) -> None:
        """Write one reply in the chosen style."""
        match self.output.style:
            case "json":
                line = as_json(reply).encode("utf-8", "backslashreplace")
            case "raw":
                line = raw(reply)
            case _:
                line = for_people(reply).encode("utf-8", "backslashreplace")
        self._out.write(line + b"\n")
        self._out.flush()

    def _adds_stream(self, name: bytes, words: Sequence[bytes]) -> bool:
        """Someone who types GENERATE on a terminal wants to see it; a program gets exactly what it asked for."""
        if not self.output.streams or self.target.protocol != 3 or name != b"GENERATE" or len(words) < 2:
            return False
        return all(word.upper() != b"STREAM" for word in words)

    def _follow(self) -> None:
        """Write everything that comes until Ctrl-C; the connection is of no other use afterwards."""
        print("Reading messages... (press Ctrl-C to quit)", file=sys.stderr)
        try:
            while True:
                frame = self.connection.next_frame()
                self.write(list(frame.items) if isinstance(frame, Push) else frame)
        except KeyboardInterrupt:
            pass
        finally:
            self.close()
