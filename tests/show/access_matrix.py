"""Who may do what, and over which transport: every attempt of a matrix with its verdict.

python tests/show/access_matrix.py [--quick]

Users with different rules try commands on keys and channels over TCP, a unix socket, TLS, and TLS with a client
certificate that the listener demands; the expected verdict is written down for each attempt. Verdicts: `ok`, the first
word of the error, or `closed` (no connection at all). The certificates are made with openssl on the spot.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection, RefusedError, Target, Tls
from kvdb_tools.cli.reply import ErrorReply
from kvdb_tools.daemon import Caller, Daemon, free_port

Words = tuple[str | int, ...]

USERS = {
    "admin": ">admin-pw ~* &* +@all",
    "reader": ">reader-pw ~app:* +@read +@connection",
    "writer": ">writer-pw ~app:* +@read +@write +@connection -flushall -flushdb -@dangerous",
    "split": ">split-pw %R~in:* %W~out:* +@all",
    "agent": ">agent-pw ~agent:* &agent:* +@state +@pubsub +@connection -generate",
    "oneword": ">oneword-pw ~* +get +config|get",
    "off": ">off-pw ~* +@all",
}
ABSENT = "closed"
O, P, A = "ok", "NOPERM", "WRONGPASS"  # noqa: E741
# What is tried, and the verdict for: admin, reader, writer, split, agent, oneword.
COMMANDS: list[tuple[Words, tuple[str, ...]]] = [
    (("PING",), (O, O, O, O, O, P)),
    (("GET", "app:1"), (O, O, O, P, P, O)),
    (("GET", "other"), (O, P, P, P, P, O)),
    (("SET", "app:1", "v"), (O, P, O, P, P, P)),
    (("SET", "other", "v"), (O, P, P, P, P, P)),
    (("GET", "in:1"), (O, P, P, O, P, O)),
    (("SET", "in:1", "v"), (O, P, P, P, P, P)),
    (("SET", "out:1", "v"), (O, P, P, O, P, P)),
    (("GET", "out:1"), (O, P, P, P, P, O)),
    (("COPY", "in:1", "out:2"), (O, P, P, O, P, P)),
    (("COPY", "out:1", "in:2"), (O, P, P, P, P, P)),
    (("SET", "out:1", "v", "GET"), (O, P, P, P, P, P)),
    (("MGET", "app:1", "app:2"), (O, O, O, P, P, P)),
    (("MGET", "app:1", "other"), (O, P, P, P, P, P)),
    (("MSET", "app:1", "a", "other", "b"), (O, P, P, P, P, P)),
    (("RENAME", "app:1", "app:3"), (O, P, O, P, P, P)),
    (("RENAME", "app:3", "app:1"), (O, P, O, P, P, P)),
    (("HSET", "app:h", "f", "v"), (O, P, O, P, P, P)),
    (("ZADD", "app:z", 1, "m"), (O, P, O, P, P, P)),
    (("DEL", "app:none"), (O, P, O, P, P, P)),
    (("EXPIRE", "app:1", 1000), (O, P, O, P, P, P)),
    (("SCAN", 0), (O, O, O, O, P, P)),
    (("KEYS", "*"), (O, O, P, O, P, P)),
    (("DBSIZE",), (O, O, O, O, P, P)),
    (("FLUSHALL",), (O, P, P, O, P, P)),
    (("CONFIG", "GET", "port"), (O, P, P, O, P, O)),
    (("CONFIG", "SET", "hz", 10), (O, P, P, O, P, P)),
    (("ACL", "WHOAMI"), (O, P, P, O, P, P)),
    (("ACL", "LIST"), (O, P, P, O, P, P)),
    (("INFO", "server"), (O, P, P, O, P, P)),
    (("CLIENT", "LIST"), (O, O, P, O, O, P)),
    (("CLIENT", "GETNAME"), (O, O, O, O, O, P)),
    (("PUBLISH", "agent:c", "m"), (O, P, P, P, O, P)),
    (("PUBLISH", "news", "m"), (O, P, P, P, P, P)),
    (("PREFILL", "agent:s", "TOKENS", 2, 1, 2), (O, P, P, P, O, P)),
    (("PREFILL", "app:s", "TOKENS", 2, 1, 2), (O, P, O, P, P, P)),
    (("SNAPSHOT", "agent:s", "agent:k"), (O, P, P, P, O, P)),
    (("SNAPSHOT", "agent:s", "stolen"), (O, P, P, P, P, P)),
    (("FORK", "agent:k", "agent:s2"), (O, P, P, P, O, P)),
    (("GENERATE", "agent:s", "MAXTOKENS", 1), (O, P, P, P, P, P)),
    (("SNAPINFO", "agent:k"), (O, P, P, P, O, P)),
    (("SNAPSHOT", "in:none", "out:k"), ("ERR", P, P, "ERR", P, P)),
    (("FORK", "in:none", "in:k"), ("ERR", P, P, P, P, P)),
    (("TYPE", "out:1"), (O, P, P, O, P, P)),
    (("ENGINE", "STATUS"), (O, O, O, O, P, P)),
    (("STORE", "STATS"), (O, O, O, O, P, P)),
    (("STORE", "GC"), (O, P, P, O, P, P)),
]
CALLERS = ("admin", "reader", "writer", "split", "agent", "oneword")


def make_certificates(folder: Path) -> None:
    """Two authorities, and for the first a server and a client; for the second a stranger."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    for authority in ("ca", "foreign"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                "-keyout", f"{authority}.key", "-out", f"{authority}.crt", "-subj", f"/CN={authority}")  # fmt: skip
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "foreign")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
                "-out", f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key",
                "-CAcreateserial", "-days", "2", "-out", f"{name}.crt", "-extfile", "names")  # fmt: skip


def verdict(work: Callable[[], object]) -> str:
    """`ok`, the first word of an error, or `closed`."""
    try:
        reply = work()
    except RefusedError as error:
        return next((word for word in ("NOAUTH", "WRONGPASS", "NOPERM") if word in str(error)), "refused")
    except (OSError, ssl.SSLError):
        return ABSENT
    return reply.text.split()[0] if isinstance(reply, ErrorReply) else O


def attempt(target: Target, *words: str | int) -> str:
    def work() -> object:
        with Connection(target, timeout=20) as connection:
            return connection.call(*words)

    return verdict(work)


def without_tls(port: int) -> str:
    """What plain RESP gets from a TLS port."""

    def work() -> object:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(b"PING\r\n")
            if b"PONG" not in sock.recv(100):
                raise ConnectionError
            return None

    return verdict(work)


@click.command()
@click.option("--quick", is_flag=True, help="One setting of tls-auth-clients instead of three.")
def main(quick: bool) -> None:
    """Print the attempts and their verdicts; exit 1 when one is not the expected one."""
    console = Console(highlight=False, width=150)
    if shutil.which("openssl") is None:
        console.print("openssl is not installed: no certificates can be made")
        raise SystemExit(0 if quick else 2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_certificates(folder)
        n_wrong, n_done = 0, 0
        for demand in ("yes",) if quick else ("yes", "optional", "no"):
            options = {
                "model": "synthetic:dsv4-nano", "unixsocket": str(folder / "sock"), "tls-port": str(free_port()),
                "tls-cert-file": str(folder / "server.crt"), "tls-key-file": str(folder / "server.key"),
                "tls-ca-cert-file": str(folder / "ca.crt"), "tls-auth-clients": demand, "requirepass": "default-pw",
            }  # fmt: skip
            daemon = Daemon(folder / f"data-{demand}", options)
            # The daemon counts as up when it answers PING: with a password, after AUTH.
            with Served(daemon) as transports:
                if demand == "yes":
                    done, wrong = commands(console, transports)
                    n_done, n_wrong = n_done + done, n_wrong + wrong
                done, wrong = doors(console, folder, daemon, transports, demand)
                n_done, n_wrong = n_done + done, n_wrong + wrong
    console.print(f"{n_done} attempts, {n_wrong} with another verdict than expected")
    raise SystemExit(1 if n_wrong else 0)


class Served:
    """The daemon with its users made, and how to reach it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.folder = daemon.directory.parent

    def __enter__(self) -> dict[str, Target]:
        password = self.daemon.options.pop("requirepass")
        self.daemon.start()
        tls_port = int(self.daemon.options["tls-port"])
        ca = str(self.folder / "ca.crt")
        own = Tls(cacert=ca, cert=str(self.folder / "client.crt"), key=str(self.folder / "client.key"))
        with Connection(self.daemon.target, timeout=20) as connection:
            call = Caller(connection)
            for name, rules in USERS.items():
                call("ACL", "SETUSER", name, "off" if name == "off" else "on", *rules.split())
            call("CONFIG", "SET", "requirepass", password)
        return {
            "tcp": Target(port=self.daemon.port),
            "unix": Target(unixsocket=self.daemon.options["unixsocket"]),
            "tls": Target(port=tls_port, tls=Tls(cacert=ca)),
            "tls+cert": Target(port=tls_port, tls=own),
        }

    def __exit__(self, *exc: object) -> None:
        self.daemon.stop()


def as_user(target: Target, user: str | None, password: str | None) -> Target:
    return Target(target.host, target.port, target.unixsocket, user, password, tls=target.tls)


def commands(console: Console, transports: dict[str, Target]) -> tuple[int, int]:
    """Every command by every user, over every transport that lets this client in."""
    table = Table(title="user x command x key; the same over tcp, a unix socket and TLS with a client certificate")
    for name in ("attempt", *CALLERS):
        table.add_column(name)
    ways = [name for name in transports if name != "tls"]  # the listener demands a certificate
    connections = {
        (way, user): Connection(as_user(transports[way], user, f"{user}-pw"), timeout=20)
        for way in ways
        for user in CALLERS
    }
    done = wrong = 0
    for words, expected in COMMANDS:
        row = []
        for user, wanted in zip(CALLERS, expected, strict=True):
            found = []
            for way in ways:
                # The keys that are read or renamed must be there whoever came before.
                prepare = connections["tcp", "admin"]
                for key in ("app:1", "app:3", "in:1", "out:1"):
                    prepare.call("SET", key, "v")
                prepare.call("DEL", "agent:s2", "stolen")
                found.append(verdict(partial(connections[way, user].call, *words)))
            fine = all(one == wanted for one in found)
            done += len(found)
            wrong += sum(one != wanted for one in found)
            row.append(wanted if fine else f"[red]{'/'.join(found)}, expected {wanted}[/]")
        table.add_row(" ".join(map(str, words)), *row)
    for connection in connections.values():
        connection.close()
    console.print(table)
    return done, wrong


def doors(
    console: Console, folder: Path, daemon: Daemon, transports: dict[str, Target], demand: str
) -> tuple[int, int]:  # fmt: skip
    """Who gets in at all, over each transport."""
    table = Table(title=f"who gets in, tls-auth-clients {demand}")
    for name in ("credentials", *transports, "stranger's cert"):
        table.add_column(name)
    stranger = Tls(str(folder / "ca.crt"), str(folder / "stranger.crt"), str(folder / "stranger.key"))
    doors = {**transports, "stranger": Target(port=transports["tls"].port, tls=stranger)}
    shut = {"yes": {"tls", "stranger"}, "optional": {"stranger"}, "no": set()}[demand]
    credentials: list[tuple[str, str | None, str | None, str]] = [
        ("none", None, None, "NOAUTH"),
        ("default, right password", None, "default-pw", O),
        ("default, wrong password", None, "wrong", A),
        ("reader, right password", "reader", "reader-pw", O),
        ("reader, another's password", "reader", "writer-pw", A),
        ("a user who is off", "off", "off-pw", A),
        ("nobody", "nobody", "x", A),
    ]
    done = wrong = 0
    for name, user, password, expected in credentials:
        row = []
        for door, target in doors.items():
            wanted = ABSENT if door in shut else expected
            found = attempt(as_user(target, user, password), "PING")
            done += 1
            wrong += found != wanted
            row.append(found if found == wanted else f"[red]{found}, expected {wanted}[/]")
        table.add_row(name, *row)
    plain, other = without_tls(transports["tls"].port), attempt(
        Target(port=transports["tls"].port, tls=Tls(str(folder / "foreign.crt"))), "PING"
    )  # fmt: skip
    done += 2
    wrong += (plain != ABSENT) + (other != ABSENT)
    console.print(table)
    console.print(f"plain RESP on the TLS port: {plain}; a client that trusts another authority: {other}")
    return done, wrong


if __name__ == "__main__":
    main()
