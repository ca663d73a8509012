"""One blocking connection: connect, greet, send a command, read frames until its reply.

Push frames that arrive before the reply are handed to the caller's function in order. A connection that failed is
closed; `Connection.call` never leaves half a reply to be read as the next one.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, cast

from kvdb_tools.cli.reply import ErrorReply, Push, Reply, encode_command, read_reply

OnPush = Callable[[Push], None]


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for TLS, all PEM: certificates to trust (None: the system's), and the client's own certificate and key."""

    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure: bool = False

    def context(self) -> ssl.SSLContext:
        """Raises OSError when a file cannot be read."""
        context = ssl.create_default_context(cafile=self.cacert)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert:
            context.load_cert_chain(self.cert, self.key)
        return context


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect and as whom. `unixsocket` wins over host and port."""

    host: str = "127.0.0.1"
    port: int = 6374
    unixsocket: str | None = None
    user: str | None = None
    password: str | None = None
    database: int = 0
    protocol: int = 3
    tls: Tls | None = None

    def __str__(self) -> str:
        """How the prompt and messages name it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        where = self.unixsocket or f"{host}:{self.port}"
        return f"{where}[{self.database}]" if self.database else where


class RefusedError(ConnectionError):
    """The server answered the greeting (HELLO, AUTH, SELECT) with an error."""


class Connection:
    """A connected, greeted client. Use it in a `with` statement, or call `close`."""

    def __init__(self, target: Target, timeout: float | None = None) -> None:
        """Connect. `timeout` in seconds is for connecting and for every read; None waits for ever."""
        self.target = target
        self._socket = _connect(target, timeout)
        self._stream = cast(BinaryIO, self._socket.makefile("rb", buffering=1 << 16))
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. The server cancels what this connection was waiting for."""
        self._stream.close()
        self._socket.close()

    def call(self, *words: bytes | str | int | float, on_push: OnPush | None = None) -> Reply:
        """Send one command and return its reply; an error reply is returned, not raised."""
        return self.send([_as_bytes(word) for word in words], on_push)

    def send(self, words: Sequence[bytes], on_push: OnPush | None = None) -> Reply:
        """Like `call` for words that are bytes already."""
        try:
            self._socket.sendall(encode_command(words))
            while True:
                reply = read_reply(self._stream)
                if not isinstance(reply, Push):
                    return reply
                if on_push:
                    on_push(reply)
        except BaseException:
            # Also on Ctrl-C: the rest of this reply would be taken for the answer to the next command.
            self.close()
            raise

    def next_frame(self) -> Reply:
        """Wait for one more frame: for SUBSCRIBE and MONITOR, which answer more than once."""
        return read_reply(self._stream)

    def _greet(self) -> None:
        target = self.target
        if target.protocol == 3:
            # Like redis-cli: HELLO carries the password, so that a server that wants one needs no second round trip.
            login = ["AUTH", target.user or "default", target.password] if target.password is not None else []
            self._expect("HELLO", "3", *login)
        elif target.password is not None:
            self._expect("AUTH", *([target.user] if target.user else []), target.password)
        if target.database:
            self._expect("SELECT", str(target.database))

    def _expect(self, *words: str) -> None:
        reply = self.call(*words)
        if isinstance(reply, ErrorReply) and reply.word != "NOAUTH":
            # NOAUTH is not fatal: whoever types can still AUTH.
            raise RefusedError(f"{words[0]}: {reply.text}")


def _connect(target: Target, timeout: float | None) -> socket.socket:
    if target.unixsocket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(target.unixsocket)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((target.host, target.port), timeout)
    # Small requests, small replies: without this a second small write waits for a delayed acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return target.tls.context().wrap_socket(sock, server_hostname=target.host) if target.tls else sock


def _as_bytes(word: bytes | str | int | float) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()
