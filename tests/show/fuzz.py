"""Malformed and random bytes: millions into the parser, hundreds of thousands into a live daemon.

python tests/show/fuzz.py [--quick] [--parser 5000000] [--daemon 200000] [--jobs 2]

A sequence is random bytes, or well-formed requests with some bytes changed, dropped, repeated or cut, counts and
lengths replaced by extreme ones, and pieces of other sequences put in.

Parser: each sequence goes into a fresh parser in one to four pieces; nothing but a protocol error may come out, and
(every 50th) the same bytes fed one at a time must give the same requests and the same error. Daemon: each connection
sends several sequences at once and leaves, sometimes in the middle; commands that end or stop a server are left out of
the dictionary. After each batch PING must be answered within five seconds. Memory is compared after the first tenth and
at the end: what leaks a few bytes a sequence would be seen.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import socket
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console

from kvdb.commands.table import TABLE
from kvdb_protocol.requests import MIN_BULK_LIMIT, RequestParser
from kvdb_tools.daemon import Daemon

LEAK_BYTES_A_SEQUENCE = 4.0
SLACK_BYTES = 24 << 20
PING_LIMIT_S = 5.0
REPORT_EVERY = 10  # parts of a run
# They would end the daemon, hold all clients, silence or close a connection on purpose, or keep writing files.
LEFT_OUT = {
    "SHUTDOWN",
    "DEBUG",
    "CLIENT PAUSE",
    "CLIENT KILL",
    "ACL SETUSER",
    "ACL DELUSER",
    "CONFIG SET",
    "STORE BACKUP",
}
NAMES = [row.name.encode() for row in TABLE if row.name not in LEFT_OUT and row.name.split()[0] not in LEFT_OUT]
NUMBERS = [b"0", b"-1", b"1", b"00", b"+1", b" 1", b"2147483647", b"2147483648", b"-2147483648", b"4294967296",
           b"9223372036854775807", b"99999999999999999999", b"1048577", b"16385", b"1e3", b"",
           b"x", b"536870913"]  # fmt: skip
SCRAPS = [b"\r\n", b"\n", b"\r", b"*", b"$", b"*-1\r\n", b"$-1\r\n", b"*0\r\n", b'"', b"'", b"\\x", b"\0", b"%2\r\n",
          b"~1\r\n", b">1\r\n", b"+OK\r\n", b"-ERR\r\n", b":1\r\n", b"_\r\n", b"#t\r\n", b",1.5\r\n", b"(1\r\n",
          b"=5\r\ntxt:a\r\n", b"|1\r\n", b"!3\r\nERR\r\n", b"$?\r\n", b"*1\r\n*1\r\n", b"PING\r\n",
          b"GET /x HTTP/1.1\r\n"]  # fmt: skip


class Maker:
    """Makes sequences; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.last = b"*1\r\n$4\r\nPING\r\n"

    def request(self) -> bytes:
        rng = self.rng
        words = rng.choice(NAMES).split()
        words += [self.word() for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 8)))]
        if rng.random() < 0.2:
            return b" ".join(words) + b"\r\n"
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)

    def word(self) -> bytes:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4:
            return b"k%d" % rng.randrange(8)
        if kind < 0.6:
            return rng.choice(NUMBERS)
        return rng.randbytes(rng.choice((0, 1, 3, 20, 100))) if kind < 0.998 else rng.randbytes(40_000)

    def sequence(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.15:
            return rng.randbytes(rng.randrange(1, 60))
        data = bytearray(b"".join([self.request() for _ in range(rng.choice((1, 1, 2, 3)))]))
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(8):
                case 0:
                    data[at : at + 1] = rng.randbytes(1)
                case 1:
                    del data[at : at + rng.randrange(1, 6)]
                case 2:
                    data[at:at] = rng.choice(SCRAPS)
                case 3:
                    data[at:at] = data[at : at + rng.randrange(1, 30)]
                case 4:
                    del data[at:]
                case 5:
                    start = data.find(rng.choice((b"*", b"$")), at)
                    end = data.find(b"\r\n", start)
                    if 0 <= start < end:
                        data[start + 1 : end] = rng.choice(NUMBERS)
                case 6:
                    data[at:at] = self.last[: rng.randrange(1, 60)]
                case _:
                    data[at : at + 2] = rng.choice(SCRAPS)
        self.last = bytes(data[:200])
        return bytes(data)


def rss_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@dataclass
class Counts:
    """What came out of one process' share."""

    sequences: int = 0
    n_bytes: int = 0
    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    rss_start: int = 0
    rss_end: int = 0


def outcome(pieces: list[bytes], limit: int, authenticated: bool) -> tuple[list[list[bytes]], str, int]:
    """The requests, the error and the bytes still held, for bytes that arrive in these pieces."""
    parser = RequestParser(max_bulk_bytes=limit, authenticated=authenticated)
    requests: list[list[bytes]] = []
    for piece in pieces:
        requests += parser.feed(piece)
    return requests, str(parser.error or ""), parser.buffered_bytes


def fuzz_parser(job: int, n_sequences: int, seed: int) -> Counts:
    """One process' share. Any exception that leaves the parser ends the run."""
    maker, counts = Maker(seed * 1000 + job), Counts()
    rng = maker.rng
    while counts.sequences < n_sequences:
        data = maker.sequence()
        limit = rng.choice((512 << 20, MIN_BULK_LIMIT))
        authenticated = rng.random() < 0.8
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 3))))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
        requests, error, held = outcome(pieces, limit, authenticated)
        assert all(type(word) is bytes for request in requests for word in request) and all(requests), data
        assert held <= len(data), data
        counts.sequences += 1
        counts.n_bytes += len(data)
        counts.requests += len(requests)
        counts.errors[error.split(",")[0]] += 1
        if counts.sequences % 50 == 0 and len(data) < 2000:
            single = outcome([data[at : at + 1] for at in range(len(data))], limit, authenticated)
            assert single[:2] == (requests, error), f"cut into pieces it is understood otherwise: {data!r}"
            counts.compared += 1
        if counts.sequences == max(n_sequences // 10, 1):
            gc.collect()
            counts.rss_start = rss_bytes()
    gc.collect()
    counts.rss_end = rss_bytes()
    return counts


def parser_part(console: Console, n_sequences: int, jobs: int, seed: int) -> bool:
    began = time.monotonic()
    share = -(-n_sequences // jobs)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        done = pool.starmap(fuzz_parser, [(job, share, seed) for job in range(jobs)])
    took = time.monotonic() - began
    errors: Counter[str] = sum((counts.errors for counts in done), Counter())
    growth = max(counts.rss_end - counts.rss_start for counts in done)
    n_done = sum(counts.sequences for counts in done)
    console.print(
        f"parser: {n_done:,} sequences, {sum(c.n_bytes for c in done) / 1e6:,.0f} MB in {took:.0f} s"
        f" ({n_done / took:,.0f}/s); {sum(c.requests for c in done):,} requests came out;"
        f" {sum(c.compared for c in done):,} fed byte by byte too, with the same result"
    )
    for text, count in errors.most_common():
        console.print(f"    {count:>10,}  {text or 'no error'}", markup=False)
    leaks = growth > SLACK_BYTES + LEAK_BYTES_A_SEQUENCE * share
    resident = ", ".join(f"{c.rss_start / 1e6:.1f} -> {c.rss_end / 1e6:.1f} MB" for c in done)
    console.print(f"    resident memory after a tenth and at the end: {resident}: {'LEAK' if leaks else 'no leak'}")
    return not leaks


def attack(target: tuple[str, int], seed: int, n_sequences: int) -> Counter[str]:
    """Some connections, one after the other, with several sequences each; what became of them."""
    maker, found = Maker(seed), Counter[str]()
    rng = maker.rng
    done = 0
    while done < n_sequences:
        burst = [maker.sequence() for _ in range(min(rng.randrange(1, 40), n_sequences - done))]
        done += len(burst)
        with socket.create_connection(target, timeout=10) as sock:
            try:
                if rng.random() < 0.5:
                    sock.sendall(b"".join(burst))
                else:
                    for data in burst:
                        sock.sendall(data)
                kind = rng.random()
                if kind < 0.3:
                    found["left at once"] += 1
                    continue
                if kind < 0.6:
                    sock.shutdown(socket.SHUT_WR)
                sock.settimeout(0.002 if kind >= 0.6 else 10)
                while sock.recv(1 << 16):
                    pass
                found["closed by the server"] += 1
            except TimeoutError:
                found["left while it waited" if kind >= 0.6 else "HUNG"] += 1
            except OSError:
                found["reset"] += 1
    return found


def daemon_part(console: Console, n_sequences: int, seed: int) -> bool:
    found, worst_s = Counter[str](), 0.0
    rss: list[int] = []
    began = time.monotonic()
    options = {"model": "", "maxstore": "64mb", "maxstore-policy": "allkeys-lru", "loglevel": "warning"}
    with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", options) as daemon:
        pid = daemon.pid
        share = -(-n_sequences // (REPORT_EVERY * 8))
        with ThreadPoolExecutor(8) as pool:
            for batch in range(REPORT_EVERY):
                seeds = [seed * 1_000_000 + batch * 8 + number for number in range(8)]
                for part in pool.map(lambda one: attack(("127.0.0.1", daemon.port), one, share), seeds):
                    found += part
                if not daemon.is_running:
                    break
                pinged = time.monotonic()
                with socket.create_connection(("127.0.0.1", daemon.port), timeout=PING_LIMIT_S) as sock:
                    sock.sendall(b"FLUSHALL\r\nPING\r\n")
                    answer = b""
                    while b"PONG" not in answer and (data := sock.recv(100)):
                        answer += data
                worst_s = max(worst_s, time.monotonic() - pinged)
                rss.append(rss_bytes(pid))
        alive = daemon.is_running and daemon.pid == pid
        internal = daemon.log.read_text().count("internal error")
        deaths = [line for line in daemon.log.read_text().splitlines() if "internal error" in line][:5]
    for line in deaths:
        console.print(line, markup=False)
    console.print(
        f"daemon: {n_sequences:,} sequences in {time.monotonic() - began:.0f} s; connections: "
        + ", ".join(f"{name} {count:,}" for name, count in found.most_common())
    )
    growth = rss[-1] - rss[0] if rss else 0
    leaks = growth > SLACK_BYTES + 20 * n_sequences
    console.print(
        f"    resident memory after each batch: {', '.join(f'{value / 1e6:.0f}' for value in rss)} MB:"
        f" {'LEAK' if leaks else 'no leak'}; internal errors in the log: {internal}"
    )
    console.print(
        f"    the same process {'runs' if alive else 'IS GONE'}; slowest PING after a batch: {worst_s * 1e3:.0f} ms;"
        f" {found['HUNG']} hung connections"
    )
    return alive and not leaks and not internal and worst_s < PING_LIMIT_S and not found["HUNG"]


@click.command()
@click.option("--quick", is_flag=True, help="20,000 and 1,000 sequences.")
@click.option("--parser", "n_parser", default=5_000_000, show_default=True)
@click.option("--daemon", "n_daemon", default=200_000, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Processes for the parser.")
@click.option("--seed", default=1, show_default=True)
def main(quick: bool, n_parser: int, n_daemon: int, jobs: int, seed: int) -> None:
    """Print counts, memory and time; exit 1 after a crash, a hang or a leak."""
    console = Console(highlight=False, soft_wrap=True)
    if quick:
        n_parser, n_daemon = 20_000, 1_000
    fine = [part for part in (n_parser and parser_part(console, n_parser, jobs, seed),
                              n_daemon and daemon_part(console, n_daemon, seed)) if part is not None]  # fmt: skip
    console.print("no crash, no hang, no leak" if all(part is not False for part in fine) else "FAILED")
    raise SystemExit(0 if all(part is not False for part in fine) else 1)


if __name__ == "__main__":
    main()
