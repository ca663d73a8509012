"""The engine's queue is fair: 200 requests of 50 clients, half of which go away; CANCEL, DEADLINE and BUSY.

python tests/show/fairness.py [--quick]

Each client has four connections and on each a PREFILL of as many tokens, all different, on a session of its own. When
the requests have come about half way, ENGINE STATUS tells how far each is: the progress of the clients is compared.
It moves by chunks of 256 tokens, one or two a turn: with requests of four chunks that alone can be a factor of 1.67.
Then half of the clients disconnect; the others must finish, no work may be left over, and what the vanished clients had
must still be usable.
"""

from __future__ import annotations

import selectors
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import encode_command
from kvdb_tools.daemon import Caller, CommandError, Daemon, as_int

CHUNK = 256  # tokens: a prefill's border, at which the next request has its turn
SHARE_LIMIT = 1.5
# A turn is a slice of time, of one chunk or two: few requests of few chunks may be so far apart. In order of arrival
# the first would be done before the last begins.
FEW, FEW_SHARE_LIMIT = 10, 3.0
REACTION_LIMIT_S = 2.0


@dataclass
class Request:
    """One PREFILL under way. `seconds` is 0 until it is answered."""

    session: bytes
    sock: socket.socket
    sent: float
    seconds: float = 0.0
    reply: bytes = b""


class Clients:
    """All connections, each with one request. Replies are read as they come."""

    def __init__(self, port: int, n_clients: int, per_client: int, n_tokens: int, vocab: int) -> None:
        rng = np.random.default_rng(1)
        self.selector = selectors.DefaultSelector()
        self.requests: list[list[Request]] = []
        for client in range(n_clients):
            own = []
            for number in range(per_client):
                session = b"c%d:%d" % (client, number)
                sock = socket.create_connection(("127.0.0.1", port))
                ids = rng.integers(1, vocab, n_tokens).astype("<u4").tobytes()
                sock.sendall(encode_command([b"PREFILL", session, b"IDS", ids, b"REUSE", b"NO"]))
                request = Request(session, sock, time.monotonic())
                self.selector.register(sock, selectors.EVENT_READ, request)
                own.append(request)
            self.requests.append(own)

    def read(self, seconds: float) -> None:
        """Take what has been answered."""
        for key, _ in self.selector.select(seconds):
            request: Request = key.data
            request.reply += request.sock.recv(1 << 16)
            request.seconds = time.monotonic() - request.sent
            self.selector.unregister(request.sock)

    def vanish(self, clients: list[int]) -> None:
        for client in clients:
            for request in self.requests[client]:
                if not request.seconds:
                    self.selector.unregister(request.sock)
                request.sock.close()


def progress(call: Caller) -> dict[bytes, int]:
    """Tokens done by each request that is under way."""
    found = {}
    for request in call.map("ENGINE", "STATUS")["requests"]:  # type: ignore[attr-defined]
        found[request["session"]] = as_int(request["done"])
    return found


def shares(clients: Clients, done: dict[bytes, int], n_tokens: int) -> list[int]:
    """Tokens done for each client: its four requests together."""
    return [
        sum(n_tokens if request.seconds else done.get(request.session, 0) for request in own)
        for own in clients.requests
    ]


def queue(call: Caller, clients: Clients, n_tokens: int) -> list[tuple[str, str, bool]]:
    """The crowd; rows of the verdict."""
    n_clients = len(clients.requests)
    n_requests = sum(map(len, clients.requests))
    most_waiting = apart = 0
    first: dict[str, int] = {}  # how far each was when the last one had come: from here on all are equal
    at_first = [0] * n_clients
    while True:
        clients.read(0.05)
        done = progress(call)
        most_waiting = max(most_waiting, len(done))
        tokens = shares(clients, done, n_tokens)
        if len(done) == n_requests:
            if not first:
                first, at_first = dict(done), tokens
            gains = [tokens_now - first[name] for name, tokens_now in done.items()]
            apart = max(apart, -(-(max(gains) - min(gains)) // CHUNK))
        if sum(tokens) >= n_requests * n_tokens // 2:
            break
    leaving = list(range(0, n_clients, 2))
    staying = [own for client, own in enumerate(clients.requests) if client not in leaving]
    before = [request.session for client in leaving for request in clients.requests[client] if not request.seconds]
    clients.vanish(leaving)
    left_at = time.monotonic()
    stopped_s = 0.0
    while any(not request.seconds for own in staying for request in own):
        clients.read(0.05)
        if not stopped_s and not set(progress(call)) & set(before):
            stopped_s = time.monotonic() - left_at
    finished = [request for own in staying for request in own]
    n_right = sum(b"tokens" in request.reply for request in finished)
    last = [max(request.seconds for request in own) for own in staying]
    usable = sum(as_int(call.map("EXTEND", name, "TOKENS", 1, 5)["tokens"]) > 0 for name in before)
    tokens = [now - then for now, then in zip(tokens, at_first, strict=True)]
    ratio = max(tokens) / max(min(tokens), 1)
    return [
        (
            "progress of equal clients, since all are there to half way, max / min",
            f"{max(tokens)} / {min(tokens)} tokens = {ratio:.2f}",
            ratio <= (SHARE_LIMIT if n_requests > FEW else FEW_SHARE_LIMIT),
        ),
        ("the most and the least advanced request, at any moment", f"{apart} chunks apart", apart <= 3),
        ("requests in the queue at once", str(most_waiting), most_waiting > n_requests // 2),
        (
            f"{len(leaving)} of {n_clients} clients went away with {len(before)} requests: their work stopped",
            f"after {stopped_s:.2f} s",
            0 < stopped_s < REACTION_LIMIT_S + 30 / 1000 * n_requests,
        ),
        ("requests of the others that finished", f"{n_right} of {len(finished)}", n_right == len(finished)),
        (
            "last answer of each remaining client, max / min",
            f"{max(last):.1f} / {min(last):.1f} s = {max(last) / min(last):.2f}",
            max(last) / min(last) <= SHARE_LIMIT,
        ),
        ("sessions of the clients that went away still usable", f"{usable} of {len(before)}", usable == len(before)),
        ("work left over in the end", str(len(progress(call))), not progress(call)),
    ]


def limits(call: Caller, daemon: Daemon, vocab: int) -> list[tuple[str, str, bool]]:
    """ENGINE CANCEL, DEADLINE and the limit of the queue; rows of the verdict."""
    rows = []
    ids = np.random.default_rng(2).integers(1, vocab, 8000).astype("<u4").tobytes()
    with Connection(daemon.target, timeout=60) as other:
        sock = socket.create_connection(("127.0.0.1", daemon.port))
        sock.sendall(encode_command([b"PREFILL", b"cancelled", b"IDS", ids]))
        while not progress(call).get(b"cancelled"):
            time.sleep(0.01)
        began = time.monotonic()
        n_stopped = call("ENGINE", "CANCEL", "cancelled")
        answer = sock.recv(1000)
        took = time.monotonic() - began
        sock.close()
        rows.append(
            (
                "ENGINE CANCEL of a PREFILL under way",
                f"{n_stopped} stopped, CANCELLED after {took:.2f} s",
                n_stopped == 1 and answer.startswith(b"-CANCELLED") and took < REACTION_LIMIT_S,
            )
        )
        began = time.monotonic()
        try:
            Caller(other)("PREFILL", "late", "IDS", ids, "DEADLINE", 300)
            word = "no error"
        except CommandError as error:
            word = str(error).split()[0]
        took = time.monotonic() - began
        rows.append(
            ("PREFILL ... DEADLINE 300", f"{word} after {took:.2f} s", word == "CANCELLED" and took < REACTION_LIMIT_S)
        )
        call("CONFIG", "SET", "engine-queue-limit", 4)
        socks = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(6)]
        for number, sock in enumerate(socks):
            sock.sendall(encode_command([b"PREFILL", b"q%d" % number, b"IDS", ids[number * 4 :]]))
        busy = 0
        selector = selectors.DefaultSelector()
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for key, _ in selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                busy += key.fileobj.recv(1000).startswith(b"-BUSY")
                selector.unregister(key.fileobj)
        for sock in socks:
            sock.close()
        rows.append(("6 requests with engine-queue-limit 4", f"{busy} answered BUSY at once", busy == 2))
        call("CONFIG", "SET", "engine-queue-limit", 1000)
    until = time.monotonic() + 20
    while progress(call) and time.monotonic() < until:
        time.sleep(0.05)
    return rows


@click.command()
@click.option("--quick", is_flag=True, help="6 clients with one request each.")
@click.option("--clients", "n_clients", default=50, show_default=True)
@click.option("--tokens", "n_tokens", default=2048, show_default=True, help="Of each request.")
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, n_clients: int, n_tokens: int, model: str) -> None:
    """Print one line a claim; exit 1 when one does not hold."""
    console = Console(highlight=False)
    per_client = 4
    if quick:
        n_clients, per_client, n_tokens = 6, 1, 2048
    table = Table(title=f"{n_clients * per_client} requests of {n_tokens} tokens from {n_clients} clients, {model}")
    for name in ("claim", "found", ""):
        table.add_column(name)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Daemon(Path(scratch) / "data", {"model": model}) as daemon,
        Connection(daemon.target, timeout=300) as connection,
    ):
        call = Caller(connection)
        vocab = as_int(next(m for m in call.list("ENGINE", "MODELS") if isinstance(m, dict))["vocab"])
        call("PREFILL", "warm", "TOKENS", 1, 1)
        rows = [
            *queue(call, Clients(daemon.port, n_clients, per_client, n_tokens, vocab), n_tokens),
            *limits(call, daemon, vocab),
        ]
        began_ping = time.perf_counter()
        pong = call("PING")
        rows.append(("PING in the end", f"{pong}, {(time.perf_counter() - began_ping) * 1e3:.1f} ms", pong == "PONG"))
    for claim, found, holds in rows:
        table.add_row(claim, found, "holds" if holds else "[red]DOES NOT HOLD[/]")
    console.print(table)
    n_wrong = sum(not holds for *_, holds in rows)
    console.print(f"{len(rows)} claims, {n_wrong} do not hold; {time.monotonic() - began:.0f} s")
    raise SystemExit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
