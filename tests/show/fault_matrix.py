"""Each fault, each family of commands: the error a client sees, and the state after. One table.

A daemon runs in this process on a file layer that can fail any call. Row by row a fault is switched on, one command of
each family is sent, its reply noted, and the fault is switched off. Then the state after is looked at: the daemon
answers, every key that was acknowledged before holds its bytes, and the same command succeeds. Damage of files (a
flipped bit, a missing or truncated segment) is done to the real files and undone afterwards. In the end the directory
must be clean to kvdb-check --deep. A cell that is not as EXPECTED (ok where nothing is named) is a failure.

    python tests/show/fault_matrix.py [--quick]

ok       the command does not need what fails, or does without
WORD     the first word of the error reply; nothing was changed by the command
WORD+    the same, and the change itself is kept in memory: it is committed by itself once the fault is over
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import lmdb

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb import config
from kvdb.backend import Backend
from kvdb.net.service import Server
from kvdb.store import committer, compact, segments
from kvdb.store.index import Table
from kvdb.store.read import RecordPlace, plan
from kvdb.store.store import Store
from kvdb_tools.check import check
from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.reply import ErrorReply
from kvdb_tools.daemon import Caller
from tests.kvdb.store.faults import FailingFiles

LARGE = random.Random(1).randbytes(200_000)
IDS = [n % 900 + 1 for n in range(700)]
OK = "ok"


@dataclass
class Place:
    """The daemon, its files, and a client."""

    folder: Path
    files: FailingFiles
    server: Server
    call: Caller
    counter: int = 0
    known: dict[bytes, bytes] = field(default_factory=dict)  # key -> digest that must stay

    def fresh(self, name: str) -> str:
        self.counter += 1
        return f"{name}{self.counter}"

    async def ask(self, *words: bytes | str | int) -> object:
        return await asyncio.to_thread(self.call.connection.call, *words)

    async def content(self, key: bytes) -> bytes:
        words = ("GET", key) if key.startswith(b"text") else ("LOGITS", key, "RAW")
        return hashlib.sha256(repr(await self.ask(*words)).encode()).digest()


Command = tuple[bytes | str | int, ...]
Family = tuple[str, list[Command], Command, tuple[Command, ...]]  # name, before, command, does it show after


def families(place: Place) -> list[Family]:
    """Each with fresh names: what is prepared, the command, and a question whose answer says whether it happened."""
    n = place.fresh
    text, large, fields, key, session, fork = n("a"), n("b"), n("c"), n("d"), n("e"), n("f")
    gone, soon, exported, imported, restored = n("g"), n("h"), n("i"), n("j"), n("k")
    more = [place.counter % 900 + 1] * 5
    prompt: Command = ("PREFILL", session, "TOKENS", len(IDS), *IDS)
    return [
        ("SET", [], ("SET", text, "v"), (("EXISTS", text),)),
        ("SET large", [], ("SET", large, LARGE), (("EXISTS", large),)),
        ("GET large", [], ("GET", "text large"), ()),
        ("HSET", [], ("HSET", fields, "f", "v"), (("EXISTS", fields),)),
        ("DEL", [("SET", gone, "v")], ("DEL", gone), (("EXISTS", gone),)),
        ("EXPIRE", [("SET", soon, "v")], ("EXPIRE", soon, 1000), (("PERSIST", soon),)),
        ("SNAPSHOT", [prompt, ("EXTEND", session, "TOKENS", 5, *more)], ("SNAPSHOT", session, key), (("EXISTS", key),)),
        ("FORK", [], ("FORK", "base", fork), (("EXISTS", fork),)),
        ("RESTORE", [], ("RESTORE", "base", restored, "REPLACE"), (("EXISTS", restored),)),
        ("REWIND", [prompt], ("REWIND", session, "TOKENS", 300), (("LOGITS", session, "RAW"),)),
        ("GENERATE", [prompt], ("GENERATE", session, "MAXTOKENS", 2), (("LOGITS", session, "RAW"),)),
        ("SAMPLE", [], ("SAMPLE", "base"), ()),
        ("LOGITS", [], ("LOGITS", "base", "TOP", 3), ()),
        ("PREFIX", [], ("PREFIX", "TOKENS", len(IDS), *IDS), ()),
        ("BACKUP", [], ("STORE", "BACKUP", "backup"), ()),
        ("EXPORT", [], ("STORE", "EXPORT", "base", "FILE", exported), ()),
        ("IMPORT", [], ("STORE", "IMPORT", imported, "FILE", "archive"), (("EXISTS", imported),)),
        ("COMPACT", [], ("STORE", "COMPACT"), ()),
        ("GC", [], ("STORE", "GC"), ()),
        ("VERIFY", [], ("STORE", "VERIFY", "DEEP"), ()),
    ]


Fault = Callable[[Place], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def failing(place: Place, *names: str, code: int) -> Iterator[None]:
    place.files.fail(*names, code=code)
    try:
        yield
    finally:
        place.files.heal()


@contextlib.contextmanager
def map_full(place: Place) -> Iterator[None]:
    def commit(_: Callable[[], None]) -> None:
        raise lmdb.MapFullError("mdb_put: MDB_MAP_FULL: Environment mapsize limit reached")

    place.files.commit = commit  # type: ignore[method-assign]
    try:
        yield
    finally:
        del place.files.commit  # type: ignore[method-assign]


@contextlib.contextmanager
def clock_back(place: Place) -> Iterator[None]:
    real, real_ns = time.time, time.time_ns
    time.time, time.time_ns = (lambda: real() - 3600), (lambda: real_ns() - 3600 * 10**9)
    try:
        yield
    finally:
        time.time, time.time_ns = real, real_ns


def base_places(place: Place) -> list[RecordPlace]:
    store = place.server.store
    entry = store.keyspace.get(0, b"base")
    assert entry is not None
    with store._index.read() as txn:
        return plan(txn, store._segments.folder, entry.value.id)  # type: ignore[union-attr]


def large_place(place: Place) -> tuple[Path, int]:
    with place.server.store._index.read() as txn:
        entry = place.server.keyspace.get(0, b"text large")
        assert entry is not None and txn.count(Table.KEYS)
        ref = entry.value
    return place.server.store._segments.path(ref.segment), ref.offset  # type: ignore[union-attr]


@contextlib.contextmanager
def flipped(place: Place) -> Iterator[None]:
    """One bit in the first page, in the tail and in the large string."""
    records = base_places(place)
    spots = [(record.path, record.offset + 64 + record.payload_bytes // 2) for record in (records[0], records[-1])]
    # In the logits, too: SAMPLE and LOGITS read no more of a tail.
    spots.append((records[-1].path, records[-1].offset + 64 + 2000))
    path, offset = large_place(place)
    spots.append((path, offset + 64 + 1000))
    flip(spots)
    try:
        yield
    finally:
        flip(spots)


def flip(spots: list[tuple[Path, int]]) -> None:
    for path, at in spots:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))


@contextlib.contextmanager
def missing(place: Place) -> Iterator[None]:
    paths = {base_places(place)[0].path, large_place(place)[0]}
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)


@contextlib.contextmanager
def truncated(place: Place) -> Iterator[None]:
    """The segments end within the first page and within the large string; what was cut off comes back afterwards."""
    cuts = []
    record = base_places(place)[0]
    path, offset = large_place(place)
    for file_path, at in {(record.path, record.offset + 100), (path, offset + 100)}:
        with file_path.open("r+b") as file:
            file.seek(at)
            cuts.append((file_path, at, file.read()))
            file.truncate(at)
    try:
        yield
    finally:
        for file_path, at, data in cuts:
            with file_path.open("r+b") as file:
                file.seek(at)
                file.write(data)


FAULTS: dict[str, Fault] = {
    "read: EIO": lambda place: failing(place, "read", code=errno.EIO),
    "open: EMFILE": lambda place: failing(place, "open", "create", code=errno.EMFILE),
    "write: EIO": lambda place: failing(place, "write", code=errno.EIO),
    "write, short: ENOSPC": lambda place: failing(place, "write", "create", code=errno.ENOSPC),
    "fsync: EIO": lambda place: failing(place, "datasync", "sync_dir", code=errno.EIO),
    "rename, unlink: EIO": lambda place: failing(place, "rename", "unlink", code=errno.EIO),
    "index commit: EIO": lambda place: failing(place, "commit", code=errno.EIO),
    "index commit: ENOSPC": lambda place: failing(place, "commit", "allocate", code=errno.ENOSPC),
    "index commit: map full": map_full,
    "all writing: EIO": lambda place: failing(place, "write", "datasync", "commit", code=errno.EIO),
    "all writing: ENOSPC": lambda place: failing(place, "write", "create", "commit", "allocate", code=errno.ENOSPC),
    "clock goes back 1 h": clock_back,
    "bit flips": flipped,
    "segments missing": missing,
    "segments truncated": truncated,
}
# By fault and reply: the families that get it. All others get ok.
EXPECTED: dict[str, dict[str, str]] = {
    "read: EIO": {
        "ERR": "GET large, SAMPLE, LOGITS, BACKUP, EXPORT, IMPORT, COMPACT, start-up",
        "finds it": "VERIFY",
    },
    "open: EMFILE": {
        "MISCONF+": "SET large",
        "ERR": "GET large, SNAPSHOT, SAMPLE, LOGITS, BACKUP, EXPORT, IMPORT, COMPACT, start-up",
        "finds it": "VERIFY",
    },
    "write: EIO": {
        "MISCONF+": "SET large",
        "ERR": "SNAPSHOT, BACKUP, EXPORT, IMPORT, COMPACT",
    },
    "write, short: ENOSPC": {
        "NOSPACE+": "SET large",
        "NOSPACE": "SNAPSHOT, BACKUP, EXPORT, IMPORT, COMPACT",
    },
    "fsync: EIO": {
        "MISCONF+": "SET large",
        "ERR": "SNAPSHOT, BACKUP, EXPORT, IMPORT, COMPACT, start-up",
    },
    "rename, unlink: EIO": {
        "ERR": "BACKUP",
    },
    "index commit: EIO": {
        "MISCONF+": "SET large",
        "MISCONF": "SNAPSHOT, BACKUP, IMPORT, COMPACT, GC",
    },
    "index commit: ENOSPC": {
        "NOSPACE+": "SET large",
        "NOSPACE": "SNAPSHOT, BACKUP, IMPORT, COMPACT, GC, start-up",
    },
    "index commit: map full": {
        "NOSPACE+": "SET large",
        "NOSPACE": "SNAPSHOT, BACKUP, IMPORT, COMPACT, GC",
    },
    "all writing: EIO": {
        "MISCONF+": "SET, SET large, HSET, DEL, EXPIRE, RESTORE, REWIND, GENERATE",
        "MISCONF": "FORK, BACKUP, GC",
        "ERR": "SNAPSHOT, EXPORT, IMPORT, COMPACT, start-up",
    },
    "all writing: ENOSPC": {
        "NOSPACE+": "SET, SET large, HSET, DEL, EXPIRE, RESTORE, REWIND, GENERATE",
        "NOSPACE": "SNAPSHOT, FORK, BACKUP, EXPORT, IMPORT, COMPACT, GC, start-up",
    },
    "clock goes back 1 h": {},
    "bit flips": {
        "CORRUPT": "GET large, RESTORE, SAMPLE, LOGITS, EXPORT",
        "finds it": "VERIFY",
    },
    "segments missing": {
        "CORRUPT": "GET large, RESTORE, SAMPLE, LOGITS, EXPORT",
        "finds it": "VERIFY",
    },
    "segments truncated": {
        "CORRUPT": "GET large, RESTORE, SAMPLE, LOGITS, EXPORT",
        "finds it": "VERIFY",
    },
}
# A backup copies a segment only if it lacks it.
EITHER = {("segments missing", "BACKUP")}

Row = dict[str, str]


async def cell(place: Place, fault: Fault, family: Family) -> tuple[str, str]:
    """(what the client sees, what is wrong afterwards)."""
    name, before, command, shows = family
    for words in before:
        reply = await place.ask(*words)
        if isinstance(reply, ErrorReply):
            return "?", f"{words[0]!r} before it: {reply.text}"
    was = [await place.ask(*words) for words in shows if words[0] != "PERSIST"]
    with fault(place):
        reply = await place.ask(*command)
    seen = reply.text.split()[0] if isinstance(reply, ErrorReply) else OK
    if name == "VERIFY" and seen == OK and as_damaged(reply):
        seen = "finds it"
    wrong = []
    for _ in range(200):
        if place.server.store.write_error is None and place.server.refusal is None:
            break
        await asyncio.sleep(0.02)  # the store tries again by itself
    now = [await place.ask(*words) for words in shows]
    if seen not in (OK, "finds it") and shows:
        happened = now[0] == 1 if shows[0][0] == "PERSIST" else now != was
        seen += "+" if happened else ""
    if await place.ask("PING") is None:
        wrong.append("no PONG")
    wrong += [f"{key!r} changed" for key, digest in place.known.items() if await place.content(key) != digest]
    again = await place.ask(*command)
    if isinstance(again, ErrorReply) and not again.text.startswith("BUSYKEY"):
        wrong.append(f"again: {again.text}")
    return seen, "; ".join(wrong)


def as_damaged(reply: object) -> bool:
    pairs = dict(getattr(reply, "pairs", ()))
    return bool(pairs.get(b"damaged", pairs.get("damaged", 0)))


async def start_up(folder: Path, code: int, names: tuple[str, ...]) -> str:
    """What opening the directory says under a fault; then it must open."""
    files = FailingFiles()
    files.fail(*names, code=code)
    loop = asyncio.get_running_loop()
    try:
        store = Store.open(folder, loop=loop, files=files)
        seen = OK if store.write_error is None else store.write_error.word
        files.heal()
        await store.close()
    except Exception as error:
        seen = getattr(error, "word", type(error).__name__)
    store = Store.open(folder, loop=loop)
    await store.close()
    return seen


async def run(folder: Path, wanted: list[str]) -> tuple[dict[str, Row], list[str]]:
    files = FailingFiles()
    real_open = Store.open
    Store.open = lambda path, *, loop, files_=files: real_open(path, loop=loop, files=files_)  # type: ignore[assignment,method-assign,misc]
    folder.mkdir()
    socket = str(folder.parent / "socket")
    options = ["--dir", str(folder), "--port", "0", "--unixsocket", socket, "--appendfsync", "always"]
    model = "synthetic:dsv4-nano,page_tokens=128"
    server = Server(config.from_command_line([*options, "--model", model]), Backend())
    await server.start()
    Store.open = real_open  # type: ignore[method-assign]
    connection = await asyncio.to_thread(Connection, Target(unixsocket=socket), timeout=60)
    place = Place(folder, files, server, Caller(connection))
    for words in (
        ("SET", "text", "small"),
        ("SET", "text large", LARGE),
        ("PREFILL", "s", "TOKENS", len(IDS), *IDS),
        ("SNAPSHOT", "s", "base"),
        ("STORE", "EXPORT", "base", "FILE", "archive"),
    ):
        reply = await place.ask(*words)
        assert not isinstance(reply, ErrorReply), reply
    place.known = {key: await place.content(key) for key in (b"text", b"text large", b"base")}
    rows: dict[str, Row] = {}
    problems = []
    for name in wanted:
        rows[name] = {}
        for number in range(len(families(place))):
            family = families(place)[number]
            seen, wrong = await cell(place, FAULTS[name], family)
            rows[name][family[0]] = seen
            if wrong:
                problems.append(f"{name} / {family[0]}: {wrong}")
    connection.close()
    await server.stop()
    findings = check(folder, deep=True, mend=False).findings
    problems += [f"kvdb-check: {finding.message}" for finding in findings]
    codes = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EMFILE": errno.EMFILE}
    for name in wanted:
        if ": E" in name:
            calls, code = name.split(": ")
            parts = {"read": ("read",), "open": ("open", "create"), "write": ("write",),
                     "fsync": ("datasync", "sync_dir"),
                     "write, short": ("write", "create"), "rename, unlink": ("rename", "unlink"),
                     "index commit": ("commit", "allocate"),
                     "all writing": ("write", "create", "commit", "allocate")}  # fmt: skip
            if code == "EIO":
                parts |= {"index commit": ("commit",), "all writing": ("write", "datasync", "commit")}
            names = parts[calls]
            rows[name]["start-up"] = await start_up(folder, codes[code], names)
    return rows, problems


@click.command()
@click.option("--quick", is_flag=True, help="Four of the faults.")
def main(quick: bool) -> None:
    """Print the table; exit 1 when a cell is not as expected or the state after is not what it must be."""
    logging.disable(logging.CRITICAL)
    committer.RETRY_S = 0.05  # a second otherwise
    segments.SEGMENT_BYTES, compact.SPARSE = 300_000, 1.1  # so that there is always something to compact
    wanted = ["read: EIO", "write, short: ENOSPC", "index commit: EIO", "bit flips"] if quick else list(FAULTS)
    with tempfile.TemporaryDirectory() as scratch:
        rows, problems = asyncio.run(run(Path(scratch) / "data", wanted))
    for fault, row in rows.items():
        expected = {name: reply for reply, found in EXPECTED[fault].items() for name in found.split(", ")}
        problems += [
            f"{fault} / {name}: {seen} instead of {expected.get(name, OK)}"
            for name, seen in row.items()
            if seen != expected.get(name, OK) and (fault, name) not in EITHER
        ]
    names = list(next(iter(rows.values())))
    print("| fault | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for fault, row in rows.items():
        print(f"| {fault} | " + " | ".join(row.get(name, "") for name in names) + " |")
    for problem in problems:
        print(problem)
    print(f"{sum(map(len, rows.values()))} cells, {len(problems)} not as expected")
    sys.stdout.flush()
    os._exit(1 if problems else 0)


if __name__ == "__main__":
    main()
