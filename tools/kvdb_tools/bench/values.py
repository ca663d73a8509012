"""Large strings against redis-server, both durable with every write: times, and what they cost the daemon in memory.

For the smallest value also a program that writes and syncs what it receives and does nothing else (bare_writer.py).
Two clients: redis-py as people use it, and a bare socket that keeps its buffer, since a client that allocates each
value anew is slower than either server. The servers take turns, so that a drift of the machine hits both. Every value
that is read back is compared with what was stored: those of a bare socket at both ends, and whole before and behind
what is measured.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from kvdb_tools.bench.bare_writer import BareWriter
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import Cell, MissingError, Result, Settings
from kvdb_tools.daemon import Daemon, rss_bytes

MIB = 1 << 20
SIZES = {1: 40, 16: 12, 256: 2}  # MiB: repetitions a turn
QUICK_SIZES = {1: 10, 4: 3}
TURNS = 7  # a slow second of the machine shall not cover most of them
COMPARED_BYTES = 4096  # at either end of a value that is measured
HUGE_MIB, QUICK_HUGE_MIB = 1024, 96
PIPELINED, PIPELINED_MIB = 200, 8
UNREAD_SECONDS = 5.0
SAMPLE_S = 0.01
RSS_LIMIT_MIB = 64
SET_TARGET_MS = 2.0  # median, 1 MiB, bare socket: half of what Redis took where the aim was set
GET_TARGET = 3.0  # times Redis' rate, from 16 MiB up, bare socket


class BareClient:
    """A socket that sends from one kept buffer and receives into another."""

    def __init__(self, port: int, n_bytes: int) -> None:
        """n_bytes: of the largest value. The value to send is `data`."""
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = memoryview(bytearray(os.urandom(min(n_bytes, MIB)) * max(1, n_bytes // MIB)))
        self.kept = memoryview(bytearray(n_bytes + 64))

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()

    def set(self, key: bytes, n_bytes: int) -> None:
        """SET key to the first bytes of `data`, repeated if there are fewer."""
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, n_bytes)
        parts: list[bytes | memoryview] = [head]
        left = n_bytes
        while left:
            parts.append(self.data[:left])
            left -= len(parts[-1])
        for part in [*parts, b"\r\n"]:
            self.sock.sendall(part)
        reply = self.sock.recv(4096)
        if reply != b"+OK\r\n":
            raise MissingError(f"SET of {n_bytes} bytes was answered with {reply[:200]!r}")

    def get(self, key: bytes, n_bytes: int) -> memoryview:
        """GET key; a view that the next GET overwrites. Longer values are received over one another."""
        self.sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        head = b""
        while not head.endswith(b"\n"):
            if not (byte := self.sock.recv(1)):
                raise MissingError("the server closed the connection instead of answering")
            head += byte
        if head != b"$%d\r\n" % n_bytes:
            raise MissingError(f"GET was answered with {head[:200]!r}")
        left, at = n_bytes + 2, 0
        while left:
            got = self.sock.recv_into(self.kept[at : at + left])
            if not got:
                raise MissingError("the server closed the connection in the middle of a value")
            left -= got
            at = (at + got) % len(self.kept) if n_bytes + 2 > len(self.kept) else at + got
        return self.kept[:n_bytes]


@contextmanager
def memory_growth(pid: int, found: list[int]) -> Iterator[None]:
    """Append to `found` by how many bytes the process' memory was above its start, at most, within the block."""
    before = rss_bytes(pid)
    samples = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            samples.append(rss_bytes(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(max(*samples, rss_bytes(pid)) - before)


def run(settings: Settings) -> Result:
    """Measure everything; about three minutes and 8 GB of disk."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    result = Result(
        title="large values, every write durable",
        columns=("value", "client", "kvdb p50 ms", "Redis p50 ms", "kvdb GB/s", "Redis GB/s", "ratio of rates"),
        notes=[
            f"appendfsync always on both; one client, {TURNS} turns for each server; a bare socket keeps its buffers"
        ],
    )
    daemon = Daemon(settings.scratch / "kvdb", {"appendfsync": "always", "proto-max-bulk-len": "4gb", "model": ""})
    with daemon, RedisServer(settings.scratch / "redis", "always") as redis:
        for n_mib, times in sizes.items():
            for client, measure in (("bare socket", _bare), ("redis-py", _redis_py)):
                settings.say(f"{n_mib} MiB, {client} ...")
                ours, theirs = measure((daemon.port, redis.target.port), n_mib * MIB, times)
                for verb in ("SET", "GET"):
                    _add_row(result, f"{verb} {n_mib} MiB", client, n_mib * MIB, ours[verb], theirs[verb])
                if client == "bare socket":
                    _claim_speed(result, n_mib, ours, theirs)
        settings.say("1 MiB, received, written and synced by a program that does nothing else ...")
        with BareWriter(settings.scratch / "bare") as writer:
            ours, bare = _bare((daemon.port, writer.port), MIB, sizes[1], verbs=("SET",))
        times_bare = statistics.median(ours["SET"]) / statistics.median(bare["SET"])
        result.notes.append(
            f"a program that receives 1 MiB, writes and syncs it and does nothing else takes "
            f"{statistics.median(bare['SET']) * 1e3:.2f} ms; in turns with it kvdb takes {times_bare:.2f} times as long"
        )
    _measure_memory(settings, result)
    return result


Times = dict[str, list[float]]


def _bare(
    ports: tuple[int, int], n_bytes: int, times: int, verbs: Sequence[str] = ("SET", "GET")
) -> tuple[Times, Times]:
    clients = [BareClient(port, n_bytes) for port in ports]
    found: tuple[Times, Times] = ({"SET": [], "GET": []}, {"SET": [], "GET": []})
    # In turns of several calls, writes and reads apart: what the disk still has to do after one server's write would
    # slow the other's next call, and the first call after the other server's turn finds everything cold.
    for verb in verbs:
        for _ in range(TURNS):
            for client, seconds in zip(clients, found, strict=True):
                for number in range(times + 3):
                    took = _timed(partial(_bare_call, client, verb, number, n_bytes))
                    is_measured = 0 < number <= times
                    if is_measured:
                        seconds[verb].append(took)
                    # To compare all of it is to push everything else out of the processor's cache.
                    n_compared = min(COMPARED_BYTES, n_bytes) if is_measured else n_bytes
                    ends = (slice(n_compared), slice(n_bytes - n_compared, n_bytes))
                    if verb == "GET" and any(client.kept[end] != client.data[end] for end in ends):
                        raise MissingError("a value came back changed")
    for client in clients:
        client.close()
    return found


def _bare_call(client: BareClient, verb: str, number: int, n_bytes: int) -> None:
    """Call `number` of a turn; what is set, and to be expected, is in the client's `data`."""
    key = b"%d-%d" % (n_bytes, number % 2)
    client.data[:1] = b"%d" % (number % 2)
    if verb == "SET":
        client.set(key, n_bytes)
    else:
        client.get(key, n_bytes)


def _redis_py(ports: tuple[int, int], n_bytes: int, times: int) -> tuple[Times, Times]:
    try:
        import redis
    except ImportError:
        raise MissingError("redis-py is not installed") from None
    clients = [redis.Redis(port=port) for port in ports]
    found: tuple[Times, Times] = ({"SET": [], "GET": []}, {"SET": [], "GET": []})
    value = os.urandom(n_bytes)
    for number in range(max(1, times // 2) + 1):
        for client, seconds in zip(clients, found, strict=True):
            key = f"py-{n_bytes}-{number % 2}"
            one = _timed(lambda client=client, key=key: client.set(key, value))  # type: ignore[misc]
            read: list[bytes] = []
            two = _timed(lambda client=client, key=key, read=read: read.append(client.get(key)))  # type: ignore[misc]
            if read[0] != value:
                raise MissingError("a value came back changed")
            if number:
                seconds["SET"].append(one)
                seconds["GET"].append(two)
    for client in clients:
        client.close()
    return found


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _add_row(result: Result, name: str, client: str, n_bytes: int, ours: list[float], theirs: list[float]) -> None:
    mine, other = statistics.median(ours), statistics.median(theirs)
    rates: list[Cell] = [n_bytes / mine / 1e9, n_bytes / other / 1e9]
    result.rows.append([name, client, mine * 1e3, other * 1e3, *rates, other / mine])


def _claim_speed(result: Result, n_mib: int, ours: Times, theirs: Times) -> None:
    mine, other = ({verb: statistics.median(seconds) for verb, seconds in one.items()} for one in (ours, theirs))
    if n_mib == 1:
        took = mine["SET"] * 1e3
        text = f"durable SET of 1 MiB in at most {SET_TARGET_MS} ms: {took:.2f} (Redis {other['SET'] * 1e3:.2f})"
        result.claims.append((text, took <= SET_TARGET_MS))
    if n_mib >= 16:
        times = other["GET"] / mine["GET"]
        result.claims.append(
            (f"GET of {n_mib} MiB at {GET_TARGET:.0f} x Redis' rate or more: {times:.1f} x", times >= GET_TARGET)
        )


def _measure_memory(settings: Settings, result: Result) -> None:
    """A value larger than any budget in and out; a client that asks for much and never reads."""
    n_bytes = (QUICK_HUGE_MIB if settings.quick else HUGE_MIB) * MIB
    options = {"appendfsync": "always", "proto-max-bulk-len": "4gb", "client-query-buffer-limit": "1gb", "model": ""}
    with Daemon(settings.scratch / "memory", options) as daemon:
        client = BareClient(daemon.port, 16 * MIB)
        client.set(b"warm", 16 * MIB)
        client.get(b"warm", 16 * MIB)
        for verb, call in (("SET", client.set), ("GET", client.get)):
            settings.say(f"memory during a {verb} of {n_bytes // MIB} MiB ...")
            growth: list[int] = []
            with memory_growth(daemon.pid, growth):
                seconds = _timed(lambda call=call: call(b"huge", n_bytes))  # type: ignore[misc]
            result.notes.append(
                f"{verb} of {n_bytes // MIB} MiB: {seconds:.2f} s, memory grew by {growth[0] / MIB:.1f} MiB"
            )
            text = (
                f"{verb} of {n_bytes // MIB} MiB: memory grows by less than {RSS_LIMIT_MIB} MiB: {growth[0] / MIB:.1f}"
            )
            result.claims.append((text, growth[0] < RSS_LIMIT_MIB * MIB))
        client.close()
        grown = _unread(settings, daemon.port, daemon.pid)
        text = (
            f"{PIPELINED} pipelined GETs of {PIPELINED_MIB} MiB, never read: memory grows by less than "
            f"{RSS_LIMIT_MIB} MiB: {grown / MIB:.1f}"
        )
        result.claims.append((text, grown < RSS_LIMIT_MIB * MIB))
    with RedisServer(settings.scratch / "redis-memory", "everysec") as redis:
        theirs = _unread(settings, redis.target.port, redis.pid)
        result.notes.append(f"the same unread pipeline: Redis' memory grows by {theirs / MIB:.0f} MiB")


def _unread(settings: Settings, port: int, pid: int) -> int:
    settings.say("a pipeline that is never read ...")
    client = BareClient(port, PIPELINED_MIB * MIB)
    client.set(b"unread", PIPELINED_MIB * MIB)
    growth: list[int] = []
    with memory_growth(pid, growth):
        client.sock.sendall(b"*2\r\n$3\r\nGET\r\n$6\r\nunread\r\n" * PIPELINED)
        time.sleep(UNREAD_SECONDS / (5 if settings.quick else 1))
    client.close()
    return growth[0]
