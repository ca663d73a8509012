"""Clients that ask and never read, and clients that send half a command: memory stays bounded, others are served.

python tests/show/slow_clients.py [--quick]

Three crowds, one after the other, each against a fresh daemon: one client that pipelines 200 GETs of 8 MiB and reads
nothing; 1,000 clients that each ask for 20 strings of 1 MiB and read nothing; 1,000 clients that send the beginning of
a SET (50 kB of a value of 100 kB, or less) and stay. Meanwhile another client sends PING. The last crowd is dropped
when `timeout` is set.
"""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import encode_command
from kvdb_tools.daemon import Caller, Daemon

PING_P99_LIMIT_MS = 50.0
PING_LIMIT_MS = 1000.0
ONE_LIMIT = 64 << 20
HALF_SENT = 50_000
MIB = 1 << 20


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


class Crowd:
    """Sockets that are opened one by one and kept."""

    def __init__(self, port: int, n_clients: int) -> None:
        self.socks: list[socket.socket] = []
        for _ in range(n_clients):
            sock = socket.socket()
            # What lies in the kernel is not the daemon's: keep it small.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            self.socks.append(sock)

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


class Pinger(threading.Thread):
    """One client among the others: round trips in ms, from before the crowd comes until `result` is asked for."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.times: list[float] = []
        self.is_over = False
        self.start()

    def run(self) -> None:
        while not self.is_over:
            began = time.perf_counter()
            self.sock.sendall(b"PING\r\n")
            assert self.sock.recv(100) == b"+PONG\r\n"
            self.times.append((time.perf_counter() - began) * 1e3)
            time.sleep(0.002)

    def result(self) -> list[float]:
        self.is_over = True
        self.join()
        self.sock.close()
        return sorted(self.times)


@click.command()
@click.option("--quick", is_flag=True, help="50 clients instead of 1,000, 40 GETs of 2 MiB.")
@click.option("--clients", "n_clients", default=1000, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="How long each crowd is watched.")
def main(quick: bool, n_clients: int, seconds: float) -> None:
    """Print one line a crowd; exit 1 when memory or latency is over its limit."""
    console = Console(highlight=False)
    n_gets, value_bytes = 200, 8 * MIB
    if quick:
        n_clients, seconds, n_gets, value_bytes = 50, 0.3, 40, 2 * MIB
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    table = Table(title="clients that do not read, or do not finish")
    for name in ("crowd", "asked for", "growth of resident memory", "limit", "PING p50 / p99 / max ms", ""):
        table.add_column(name)
    wrong = 0

    def watch(
        name: str, asked: str, limit: int, prepare: Callable[[Caller], object], act: Callable[[int], Crowd],
        after: Callable[[Caller, Crowd], str] = lambda call, crowd: "",
    ) -> None:  # fmt: skip
        nonlocal wrong
        options = {"model": "", "maxclients": str(n_clients + 100), "loglevel": "warning"}
        with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", options) as daemon:
            with Connection(daemon.target, timeout=60) as connection:
                prepare(Caller(connection))
                Caller(connection)("SAVE")
            if not quick:
                daemon.restart()  # nothing of the preparation is counted
            with Connection(daemon.target, timeout=60) as connection:
                call = Caller(connection)
                before = most = rss_bytes(daemon.pid)
                pinger = Pinger(daemon.port)
                crowd = act(daemon.port)
                for _ in range(5):
                    time.sleep(seconds / 5)
                    most = max(most, rss_bytes(daemon.pid))
                times = pinger.result()
                p99 = times[int(len(times) * 0.99)]
                remark = after(call, crowd)
                crowd.close()
        holds = (
            most - before < limit
            and ((p99 < PING_P99_LIMIT_MS and times[-1] < PING_LIMIT_MS) or quick)
            and not remark.startswith("NOT")
        )
        wrong += not holds
        table.add_row(
            *(name, asked, f"{(most - before) / MIB:.1f} MiB", f"{limit / MIB:.0f} MiB"),
            f"{times[len(times) // 2]:.2f} / {p99:.2f} / {times[-1]:.1f}",
            ("holds" if holds else "DOES NOT HOLD") + (f"; {remark}" if remark else ""),
        )

    def fill(n_values: int, n_bytes: int) -> Callable[[Caller], object]:
        return lambda call: [call("SET", f"v{number}", os.urandom(n_bytes)) for number in range(n_values)]

    def ask(n_askers: int, each: int, n_values: int) -> Callable[[int], Crowd]:
        def act(port: int) -> Crowd:
            crowd = Crowd(port, n_askers)
            for number, sock in enumerate(crowd.socks):
                keys = [b"v%d" % ((number + offset) % n_values) for offset in range(each)]
                sock.sendall(b"".join(encode_command([b"GET", key]) for key in keys))
            return crowd

        return act

    def half(port: int) -> Crowd:
        crowd = Crowd(port, n_clients)
        for number, sock in enumerate(crowd.socks):
            whole = encode_command([b"SET", b"half", bytes(2 * HALF_SENT)])
            sock.sendall(whole[: (HALF_SENT, 5, 1, 30)[number % 4]])
        return crowd

    def dropped(call: Caller, crowd: Crowd) -> str:
        n_before = len(crowd.socks)
        call("CONFIG", "SET", "timeout", 1)
        until = time.monotonic() + 20
        gone = 0
        while gone < n_before and time.monotonic() < until:
            call("PING")
            time.sleep(0.2)
            gone = sum(is_closed(sock) for sock in crowd.socks)
        return f"{'' if gone == n_before else 'NOT all: '}{gone} of {n_before} dropped with timeout 1"

    watch("1 client", f"{n_gets} x GET of {value_bytes // MIB} MiB, pipelined", ONE_LIMIT,
          fill(8, value_bytes), ask(1, n_gets, 8))  # fmt: skip
    # Each may hold one reply beyond the 256 KiB of its write buffer.
    watch(f"{n_clients} clients that do not read", "20 x GET of 1 MiB each", n_clients * (MIB + 256 * 1024),
          fill(64, MIB), ask(n_clients, 20, 64))  # fmt: skip
    watch(f"{n_clients} clients with half a command", f"a quarter of them sent {HALF_SENT} bytes", 60_000 * n_clients,
          lambda call: None, half, dropped)  # fmt: skip
    console.print(table)
    console.print("memory is bounded and others are served" if not wrong else f"{wrong} crowds over a limit")
    raise SystemExit(1 if wrong else 0)


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


if __name__ == "__main__":
    main()
